"""Stored bytes are a function of the tokens fed; what is read back is near what was fed and stands in its place."""

import pytest
import torch
from deltakv_hf.kernels.reference import dequantize
from helpers import (
    SHAPES,
    TIGHT,
    assert_same_state,
    assert_same_tensors,
    cuts,
    dense,
    driven,
    feed,
    make_tokens,
    option_sets,
    row_records,
    set_scratch_bytes,
)
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import DeltaKVCache
from deltakv_hf.compressor import coder

lengths = st.integers(1, 60)


@st.composite
def problems(draw):
    """(tokens, options, chunks)"""
    length = draw(lengths)
    heads, head_dim = draw(st.sampled_from(SHAPES))
    tokens = make_tokens(
        length, heads=heads, head_dim=head_dim, batch=draw(st.integers(1, 2)), seed=draw(st.integers(0, 99))
    )
    return tokens, draw(option_sets()), draw(cuts(length))


@given(problems())
def test_any_chunks_give_the_state_of_one_call(problem):
    tokens, options, chunks = problem
    assert_same_state(driven(tokens, chunks, **options), driven(tokens, **options))


@given(problems())
def test_token_by_token_gives_the_state_of_one_call(problem):
    tokens, options, _ = problem
    assert_same_state(driven(tokens, [1] * len(tokens), **options), driven(tokens, **options))


@given(problems(), st.integers(1, 60))
def test_flushing_in_between_changes_nothing(problem, place):
    tokens, options, _ = problem
    place = min(place, len(tokens))
    cache = driven(tokens.columns(slice(0, place)), **options)
    cache.flush()
    if place < len(tokens):
        feed(cache, tokens, [1] * (len(tokens) - place), past=place)
        cache.flush()
    assert_same_state(cache, driven(tokens, **options))


@given(problems(), st.integers(1, 60))
def test_later_tokens_do_not_change_stored_ones(problem, place):
    """Causality: the records of a prefix are a prefix of the records."""
    tokens, options, _ = problem
    place = min(place, len(tokens))
    longer, shorter = driven(tokens, **options), driven(tokens.columns(slice(0, place)), **options)
    if shorter._ledger.compressed[0] == 0:
        return
    kept = row_records(longer, 0, 0)
    for name, held in row_records(shorter, 0, 0).items():
        if name.startswith("sink"):
            assert torch.equal(kept[name], held)
        elif not name.startswith(("tail", "pending")):
            assert torch.equal(kept[name][: len(held)], held), name


