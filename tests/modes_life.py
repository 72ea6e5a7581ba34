"""Modes in which a cache lives longer than one prompt and one answer."""

from __future__ import annotations

import copy

import torch
from case import NEW, RAGGED, Case, Tensors, logits_of, near, said
from families import host_cache, text
from helpers import prompt


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
