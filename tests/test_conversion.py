"""To and from `DynamicCache`, reading what is stored, and what a cache refuses to be turned into."""

import copy
import multiprocessing.reduction
import pickle

import pytest
import torch
import transformers as tf
from helpers import (
    LOSSLESS,
    TIGHT,
    assert_same_state,
    dense,
    driven,
    feed,
    full_cache,
    greedy,
    left_padded,
    make_tokens,
    prompt,
)
from models import CONFIGS, SMALL, build, new_model, tiny_model
from transformers import DynamicCache

from deltakv_hf import CacheStateError, DeltaKVCache, InvalidOptionError, NotPicklableError

FAMILIES = sorted(CONFIGS)


def padded_inputs():
    """A left-padded prompt with the positions that `generate` gives it."""
    inputs = left_padded([60, 41, 30])
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def prefilled(model, inputs, cache):
    model(**inputs, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dynamic_stores_what_the_forward_would_have_stored(family):
    model, inputs = tiny_model(family, "eager"), padded_inputs()
    made = DeltaKVCache.from_dynamic(
        prefilled(model, inputs, full_cache(model)), model, inputs["attention_mask"], **TIGHT
    )
    assert_same_state(made, prefilled(model, inputs, DeltaKVCache(model, **TIGHT)))


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_loses_nothing_without_loss(family):
    model, inputs = tiny_model(family, "eager"), padded_inputs()
    dynamic = prefilled(model, inputs, full_cache(model))
    kept = [layer.keys.clone() for layer in dynamic.layers]
    made = DeltaKVCache.from_dynamic(dynamic, model, inputs["attention_mask"], **LOSSLESS)
    back = made.to_dynamic_cache()
    for layer, old, new in zip(kept, dynamic.layers, back.layers, strict=True):
        real = inputs["attention_mask"][:, None, -old.keys.shape[2] :, None].bool()
        assert torch.equal(layer, old.keys)
        for a, b in ((old.keys, new.keys), (old.values, new.values)):
            assert torch.equal(a.masked_fill(~real, 0), b.masked_fill(~real, 0))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": prompt(3, 1), "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    expected = model(**step, past_key_values=dynamic).logits
    for cache in (made, back):
        assert torch.equal(model(**step, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_generation_goes_on_from_a_dynamic_cache_that_was_made_without_a_config(family):
    model, ids = tiny_model(family, "eager"), prompt(1, 40)
    expected = greedy(model, ids, full_cache(model))
    dynamic = DynamicCache()
    model(ids[:, :-1], past_key_values=dynamic)
    assert torch.equal(greedy(model, ids, DeltaKVCache.from_dynamic(dynamic, model, **LOSSLESS)), expected)


def test_from_dynamic_takes_positions():
    model, ids = tiny_model("llama"), prompt(1, 40)
    positions = torch.arange(100, 140)[None]
    dynamic, cache = full_cache(model), DeltaKVCache(model, **TIGHT)
    for held in (dynamic, cache):
        model(ids, position_ids=positions, past_key_values=held)
    assert_same_state(DeltaKVCache.from_dynamic(dynamic, model, position_ids=positions, **TIGHT), cache)


def test_from_dynamic_takes_a_bare_config():
    model, ids = tiny_model("llama"), prompt(1, 40)
    dynamic, cache = full_cache(model), DeltaKVCache(model, **TIGHT)
    for held in (dynamic, cache):
        model(ids, past_key_values=held)
    assert_same_state(DeltaKVCache.from_dynamic(dynamic, model.config, **TIGHT), cache)


def test_from_dynamic_refuses():
    model = tiny_model("llama")
    dynamic = prefilled(model, {"input_ids": prompt(2, 20)}, full_cache(model))
    bad = [
        (full_cache(model), {}, r"`cache` must hold"),
        (prefilled(tiny_model("llama-4-layers"), {"input_ids": prompt()}, full_cache(tiny_model("llama-4-layers"))), {},
         r"`cache` must have one layer.* 2, got 4"),
        ([(1, 2)], {}, r"`cache` must be a DynamicCache, got list"),
        (dynamic, {"attention_mask": torch.ones(2, 19)}, r"`attention_mask`.*\(2, 20\).*\(2, 19\)"),
        (dynamic, {"attention_mask": torch.ones(1, 20)}, r"`attention_mask`.*\(2, 20\).*\(1, 20\)"),
        (dynamic, {"attention_mask": [[1] * 20] * 2}, r"`attention_mask` must be a tensor or None, got a list"),
        (prefilled(tiny_model("llama-mha"), {"input_ids": prompt(2, 20)}, full_cache(tiny_model("llama-mha"))), {},
         r"`cache` must hold 2 heads of 8 numbers in layer 0, as the model has, got 4 of 8"),
        (dynamic, {"position_ids": torch.ones(3, 20)}, r"`position_ids`.*\(2, 20\).*\(3, 20\)"),
    ]  # fmt: skip
    for cache, options, message in bad:
        with pytest.raises(InvalidOptionError, match=message):
            DeltaKVCache.from_dynamic(cache, model, **options)


def test_dequantize_reads_what_the_model_reads():
    tokens = make_tokens(50, batch=2)
    cache = driven(tokens.columns(slice(0, 49)))
    views = feed(cache, tokens, [1], past=49)
    for layer_idx, view in enumerate(views):
        for got, expected in zip(cache.dequantize(layer_idx), dense(view), strict=True):
            assert torch.equal(got, expected)


def test_dequantize_gives_zeros_at_padding():
    model, inputs = tiny_model("llama"), left_padded([40, 25])
    cache = prefilled(model, inputs, DeltaKVCache(model, **TIGHT))
    for states in cache.dequantize(1):
        padding = inputs["attention_mask"] == 0
        assert (states.transpose(1, 2)[padding] == 0).all() and (states.transpose(1, 2)[~padding] != 0).any(-1).all()


def test_reading_an_empty_layer():
    cache = DeltaKVCache(tiny_model("gemma3"))
    for layer_idx in (0, 1):
        with pytest.raises(CacheStateError, match=f"layer {layer_idx}"):
            cache.dequantize(layer_idx)
    assert [(keys, values) for keys, values, _ in cache] == [(None, None)] * 2


def test_a_layer_that_is_not_there():
    with pytest.raises(InvalidOptionError, match="`layer_idx` must be below 2, got 99"):
        driven(make_tokens(20)).dequantize(99)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_iterating_gives_what_the_host_gives(family):
    model = tiny_model(family)
    cache, dynamic = DeltaKVCache(model, **LOSSLESS), full_cache(model)
    for held in (cache, dynamic):
        model(prompt(), past_key_values=held)
    for own, host in zip(cache, dynamic, strict=True):
        assert torch.equal(own[0], host[0]) and torch.equal(own[1], host[1])
        assert (own[2] is None) == (host[2] is None)
    # what a host's cache does with these triples
    again, expected = DynamicCache(list(cache)), DynamicCache(list(dynamic))
    assert again.get_seq_length() == expected.get_seq_length() and torch.equal(
        again.layers[1].keys, expected.layers[1].keys
    )


def test_iterating_over_a_layer_without_keys():
    model = build(tf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3))
    cache = prefilled(model, {"input_ids": prompt()}, DeltaKVCache(model, **TIGHT))
    (keys, values, _), own = cache
    assert keys is None and values is None and own[0].shape[2] == 48


def test_a_layer_never_passes_its_tail_off_as_all_keys():
    cache = driven(make_tokens(50))
    for layer_idx, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == layer.values.shape[2] == 50
        assert torch.equal(layer.keys, cache.dequantize(layer_idx)[0])
    with pytest.raises(AttributeError):
        layer.keys = torch.zeros(1)


def test_indexing_is_refused_as_by_the_host():
    model = new_model("llama")
    for cache in (DeltaKVCache(model), full_cache(model)):
        with pytest.raises(TypeError, match="subscriptable"):
            cache[0]


@pytest.mark.parametrize(
    "dump", [pickle.dumps, copy.copy, multiprocessing.reduction.ForkingPickler.dumps], ids=lambda f: f.__qualname__
)
def test_pickling_is_refused_with_a_reason(dump):
    with pytest.raises(NotPicklableError, match="deepcopy.*save"):
        dump(driven(make_tokens(20)))


def test_offloading_needs_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InvalidOptionError, match="`offloading`"):
        DeltaKVCache(tiny_model("llama"), offloading=True)


def test_offload_and_prefetch_of_layers_change_nothing_here():
    tokens = make_tokens(50)
    cache = driven(tokens)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same_state(cache, driven(tokens))
