"""`crop` back into compressed tokens, and out of a forward that was broken off."""

import copy

import pytest
import torch
from helpers import (
    LOSSLESS,
    SHAPES,
    TIGHT,
    assert_same_state,
    assert_same_tensors,
    cuts,
    driven,
    feed,
    full_cache,
    make_tokens,
    option_sets,
    prompt,
    row_records,
    state_tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from test_padding import masks

from deltakv_hf import CacheStateError, DeltaKVCache, InvalidOptionError, references


@st.composite
def problems(draw):
    """(tokens, chunks, columns to keep, options)"""
    mask = draw(st.one_of(masks(), st.none()))
    length = draw(st.integers(2, 50)) if mask is None else mask.shape[1]
    batch = draw(st.integers(1, 3)) if mask is None else len(mask)
    heads, head_dim = draw(st.sampled_from(SHAPES))
    tokens = make_tokens(length, batch=batch, heads=heads, head_dim=head_dim, mask=mask, seed=draw(st.integers(0, 99)))
    return tokens, draw(cuts(length)), draw(st.integers(1, length - 1)), draw(option_sets())


def assert_same_records(left, right):
    for layer_idx in range(len(left.layers)):
        for row in range(left._ledger.batch_size):
            assert_same_tensors(row_records(left, layer_idx, row), row_records(right, layer_idx, row))


@given(problems(), st.booleans())
def test_tokens_that_come_again_give_the_state_of_before(problem, flush):
    tokens, chunks, keep, options = problem
    cache = driven(tokens, chunks, flush=flush, **options)
    cache.crop(keep - len(tokens))
    assert cache.get_seq_length() == keep
    feed(cache, tokens, [1] * (len(tokens) - keep), past=keep)
    cache.flush()
    assert_same_records(cache, driven(tokens, **options))


@given(problems())
def test_what_stays_reads_as_before(problem):
    tokens, chunks, keep, options = problem
    cache = driven(tokens, chunks, **options)
    before = cache.layers[1].dequantize()
    cache.crop(keep - len(tokens))
    after = cache.layers[1].dequantize()
    assert all(torch.equal(old[:, :, :keep], new) for old, new in zip(before, after, strict=True))


@given(problems())
def test_a_cropped_row_is_stored_as_if_alone(problem):
    tokens, chunks, keep, options = problem
    if tokens.mask is None:
        return
    cache = driven(tokens, chunks, **options)
    cache.crop(keep - len(tokens))
    cache.flush()
    for row in range(len(tokens.mask)):
        alone = driven(tokens.alone(row), **options)
        kept = int(tokens.mask[row, :keep].sum())
        alone.crop(kept - len(tokens.alone(row)))
        if kept:
            alone.flush()
            assert_same_tensors(row_records(cache, 1, row), row_records(alone, 1, 0))


@given(problems(), st.data())
def test_a_broken_forward_can_be_taken_back(problem, data):
    tokens, chunks, keep, options = problem
    place = data.draw(st.integers(0, len(chunks) - 1))
    past, length = sum(chunks[:place]), chunks[place]
    cache = DeltaKVCache(tiny_model("llama"), **TIGHT | options)
    if past:
        feed(cache, tokens.columns(slice(0, past)), chunks[:place])
    part = tokens.columns(slice(past, past + length))
    cache._ledger.note_mask(None if tokens.mask is None else tokens.mask[:, : past + length], outermost=True)
    cache.layers[0].receive_tables(part.cos.clone(), part.sin.clone())
    cache.update(part.keys[0].clone(), part.values[0].clone(), 0)
    with pytest.raises(CacheStateError, match="crop.*reset"):
        cache.flush()
    with pytest.raises(CacheStateError, match=f"at most {past} columns"):
        cache.crop(-length + 1)
    keep = min(keep, past)
    cache.crop(keep - past - length)
    assert cache.get_seq_length() == keep
    feed(cache, tokens, [1] * (len(tokens) - keep), past=keep)
    cache.flush()
    assert_same_records(cache, driven(tokens, **options))


def test_a_crop_to_nothing_leaves_an_empty_cache():
    tokens = make_tokens(50, batch=2)
    cache = driven(tokens)
    cache.crop(-50)
    assert cache.get_seq_length() == 0 and cache.layers[0].columns == 0
    feed(cache, tokens, [50])
    cache.flush()
    assert_same_state(cache, driven(tokens))


def test_a_crop_frees_what_it_drops():
    cache = driven(make_tokens(400))
    before = cache.memory_report().stored_bytes
    cache.crop(-300)
    assert cache.memory_report().stored_bytes < before / 3


def test_stats_count_tokens_and_crops():
    cache = driven(make_tokens(50))
    encoded = cache.stats().encoded_tokens
    assert encoded == cache.memory_report().compressed_tokens == 40
    cache.crop(-3)
    assert (cache.stats().crops, cache.stats().deep_crops, cache.stats().cropped_columns) == (1, 0, 3)
    cache.crop(-20)
    # 27 columns stay, the first 2 of them sinks
    assert cache.memory_report().compressed_tokens == 25
    stats = cache.stats()
    assert (stats.crops, stats.deep_crops, stats.cropped_columns, stats.dropped_tokens) == (2, 1, 23, 15)
    assert stats.forwards == 1 and stats.encoded_tokens == encoded
    cache.reset()
    assert cache.stats().encoded_tokens == 0


def test_a_short_crop_copies_no_compressed_bytes():
    cache = driven(make_tokens(50))
    before = state_tensors(cache.layers[0])
    cache.crop(-3)
    after = state_tensors(cache.layers[0])
    assert after["residual_codes"].data_ptr() == before["residual_codes"].data_ptr()


@pytest.mark.parametrize("recording", [False, True])
def test_a_window_of_the_host_that_cannot_go_back_leaves_all_as_it_was(recording):
    """The host's own crop would keep a window with tokens missing, without a word."""
    model = tiny_model("gemma3")
    cache = DeltaKVCache(model, **TIGHT)
    if recording:
        cache.activate_past_recording()
    model(prompt(1, 60), past_key_values=cache)
    cache.crop(0)
    before = model(prompt(1, 3, seed=1), past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(CacheStateError, match="crop"):
        cache.crop(-30)
    assert cache.get_seq_length() == 60
    assert torch.equal(model(prompt(1, 3, seed=1), past_key_values=cache).logits, before)


def test_a_window_of_the_host_that_recorded_enough_goes_back():
    model, ids = tiny_model("gemma3"), prompt(1, 70)
    cache, expected = DeltaKVCache(model, recent_window=4096), DeltaKVCache(model, recent_window=4096)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)
    cache.crop(-30)
    model(ids[:, :40], past_key_values=expected)
    tail = prompt(1, 20, seed=3)
    logits = [model(tail, past_key_values=held).logits for held in (cache, expected)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("length, options", [(1, TIGHT), (3, TIGHT), (30, LOSSLESS)])
def test_a_model_goes_on_after_an_interrupt_and_a_crop(at, length, options):
    model, ids = tiny_model("llama-4-layers"), prompt(2, 80)
    cache, whole = DeltaKVCache(model, **options), DeltaKVCache(model, **options)

    def fail(*args):
        raise KeyboardInterrupt

    model(ids[:, :40], past_key_values=cache)
    handle = model.model.layers[at].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 40 : 40 + length], past_key_values=cache)
    handle.remove()
    cache.crop(40 - cache.get_seq_length())
    model(ids[:, :40], past_key_values=whole)
    expected = model(ids[:, 40:], past_key_values=whole).logits
    assert torch.equal(model(ids[:, 40:], past_key_values=cache).logits, expected)
    assert_same_state(cache, whole)


