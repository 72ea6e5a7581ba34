"""Modes of `generate` on a whole prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from case import BATCH, NEW, ROUNDED, Case, Listener, Tensors, errors, near, said
from families import host_cache

from deltakv_hf import set_default_cache


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


def with_changes(**changes) -> Callable[[Case], Tensors]:
    """Greedy generation of a changed model."""

    def run(case: Case) -> Tensors:
        for name, value in changes.items():
            setattr(case, name, value)
        return greedy(case)

    return run