@given(problems())
def test_raw_tokens_are_as_many_as_promised(problem):
    tokens, options, chunks = problem
    cache = driven(tokens, chunks, **options)
    sinks, window, block = (options[name] for name in ("num_sink_tokens", "recent_window", "block_size"))
    beyond = len(tokens) - sinks - window
    compressed = max(0, beyond // block * block)
    state = cache.layers[0].state
    assert state.tail_keys.shape[2] == len(tokens) - (compressed + sinks if compressed else 0)
    assert state.store.residual_codes.shape[1] + state.store.reference_codes.shape[1] == compressed


@given(problems())
def test_sinks_and_window_are_read_back_bit_exact(problem):
    tokens, options, chunks = problem
    tokens_and_one = make_tokens(
        len(tokens) + 1, heads=tokens.keys.shape[2], head_dim=tokens.keys.shape[-1], batch=tokens.keys.shape[1]
    )
    cache = driven(tokens_and_one.columns(slice(0, len(tokens))), chunks, **options)
    compressed = cache._ledger.compressed[0]
    views = feed(cache, tokens_and_one, [1], past=len(tokens))
    raw = torch.ones(len(tokens) + 1, dtype=torch.bool)
    raw[options["num_sink_tokens"] : options["num_sink_tokens"] + compressed] = False
    for layer_idx, view in enumerate(views):
        for got, fed in zip(dense(view), (tokens_and_one.keys, tokens_and_one.values), strict=True):
            assert torch.equal(got[:, :, raw], fed[layer_idx][:, :, raw])


def stored_error_bound(levels: torch.Tensor, nbits: int) -> torch.Tensor:
    """Largest error of any number of a token: half a step, and what rounding scale and minimum to fp16 can add.

    levels `[batch, tokens, groups, 2]` -> `[batch, tokens]`.
    """
    scale, low = levels.float().unbind(-1)
    tiny, relative = 2.0**-24, 2.0**-11
    most = 2**nbits - 1
    bound = scale / 2 + low.abs() * relative + tiny + most * (scale * relative + tiny)
    return bound.amax(-1) * 1.01 + 1e-5


@pytest.mark.parametrize("nbits, reference_nbits", [(8, 8), (4, 8), (2, 4)])
@pytest.mark.parametrize("stride, growth, top_k", [(1, 0.0, 1), (4, 0.0, 1), (5, 0.3, 3)])
@pytest.mark.parametrize("heads, head_dim", SHAPES)
def test_compressed_tokens_are_read_back_within_half_a_step(
    nbits, reference_nbits, stride, growth, top_k, heads, head_dim
):
    """Of keys, an error is turned with the pair, so it may be sqrt(2) times as large."""
    tokens = make_tokens(90, heads=heads, head_dim=head_dim, batch=2)
    options = dict(nbits=nbits, reference_nbits=reference_nbits, reference_stride=stride, reference_growth=growth)
    cache = driven(tokens.columns(slice(0, 89)), **options, top_k=top_k)
    layer = cache.layers[0]
    compressed = cache._ledger.compressed[0]
    span = layer.compressor.lattice.span(0, compressed)
    bound = torch.empty(2, compressed)
    bound[:, span.reference_offsets] = stored_error_bound(layer.state.store.reference_levels, reference_nbits)
    bound[:, span.residual_offsets] = stored_error_bound(layer.state.store.residual_levels, nbits)
    keys, values = dense(feed(cache, tokens, [1], past=89)[0])
    columns = slice(TIGHT["num_sink_tokens"], TIGHT["num_sink_tokens"] + compressed)
    for got, fed, factor in ((keys, tokens.keys, 2**0.5), (values, tokens.values, 1.0)):
        error = (got - fed[0])[:, :, columns].abs().amax((1, 3))
        assert (error <= bound * factor).all()


def test_every_token_is_a_reference_with_stride_1():
    cache = driven(make_tokens(40), reference_stride=1)
    assert cache.layers[0].state.store.residual_codes.shape[1] == 0


def test_stored_keys_are_unrotated():
    """The same token at every position must become the same record: rotation would hide that they are equal."""
    tokens = make_tokens(40)
    first, second = tokens.keys[:, :, :, :1].chunk(2, dim=-1)
    cos, sin = (table[:, None, :, :4] for table in (tokens.cos, tokens.sin))
    tokens.keys[...] = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    tokens.values[...] = tokens.values[:, :, :, :1]
    store = driven(tokens, nbits=8, reference_stride=1).layers[0].state.store
    read = dequantize(store.reference_codes, store.reference_levels, 8)
    plain = torch.cat([tokens.keys[0, 0, :, 0].flatten(), tokens.values[0, 0, :, 0].flatten()])
    assert (read[0] - plain).abs().max() < 0.03


@pytest.mark.parametrize("tile", [1, 7, 16])
def test_tiles_of_the_encoder_leave_no_trace(monkeypatch, tile):
    tokens = make_tokens(90, batch=2)
    expected = driven(tokens, top_k=2)
    monkeypatch.setattr(coder.Coder, "encode_tile", tile)
    assert_same_state(driven(tokens, top_k=2), expected)


@pytest.mark.parametrize("scratch_bytes", [1, 2000, 4000])
@pytest.mark.parametrize("options", [{}, {"reference_growth": 0.5}, {"reference_stride": 1}], ids=str)
def test_tiles_of_the_decoder_leave_no_trace(monkeypatch, scratch_bytes, options):
    tokens = make_tokens(90, batch=2)
    expected = dense(feed(driven(tokens.columns(slice(0, 89)), **options), tokens, [1], past=89)[0])
    set_scratch_bytes(monkeypatch, scratch_bytes)
    got = dense(feed(driven(tokens.columns(slice(0, 89)), **options), tokens, [1], past=89)[0])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_chunks_give_the_state_of_one_call(dtype):
    tokens = make_tokens(70, batch=2, heads=3, head_dim=20)
    tokens = type(tokens)(*(getattr(tokens, name).to(dtype) for name in ("keys", "values", "cos", "sin")), None)
    assert_same_state(driven(tokens, [31, 5, 1, 1, 20, 12]), driven(tokens))
    assert_same_state(driven(tokens, [1] * 70), driven(tokens))


def test_values_may_have_another_head_dim():
    tokens = make_tokens(60, heads=2, head_dim=8)
    wide = make_tokens(60, heads=2, head_dim=20, seed=1)
    tokens = type(tokens)(tokens.keys, wide.values, tokens.cos, tokens.sin, None)
    cache = driven(tokens.columns(slice(0, 59)), nbits=8)
    keys, values = dense(feed(cache, tokens, [1], past=59)[0])
    assert keys.shape == (1, 2, 60, 8) and values.shape == (1, 2, 60, 20)
    assert (values - tokens.values[0]).abs().max() < 0.1 and (keys - tokens.keys[0]).abs().max() < 0.1


def test_scaled_rotation_tables_are_undone():
    """YaRN multiplies cos and sin by a factor; keys of the model carry it too."""
    tokens = make_tokens(60)
    tokens.cos.mul_(1.3), tokens.sin.mul_(1.3)
    cache = driven(tokens.columns(slice(0, 59)), nbits=8)
    keys, _ = dense(feed(cache, tokens, [1], past=59)[0])
    assert (keys - tokens.keys[0]).abs().max() < 0.1


def test_a_not_finite_token_does_not_spoil_its_neighbours():
    """A NaN reference is never nearest, so that the tokens behind it read back as before."""
    tokens, spoilt = make_tokens(60), make_tokens(60)
    spoilt.keys[0, 0, 0, 2 + 8] = torch.nan
    clean = driven(tokens).layers[0].state.store.reference_idx
    chosen = driven(spoilt).layers[0].state.store.reference_idx
    other = clean != 2
    assert torch.equal(chosen[other], clean[other])
    assert not (chosen == 2).any()


@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_behind_a_not_finite_one_are_read_back(top_k):
    tokens = make_tokens(60)
    spoilt = make_tokens(60)
    spoilt.keys[0, 0, 0, 2 + 8] = torch.inf
    cache = driven(spoilt.columns(slice(0, 59)), nbits=8, top_k=top_k)
    keys, values = dense(feed(cache, spoilt, [1], past=59)[0])
    others = torch.arange(60) != 2 + 8
    assert (keys - tokens.keys[0])[:, :, others].abs().max() < 0.1
    assert (values - tokens.values[0])[:, :, others].abs().max() < 0.1
    assert keys[0, 0, 10].isnan().any(), "a number that is not finite must not read back as a finite one"


def test_prompt_can_be_shorter_than_the_sinks():
    cache = driven(make_tokens(3), num_sink_tokens=5)
    assert cache.get_seq_length() == 3 and cache.layers[0].state.tail_keys.shape[2] == 3
    assert_same_tensors(row_records(cache, 0, 0), row_records(driven(make_tokens(3), [1, 2], num_sink_tokens=5), 0, 0))


def test_layers_that_are_handed_copies_of_the_tables_share_them():
    """As in a model that is split over devices."""
    tokens, model = make_tokens(40), tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    for start, stop in ((0, 30), (30, 31), (31, 40)):
        part = tokens.columns(slice(start, stop))
        cache._ledger.note_mask(None, outermost=True)
        for layer_idx, layer in enumerate(cache.layers):
            layer.receive_tables(part.cos.clone(), part.sin.clone())
            cache.update(part.keys[layer_idx].clone(), part.values[layer_idx].clone(), layer_idx)
    assert len(cache._registry.tables) == 1
    cache.flush()
    assert_same_state(cache, driven(tokens))


def test_layers_that_are_handed_other_tables_do_not_share_them():
    tokens, model = make_tokens(40), tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    cache._ledger.note_mask(None, outermost=True)
    for layer_idx, layer in enumerate(cache.layers):
        layer.receive_tables(tokens.cos[:, :, :] if layer_idx else -tokens.cos, tokens.sin)
        cache.update(tokens.keys[layer_idx].clone(), tokens.values[layer_idx].clone(), layer_idx)
    assert len(cache._registry.tables) == 2
