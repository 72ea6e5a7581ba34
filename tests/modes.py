"""The modes of the compatibility matrix: what `generate` and users do with a cache, written once for every cache.

A mode runs on a `Case` and returns tensors, which a lossless cache shares with `DynamicCache`. Its check says what must
hold of any cache, compared with itself: a mode may not change what another mode says.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from families import PROMPT_LENGTH, Family, host_cache, row_of, text
from helpers import prompt
from transformers import Cache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from deltakv_hf import set_default_cache

# more than a block, so that decoding itself compresses
NEW = 6
BATCH = [48, 48]
RAGGED = [48, 31, 40]
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Case:
    """One family with one way to make its caches, which are kept for a look at what they hold."""

    family: Family
    make: Callable
    attention: str | None = None
    dtype: torch.dtype = torch.float32
    caches: list[Cache] = field(default_factory=list)

    @property
    def model(self):
        return self.family.model(self.attention, self.dtype)

    def cache(self) -> Cache:
        """A new cache."""
        self.caches.append(self.make(self.model))
        return self.caches[-1]

    def generate(self, inputs: dict, cache: Cache | None = None, **options):
        """`model.generate` with a new cache unless one is given; the dict of its results."""
        cache = self.cache() if cache is None else cache
        return self.generate_without(inputs, past_key_values=cache, **options)

    def generate_without(self, inputs: dict, **options):
        """`model.generate` that is given no cache."""
        fixed = dict(pad_token_id=0, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
        return self.model.generate(**inputs, **fixed | {"do_sample": False} | options)

    def inputs(self, lengths: list[int] | None = None, **options) -> dict:
        """Prompts, their floating-point parts in the model's dtype."""
        given = self.family.inputs(lengths, **options)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in given.items()}

    def forced(self, inputs: dict, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits `[batch, new, vocabulary]` of greedy decoding that must say `tokens` `[batch, new]`."""
        out = self.generate(inputs, cache, logits_processor=[Forced(tokens, inputs["input_ids"].shape[1])])
        return logits_of(out)


class Forced(LogitsProcessor):
    """Lets nothing but given tokens be chosen."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        token = self.tokens[:, input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class Listener(BaseStreamer):
    """Keeps what was streamed."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def logits_of(out) -> torch.Tensor:
    return torch.stack(out.logits, dim=1)


def new_tokens(out) -> torch.Tensor:
    return out.sequences[:, -NEW:]


def said(out) -> Tensors:
    return out.sequences, logits_of(out)


def errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each token's logits."""
    return (got - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits agree: in the median, because one token of a mixture of experts may be routed elsewhere."""
    error = errors(got, expected).median()
    assert error <= ROUNDED, f"relative error {error:.2g} > {ROUNDED}"


# the same numbers but for the order of float sums; a key that stands on the edge of two codes may fall to either side
ROUNDED = 1e-2


# -- plain generation --------------------------------------------------------------------------------------------------


def prefill(case: Case) -> Tensors:
    return (case.model(**case.inputs(BATCH), past_key_values=case.cache()).logits,)


def prefill_is_exact(case: Case, result: Tensors) -> None:
    host = Case(case.family, host_cache)
    assert torch.equal(*result, *prefill(host)), "the prompt's own attention must be exact"


def greedy(case: Case) -> Tensors:
    return said(case.generate(case.inputs()))


def greedy_is_direct_calls(case: Case, result: Tensors) -> None:
    """A loop of `model(...)` says the same."""
    inputs, cache, logits = case.inputs(), case.cache(), []
    call, tokens = inputs, result[0][:, -NEW:]
    for place in range(NEW):
        logits.append(case.model(**call, past_key_values=cache).logits[:, -1])
        call = {"input_ids": tokens[:, place : place + 1]}
    near(torch.stack(logits, 1), result[1])


def sampling(case: Case) -> Tensors:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return said(case.generate(case.inputs(), do_sample=True))


def sampling_reads_the_same(case: Case, result: Tensors) -> None:
    near(case.forced(case.inputs(), result[0][:, -NEW:]), result[1])
    assert not torch.equal(result[0], case.generate(case.inputs()).sequences), "it was greedy"


def several(case: Case) -> Tensors:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return said(case.generate(case.inputs(), do_sample=True, num_return_sequences=3))


def several_are_a_repeated_prompt(case: Case, result: Tensors) -> None:
    inputs = {name: torch.cat([tensor] * 3) for name, tensor in case.inputs().items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(case.generate(inputs, do_sample=True).sequences, result[0])


def beams(case: Case) -> Tensors:
    out = case.generate(case.inputs(BATCH), num_beams=3, output_scores=True)
    return out.sequences, out.sequences_scores


def beams_score_what_they_say(case: Case, result: Tensors) -> None:
    tokens = result[0][:, -NEW:]
    logits = case.forced(case.inputs(BATCH), tokens).float().log_softmax(-1)
    scores = logits.gather(-1, tokens[..., None])[..., 0].mean(-1)
    assert (scores - result[1]).abs().max() < 0.05, f"beams say {result[1]}, their tokens {scores}"


def lookup(case: Case) -> Tensors:
    return said(case.generate(case.inputs(period=12), prompt_lookup_num_tokens=3))


def drafts_leave_no_trace(case: Case, result: Tensors) -> None:
    """The cache holds what was accepted, and a token is read as in greedy generation.

    All but this: beside a draft more tokens may still be raw, which spares them the loss of compression. So the two may
    differ by no more than the compressed cache differs from the full one.
    """
    (drafted,), inputs, tokens = case.caches, case.inputs(period=12), result[0][:, -NEW:]
    cache = case.cache()
    logits = case.forced(inputs, tokens, cache)
    loss = errors(logits, Case(case.family, host_cache).forced(inputs, tokens)).max()
    assert errors(result[1], logits).max() <= 1.5 * loss + ROUNDED
    assert drafted.get_seq_length() == cache.get_seq_length()
    for held in (drafted, cache):
        held.flush()
    assert drafted.memory_report().compressed_tokens == cache.memory_report().compressed_tokens


def assisted(case: Case) -> Tensors:
    assistant = case.family.model(case.attention, case.dtype, noise=0.02)
    return said(case.generate(case.inputs(period=12), assistant_model=assistant))


def streamed(case: Case) -> Tensors:
    listener = Listener()
    out = case.generate(case.inputs(), streamer=listener)
    assert listener.ended and listener.tokens == out.sequences[0].tolist()
    return said(out)


def as_greedy(case: Case, result: Tensors) -> None:
    """The very tokens and logits of greedy generation."""
    for got, expected in zip(result, greedy(case), strict=True):
        assert torch.equal(got, expected)


def by_default(case: Case) -> Tensors:
    set_default_cache(case.model, lambda model: case.cache())
    try:
        return said(case.generate_without(case.inputs()))
    finally:
        set_default_cache(case.model, None)


def default_is_ours(case: Case, result: Tensors) -> None:
    assert [cache.get_seq_length() for cache in case.caches] == [result[0].shape[1] - 1]
    as_greedy(case, result)


# -- batches -----------------------------------------------------------------------------------------------------------


def padded(case: Case) -> Tensors:
    return said(case.generate(case.inputs(RAGGED)))


def order_of_rows_does_not_matter(case: Case, result: Tensors) -> None:
    reversed_rows = {name: torch.cat(tensor.chunk(3)[::-1]) for name, tensor in case.inputs(RAGGED).items()}
    near(case.forced(reversed_rows, result[0][:, -NEW:].flip(0)).flip(0), result[1])


def ragged(case: Case) -> Tensors:
    return (case.forced(case.inputs(RAGGED), prompt(len(RAGGED), NEW, seed=3)),)


def rows_are_as_if_alone(case: Case, result: Tensors) -> None:
    inputs, tokens = case.inputs(RAGGED), prompt(len(RAGGED), NEW, seed=3)
    for row in (0, 1):
        near(result[0][row], case.forced(row_of(inputs, row), tokens[row : row + 1])[0])


def widened_beams(case: Case) -> Tensors:
    cache, inputs = case.cache(), case.inputs()
    case.model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    ids = torch.cat([inputs["input_ids"], prompt(1, 5, seed=4)], dim=1)
    out = case.generate(text(inputs, ids), cache, num_beams=3, output_scores=True)
    return out.sequences, out.sequences_scores


def widened_beams_score_what_they_say(case: Case, result: Tensors) -> None:
    cache, inputs, tokens = case.cache(), case.inputs(), result[0][:, -NEW:]
    case.model(**inputs, past_key_values=cache)
    logits = case.forced(text(inputs, result[0][:, :-NEW]), tokens, cache).float().log_softmax(-1)
    scores = logits.gather(-1, tokens[..., None])[..., 0].mean(-1)
    assert (scores - result[1]).abs().max() < 0.05, f"beams say {result[1]}, their tokens {scores}"


def widened(case: Case) -> Tensors:
    """Four rows of questions about two prompts."""
    cache, inputs = case.cache(), case.inputs(prompts_of(case))
    repeats = 4 // len(inputs["input_ids"])
    case.model(**inputs, past_key_values=cache)
    cache.batch_repeat_interleave(repeats)
    wide = {name: inputs[name].repeat_interleave(repeats, dim=0) for name in ("input_ids", "attention_mask")}
    ids = torch.cat([wide["input_ids"], prompt(4, 5, seed=4)], dim=1)
    return (case.forced(text(wide, ids), prompt(4, NEW, seed=5), cache),)


def prompts_of(case: Case) -> list[int]:
    # a Qwen-VL model keeps the positions behind its images in itself, one number a row, and cannot widen them
    return BATCH if case.family.images is None else BATCH[:1]


def widened_rows_are_as_if_alone(case: Case, result: Tensors) -> None:
    prompts, tails, tokens = case.inputs(prompts_of(case)), prompt(4, 5, seed=4), prompt(4, NEW, seed=5)
    for row in (1, 2):
        cache, inputs = case.cache(), row_of(prompts, row * len(prompts["input_ids"]) // 4)
        case.model(**inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], tails[row : row + 1]], dim=1)
        near(result[0][row], case.forced(text(inputs, ids), tokens[row : row + 1], cache)[0])


# -- a cache's life ----------------------------------------------------------------------------------------------------


def chunked(case: Case) -> Tensors:
    return said(case.generate(case.inputs(), prefill_chunk_size=10))


def chunked_is_direct_calls(case: Case, result: Tensors) -> None:
    assert case.caches[0].get_seq_length() == result[0].shape[1] - 1
    if case.family.images is not None:
        return  # a piece of a prompt has no image of its own to be called with
    inputs, cache = case.inputs(), case.cache()
    for ids in inputs["input_ids"].split(10, dim=1)[:-1]:
        case.model(ids, past_key_values=cache)
    near(case.forced(text(inputs, inputs["input_ids"]), result[0][:, -NEW:], cache), result[1])


def turns(case: Case, only_new: bool = False) -> Tensors:
    cache, inputs = case.cache(), case.inputs()
    first = case.generate(inputs, cache).sequences
    second = text(inputs, torch.cat([first, prompt(1, 9, seed=4)], dim=1))
    if only_new:
        second["input_ids"] = second["input_ids"][:, cache.get_seq_length() :]
    out = case.generate(second, cache)
    return torch.cat([first[:, :-1], out.sequences], 1) if only_new else out.sequences, logits_of(out)


def turns_hold_every_token(case: Case, result: Tensors) -> None:
    (cache,) = case.caches
    assert cache.get_seq_length() == result[0].shape[1] - 1


def turns_with_new_ids(case: Case) -> Tensors:
    return turns(case, only_new=True)


def new_ids_are_full_ids(case: Case, result: Tensors) -> None:
    for got, expected in zip(result, turns(case), strict=True):
        assert got.shape[1] == expected.shape[1] or got is result[0]
        assert torch.equal(got[:, -NEW:], expected[:, -NEW:])


def cropped(case: Case) -> Tensors:
    """Three tokens are fed and taken back."""
    return steps(case, draft=True)


def steps(case: Case, draft: bool) -> Tensors:
    cache, inputs, tokens = case.cache(), case.inputs(), prompt(1, 6, seed=4)
    logits = [case.model(**inputs, past_key_values=cache).logits[:, -1:]]
    cache.activate_past_recording()
    if draft:
        case.model(prompt(1, 3, seed=7), past_key_values=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    for place in range(6):
        logits.append(case.model(tokens[:, place : place + 1], past_key_values=cache).logits)
        cache.crop(0)
    return (torch.cat(logits, dim=1),)


def crop_leaves_no_trace(case: Case, result: Tensors) -> None:
    """Bit for bit, where the host's own layers do so: a linear one computes the tokens of a draft together."""
    (got,), (expected,) = result, steps(case, draft=False)
    host = Case(case.family, host_cache)
    if torch.equal(*steps(host, draft=True), *steps(host, draft=False)):
        assert torch.equal(got, expected)
    else:
        near(got, expected)


def copied(case: Case) -> Tensors:
    """The original goes another way; its copy goes on as if nothing had been."""
    cache, inputs = case.cache(), case.inputs()
    case.model(**inputs, past_key_values=cache)
    other = copy.deepcopy(cache)
    case.caches.append(other)
    ids = torch.cat([inputs["input_ids"], prompt(1, 5, seed=4)], dim=1)
    wrong = torch.cat([inputs["input_ids"], prompt(1, 9, seed=5)], dim=1)
    case.generate(text(inputs, wrong), cache)
    return said(case.generate(text(inputs, ids), other))


def a_copy_is_independent(case: Case, result: Tensors) -> None:
    cache, inputs = case.cache(), case.inputs()
    case.model(**inputs, past_key_values=cache)
    ids = torch.cat([inputs["input_ids"], prompt(1, 5, seed=4)], dim=1)
    for got, expected in zip(result, said(case.generate(text(inputs, ids), cache)), strict=True):
        assert torch.equal(got, expected)


def reset(case: Case) -> Tensors:
    cache = case.cache()
    case.model(**case.inputs(RAGGED), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    return said(case.generate(case.inputs(), cache))


def gone_back(case: Case, steps: tuple[int, ...] = (30,)) -> Tensors:
    """Far back, into compressed tokens; then other tokens follow."""
    cache = case.cache()
    cache.activate_past_recording()
    case.model(**case.inputs(), past_key_values=cache)
    for number in steps:
        cache.crop(-number)
    return (following(case, cache),)


def steps_back_are_one(case: Case, result: Tensors) -> None:
    if case.family.grows:
        assert case.caches[0].stats().deep_crops > 0
    # a layer of the host forgets at the first step what the second would need
    if not case.family.mixed:
        assert torch.equal(*result, *gone_back(case, (7, 23)))


def following(case: Case, cache: Cache) -> torch.Tensor:
    """Logits of six tokens, one after the other."""
    tokens = prompt(1, 6, seed=4)
    return torch.cat([case.model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1)], dim=1)


def continued(case: Case, change: Callable[[Cache], Cache] = lambda cache: cache) -> Tensors:
    """A prompt is read and generation goes on, from what `change` made of the cache."""
    cache, inputs = case.cache(), case.inputs()
    case.model(**inputs, past_key_values=cache)
    cache = change(cache)
    ids = torch.cat([inputs["input_ids"], prompt(1, 5, seed=4)], dim=1)
    return said(case.generate(text(inputs, ids), cache))


def saved(case: Case) -> Tensors:
    def by_file(cache: Cache) -> Cache:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path)
            return type(cache).load(path, case.model)

    return continued(case, by_file)


def a_change_changes_nothing(case: Case, result: Tensors) -> None:
    for got, expected in zip(result, continued(case), strict=True):
        assert torch.equal(got, expected)


def converted(case: Case) -> Tensors:
    return continued(case, lambda cache: cache.to_dynamic_cache())


def a_dynamic_cache_reads_the_same(case: Case, result: Tensors) -> None:
    """Up to the first new block, which only ours compresses."""
    for got, expected in zip(result, continued(case), strict=True):
        assert torch.equal(got[:, :1], expected[:, :1])


def compressed_later(case: Case) -> Tensors:
    """A prompt that a `DynamicCache` has read is compressed then."""
    dynamic, inputs = host_cache(case.model), case.inputs()
    case.model(**inputs, past_key_values=dynamic)
    kept = case.cache()
    cache = type(kept).from_dynamic(dynamic, case.model, **asdict(kept.options))
    case.caches[:] = [cache]
    return (following(case, cache),)


def dynamic_goes_on(case: Case) -> Tensors:
    cache = case.cache()
    case.model(**case.inputs(), past_key_values=cache)
    return (following(case, cache),)


def as_if_read_by_ours(case: Case, result: Tensors) -> None:
    (got,), (expected,) = result, dynamic_goes_on(case)
    # the positions of images are not those of text, and another rotation finds other references
    if not case.family.images:
        assert torch.equal(got, expected)


# -- direct calls ------------------------------------------------------------------------------------------------------


def called(case: Case, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None, only=None) -> Tensors:
    """Logits of a prompt and of five single tokens behind it, all by `model(...)`.

    Args:
        mask: `[2, prompt]`, of the prompt; None makes a batch of one without a mask.
        positions: `[1, prompt]`; as the mask has them, unless given.
        only: the one row to run, without its padding.
    """
    batch = 1 if mask is None else len(mask)
    inputs, tails = case.inputs([PROMPT_LENGTH] * batch), prompt(batch, 5, seed=4)
    if mask is not None:
        inputs["attention_mask"] = torch.cat([mask, torch.ones_like(tails)], dim=1)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    else:
        del inputs["attention_mask"]
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, 6)], dim=1)
    ids = torch.cat([inputs.pop("input_ids"), tails], dim=1)
    if only is not None:
        real = inputs.pop("attention_mask")[only].bool()
        ids, positions = ids[only : only + 1, real], positions[only : only + 1, real]
        inputs = {k: v.chunk(batch)[only] for k, v in inputs.items()}
        inputs = {k: v[:, real[:PROMPT_LENGTH]] if v.shape[1] == PROMPT_LENGTH else v for k, v in inputs.items()}
    mask, cache = inputs.pop("attention_mask", None), case.cache()
    logits, past = [], ids.shape[1] - 5
    for start, stop in ((0, past), *((i, i + 1) for i in range(past, past + 5))):
        now = {} if mask is None else {"attention_mask": mask[:, :stop]}
        pictures = inputs if start == 0 else {}
        now |= {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        logits.append(case.model(**now, **pictures, past_key_values=cache).logits)
    logits = torch.cat(logits, dim=1)
    # what stands at a pad means nothing
    return (logits if mask is None else logits.where(mask.bool()[..., None], 0),)


def holes(*places: slice) -> torch.Tensor:
    mask = torch.ones(2, PROMPT_LENGTH, dtype=torch.long)
    for row, place in enumerate(places):
        mask[row, place] = 0
    return mask


# the image, if any, stands at -10 .. -6
RIGHT, INSIDE = holes(slice(-3, None), slice(0, 0)), holes(slice(20, 29), slice(5, 8))


def right_padded(case: Case) -> Tensors:
    return called(case, RIGHT)


def right_padded_as_alone(case: Case, result: Tensors) -> None:
    rows_with_holes_are_as_if_alone(case, result, RIGHT)


def with_holes(case: Case) -> Tensors:
    return called(case, INSIDE)


def holes_as_alone(case: Case, result: Tensors) -> None:
    rows_with_holes_are_as_if_alone(case, result, INSIDE)


def rows_with_holes_are_as_if_alone(case: Case, result: Tensors, mask: torch.Tensor) -> None:
    if case.family.mixed:
        # windows and linear states of the host count padding, so its rows are not as if alone either
        prompt_is_exact(result, called(Case(case.family, host_cache), mask))
        return
    for row in range(2):
        near(result[0][row, -5:], called(case, mask, only=row)[0][0, -5:])


def custom_positions(case: Case) -> Tensors:
    return called(case, positions=torch.arange(50, 50 + PROMPT_LENGTH)[None])


def positions_are_relative(case: Case, result: Tensors) -> None:
    """What is rotated knows distances alone."""
    if case.family.relative:
        near(*result, *called(case, positions=torch.arange(PROMPT_LENGTH)[None]))
    else:
        prompt_is_exact(result, custom_positions(Case(case.family, host_cache)))


def packed(case: Case) -> Tensors:
    half = torch.arange(PROMPT_LENGTH // 2)
    return called(case, positions=torch.cat([half, half])[None])


def packed_as_the_host(case: Case, result: Tensors) -> None:
    """The host takes no notice of restarting positions once there is a cache, and so do we."""
    prompt_is_exact(result, packed(Case(case.family, host_cache)))


def prompt_is_exact(result: Tensors, expected: Tensors) -> None:
    assert torch.equal(result[0][:, :PROMPT_LENGTH], expected[0][:, :PROMPT_LENGTH])
    assert errors(result[0], expected[0])[:, PROMPT_LENGTH:].median() < 1, "not even near the full cache"


# -- numbers and attention ---------------------------------------------------------------------------------------------


def with_changes(**changes) -> Callable[[Case], Tensors]:
    """Greedy generation of a changed model."""

    def run(case: Case) -> Tensors:
        for name, value in changes.items():
            setattr(case, name, value)
        return greedy(case)

    return run


@dataclass(frozen=True)
class Mode:
    """One column of the table.

    Attributes:
        name: of the mode; `group`: of the table that it stands in.
        run: what is compared with a `DynamicCache`.
        check: what must hold of any cache.
        host: what the host does instead, where its own cache is known to fail on a supported version.
    """

    name: str
    group: str
    run: Callable[[Case], Tensors]
    check: Callable[[Case, Tensors], None]
    host: Callable[[Case], Tensors] | None = None

    def expected(self, family: Family) -> Tensors:
        """What a `DynamicCache` says."""
        return (self.host or self.run)(Case(family, host_cache))


PLAIN, BATCHES, LIFE, CALLS, NUMBERS = (
    "Generation",
    "Batches",
    "A cache's life",
    "Direct calls",
    "Attention and numbers",
)
MODES = [
    Mode("prefill", PLAIN, prefill, prefill_is_exact),
    Mode("greedy", PLAIN, greedy, greedy_is_direct_calls),
    Mode("sampling", PLAIN, sampling, sampling_reads_the_same),
    Mode("several sequences", PLAIN, several, several_are_a_repeated_prompt),
    Mode("beam search", PLAIN, beams, beams_score_what_they_say),
    Mode("prompt lookup", PLAIN, lookup, drafts_leave_no_trace),
    Mode("assisted", PLAIN, assisted, drafts_leave_no_trace),
    Mode("streamer", PLAIN, streamed, as_greedy),
    Mode("default cache", PLAIN, by_default, default_is_ours),
    Mode("left padding", BATCHES, padded, order_of_rows_does_not_matter),
    Mode("ragged rows", BATCHES, ragged, rows_are_as_if_alone),
    Mode("widened for beams", BATCHES, widened_beams, widened_beams_score_what_they_say),
    Mode("widened for questions", BATCHES, widened, widened_rows_are_as_if_alone),
    Mode("chunked prefill", LIFE, chunked, chunked_is_direct_calls),
    Mode("turns, full ids", LIFE, turns, turns_hold_every_token),
    Mode("turns, new ids", LIFE, turns_with_new_ids, new_ids_are_full_ids),
    Mode("crop", LIFE, cropped, crop_leaves_no_trace),
    Mode("deep crop", LIFE, gone_back, steps_back_are_one),
    Mode("save and load", LIFE, saved, a_change_changes_nothing, host=continued),
    Mode("to `DynamicCache`", LIFE, converted, a_dynamic_cache_reads_the_same, host=continued),
    Mode("from `DynamicCache`", LIFE, compressed_later, as_if_read_by_ours, host=dynamic_goes_on),
    Mode("deepcopy", LIFE, copied, a_copy_is_independent),
    Mode("reset", LIFE, reset, as_greedy, host=greedy),
    Mode("right padding", CALLS, right_padded, right_padded_as_alone),
    Mode("holes in the mask", CALLS, with_holes, holes_as_alone),
    Mode("own position_ids", CALLS, custom_positions, positions_are_relative),
    Mode("packed sequences", CALLS, packed, packed_as_the_host),
    Mode("sdpa", NUMBERS, with_changes(attention="sdpa"), greedy_is_direct_calls),
    Mode("eager", NUMBERS, with_changes(attention="eager"), greedy_is_direct_calls),
    Mode("float16", NUMBERS, with_changes(dtype=torch.float16), greedy_is_direct_calls),
    Mode("bfloat16", NUMBERS, with_changes(dtype=torch.bfloat16), greedy_is_direct_calls),
]
