"""Modes in which a cache goes far back, or changes its form: into a file, from and to a dense cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from case import Case, Tensors, said
from families import host_cache, text
from helpers import options_of, prompt
from transformers import Cache

from deltakv_hf import JointEncodedCache


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
            name = "residual" if isinstance(cache, JointEncodedCache) else "compressor"
            coding = {} if cache.compressor is None else {name: cache.compressor}
            return type(cache).load(path, case.model, **coding)

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
    cache = type(kept).from_dynamic(dynamic, case.model, **options_of(kept))
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
