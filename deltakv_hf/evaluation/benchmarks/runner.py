"""Runs items: every prompt is read once by each cache, and `generate` answers, greedily and one item at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InvalidOptionError
from ...support import max_positions
from ..items import encode
from ..peers import copy_cache
from ..prefill import check_cache, held_shares, prefill
from ..runner import FULL
from .items import BenchmarkItem
from .prompts import EncodedItem, Frame, chat_frame, encode_item

MODES = ("multi-turn", "multi-request")


@dataclass(frozen=True)
class ItemResult:
    """What a cache made of an item.

    Attributes:
        dataset, number, digest: of the item.
        cache: its name.
        turns: of each question `dataset`, right `answers`, the `answer` generated, its `num_tokens` and its `score`.
        num_prompt_tokens: of the prompt or the shared context, as read.
        num_dropped: tokens cut out of its middle.
        stored_share, compressed_share: bytes held over dense ones behind the answer, or behind all turns: whole cache,
            and compressed tokens alone.
        compressor_bytes, break_even_tokens: as in `WindowFidelity`.
    """

    dataset: str
    number: int
    digest: str
    cache: str
    turns: list[dict]
    num_prompt_tokens: int
    num_dropped: int
    stored_share: float
    compressed_share: float
    compressor_bytes: int
    break_even_tokens: int

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What tells results apart."""
        return self.dataset, self.number, self.digest, self.cache


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[BenchmarkItem],
    make_caches: dict[str, Callable[[], Cache]],
    progress: Callable[[Iterable], Iterator] = iter,
    *,
    chat: bool = False,
    mode: str = "multi-turn",
    max_prompt_tokens: int | None = None,
    done: Iterable[ItemResult] = (),
    keep: Callable[[ItemResult], None] = lambda result: None,
) -> list[ItemResult]:
    """Answers items with caches, beside the full cache, which is always run.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        items: as `load_benchmark` gives them.
        make_caches: a function that makes an empty cache, by name.
        progress: wraps the iteration over items (for a progress bar).
        chat: whether to put the tokenizer's chat template around prompts, but for datasets that go without.
        mode: of items with a shared context, which is read before any question: `multi-turn` asks each question
            behind those before it and their right answers, `multi-request` each behind the context alone.
        max_prompt_tokens: most tokens of a prompt; None: as many as the model has positions for.
        done: results from before, which are not computed again.
        keep: is called with every new result.

    Returns:
        results by item, then cache, the full cache (`FULL`) first.

    Raises:
        InvalidOptionError: an argument is wrong, or an answer has no room in the model's positions.
    """
    if mode not in MODES:
        raise InvalidOptionError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if not items:
        raise InvalidOptionError("`items` must not be empty.")
    if FULL in make_caches:
        raise InvalidOptionError(f"`make_caches` must not hold {FULL!r}, which is always run.")
    if max_prompt_tokens is not None and max_prompt_tokens < 2:
        raise InvalidOptionError(f"`max_prompt_tokens` must be 2 or more, got {max_prompt_tokens}.")
    makers = {FULL: lambda: DynamicCache(config=model.config)} | make_caches
    frame, known = chat_frame(tokenizer) if chat else Frame(), {result.key: result for result in done}

    def encoded(item: BenchmarkItem) -> EncodedItem:
        longest = max(turn.max_new_tokens for turn in item.turns)
        rooms = [max_positions(model), max_prompt_tokens and max_prompt_tokens + longest]
        room = min((room for room in rooms if room is not None), default=None)
        return encode_item(tokenizer, item, frame if item.chat else Frame(), mode == MODES[0], room)

    # an item without room is refused before hours of work
    for item in items:
        encoded(item)
    results = []
    for item in progress(items):
        ids = encoded(item)
        for name, make_cache in makers.items():
            result = known.get((item.dataset, item.number, item.digest, name))
            if result is None:
                cache = make_cache()
                check_cache(name, cache)
                result = run_item(model, tokenizer, item, ids, name, cache, mode)
                keep(result)
            results.append(result)
    return results


def run_item(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: BenchmarkItem,
    ids: EncodedItem,
    name: str,
    cache: Cache,
    mode: str,
) -> ItemResult:
    """Answers one item with an empty `cache` called `name`."""
    ends = _ends(model, tokenizer, item)
    if item.context is None:
        # where a line break ends an answer, it does not begin one
        least = int(item.stop_at_newline)
        answers = [_answer(model, ids.questions[0], cache, item.turns[0].max_new_tokens, ends, least)]
    else:
        prefill(model, torch.tensor(ids.context), cache)
        answers, held = [], list(ids.context)
        for turn, question, golden in zip(item.turns, ids.questions, ids.golden, strict=True):
            # a copy, so that what a wrong answer says is not in the next turn's way
            answers.append(_answer(model, held + question, copy_cache(cache), turn.max_new_tokens, ends))
            if mode == MODES[0]:
                prefill(model, torch.tensor(question + golden), cache)
                held += question + golden
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    turns = [
        {
            "dataset": turn.dataset,
            "answers": list(turn.answers),
            "answer": text,
            "num_tokens": len(answer),
            "score": float(turn.metric(text, turn.answers)),
        }
        for turn, text, answer in zip(item.turns, texts, answers, strict=True)
    ]
    shares = held_shares(model, cache)
    num_read = len(ids.context or ids.questions[0])
    return ItemResult(item.dataset, item.number, item.digest, name, turns, num_read, ids.num_dropped, *shares)


@torch.no_grad()
def _answer(
    model: PreTrainedModel,
    ids: list[int],
    cache: Cache,
    max_new_tokens: int,
    ends: list[int] | None,
    min_new_tokens: int = 0,
) -> list[int]:
    """The most likely tokens behind `ids`, of which `cache` may hold some, without the one that ends them."""
    inputs = torch.tensor([ids], device=model.device)
    # what a model's generation config says of sampling and penalties is left out: caches are compared, not decoders
    found = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=None,
        eos_token_id=ends,
        pad_token_id=ends[0] if ends else 0,
    )[0, len(ids) :].tolist()
    return found[:-1] if ends and found and found[-1] in ends else found


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: BenchmarkItem) -> list[int] | None:
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if item.stop_at_newline:
        ends.append(encode(tokenizer, "\n")[-1])
    return ends or None
