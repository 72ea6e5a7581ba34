"""What the demo asks: the planted facts, or the user's own prompt and questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..config import DeltaKVConfig
from ..errors import InvalidOptionError
from ..evaluation.texts import read_text
from ..support import max_positions
from .facts import FACTS, plant


@dataclass(frozen=True)
class Ask:
    """One question.

    Attributes:
        title: the question as shown.
        ids: tokens fed behind the prompt.
        expected: the true answer, if it is known.
        place: tokens `[start, stop)` of the prompt that hold it, if known.
    """

    title: str
    ids: list[int]
    expected: str | None = None
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class Task:
    """A prompt, read once by each cache, and the questions asked after it.

    Attributes:
        ids: token ids of the prompt.
        asks: the questions.
        max_new_tokens: most tokens of an answer.
        is_end: whether a token ends an answer.
        continuation: true tokens behind the prompt (empty if unknown).
    """

    ids: list[int]
    asks: list[Ask]
    max_new_tokens: int
    is_end: Callable[[int], bool]
    continuation: list[int] = field(default_factory=list)


def planted_task(tokenizer, options: DeltaKVConfig) -> Task:
    """The text that comes with the package, with facts planted in it."""
    prompt = plant(tokenizer, options)
    asks = [
        Ask(fact.question, tokenizer(fact.ask, add_special_tokens=False).input_ids, fact.value, place)
        for fact, place in zip(FACTS, prompt.places, strict=True)
    ]
    digits = max(len(tokenizer(fact.value, add_special_tokens=False).input_ids) for fact in FACTS)

    def is_end(token: int) -> bool:
        return not tokenizer.decode([token]).strip().isdigit()

    return Task(prompt.ids, asks, digits, is_end, prompt.continuation)


def own_task(model, tokenizer, prompt_file: Path, questions: list[str], max_new_tokens: int, options) -> Task:
    """The user's text; without questions the answer is how it goes on."""
    ids = tokenizer(read_text(prompt_file, "--prompt-file")).input_ids
    if questions:
        asks = [Ask(q, tokenizer(f"\n\n{q}\n", add_special_tokens=False).input_ids) for q in questions]
    else:
        # the last token is fed as the question, so that the prompt is continued
        ids, asks = ids[:-1], [Ask("(the prompt goes on)", ids[-1:])]
    needed = options.num_sink_tokens + options.recent_window + options.block_size
    if len(ids) < needed:
        raise InvalidOptionError(
            f"`--prompt-file` must hold at least {needed + (not questions)} tokens for anything to be compressed "
            f"({options.num_sink_tokens} sinks, a recent window of {options.recent_window} and a block of "
            f"{options.block_size}), got {len(ids) + (not questions)}: give a longer text or lower `--recent-window`."
        )
    longest = len(ids) + max(len(ask.ids) for ask in asks) + max_new_tokens
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise InvalidOptionError(
            f"`--prompt-file` with its longest question and answer must fit the {limit} positions of the model, got "
            f"{longest} tokens: shorten the text by {longest - limit} tokens or lower `--max-new-tokens`."
        )
    ends = model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id
    ends = {ends} if ends is None or isinstance(ends, int) else set(ends)
    return Task(ids, asks, max_new_tokens, ends.__contains__)