def test_a_forward_that_no_layer_took_in_leaves_no_trace(monkeypatch):
    """A long call would compress the window as well; the first layer fails before it has done anything."""
    tokens = make_tokens(60)
    cache = driven(tokens.columns(slice(0, 14)), flush=False)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(type(cache.layers[0].compressor), "append", fail)
    with pytest.raises(MemoryError):
        feed(cache, tokens, [46], past=14)
    monkeypatch.undo()
    cache.crop(0)
    assert_same_state(cache, driven(tokens.columns(slice(0, 14)), flush=False))
    feed(cache, tokens, [46], past=14)
    cache.flush()
    assert_same_state(cache, driven(tokens))


def test_taking_back_may_be_tried_again(monkeypatch):
    tokens = make_tokens(60)
    cache = driven(tokens.columns(slice(0, 14)), flush=False)
    cache._ledger.note_mask(None, outermost=True)
    part, append = tokens.columns(slice(14, 60)), type(cache.layers[0].compressor).append
    cache.layers[0].receive_tables(part.cos.clone(), part.sin.clone())
    cache.update(part.keys[0].clone(), part.values[0].clone(), 0)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(type(cache.layers[0].compressor), "append", fail)
    with pytest.raises(MemoryError):
        cache.crop(-46)
    monkeypatch.setattr(type(cache.layers[0].compressor), "append", append)
    cache.crop(-46)
    feed(cache, tokens, [46], past=14)
    cache.flush()
    assert_same_state(cache, driven(tokens))


def test_too_many_references_are_refused_before_anything_is_done(monkeypatch):
    tokens = make_tokens(60)
    cache = driven(tokens.columns(slice(0, 14)), flush=False)
    monkeypatch.setattr(references, "MAX_REFERENCES", 5)
    with pytest.raises(CacheStateError, match="at most 5 references.*reference_stride"):
        feed(cache, tokens, [46], past=14)
    assert_same_state(cache, driven(tokens.columns(slice(0, 14)), flush=False))
    feed(cache, tokens.columns(slice(0, 20)), [6], past=14)


@pytest.mark.parametrize("number", [-1.5, "a", None, float("nan"), torch.tensor([-1, -2]), torch.tensor(-1.5)], ids=str)
def test_a_crop_by_what_is_no_whole_number(number):
    with pytest.raises(InvalidOptionError, match="`tokens_to_remove` must be a whole number"):
        driven(make_tokens(20)).crop(number)


def test_a_crop_to_nothing_is_counted_and_windows_go_on_recording():
    model = tiny_model("gemma3")
    cache = DeltaKVCache(model, **TIGHT)
    cache.activate_past_recording()
    model(prompt(), past_key_values=cache)
    cache.crop(-100)
    assert cache.get_seq_length() == 0 and cache.stats().cropped_columns == 48
    assert cache.layers[0].record_past


def test_a_cache_without_layers_of_ours_is_cropped_as_the_host_does():
    """Regression: the ledger, which nobody uses then, took the host's columns for its own."""
    model = tiny_model("mistral-sliding")
    cache, host = DeltaKVCache(model, **TIGHT), full_cache(model)
    for held in (cache, host):
        held.activate_past_recording()
        model(prompt(), past_key_values=held)
        held.crop(-3)
        held.crop(0)
    cache.flush()
    step = prompt(1, 1)
    assert torch.equal(model(step, past_key_values=cache).logits, model(step, past_key_values=host).logits)
