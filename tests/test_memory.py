"""Bytes reported are bytes held, and bytes freed are freed."""

import copy

import pytest
import torch
from helpers import (
    LOSSLESS,
    TIGHT,
    StorageTracker,
    driven,
    feed,
    full_cache,
    greedy,
    held_storages,
    left_padded,
    make_tokens,
    prompt,
    rope_tables,
    set_scratch_bytes,
)
from models import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from deltakv_hf import DeltaKVCache
from deltakv_hf.compressor import coder


def assert_reported(cache):
    held = held_storages(cache)
    assert cache.memory_report().stored_bytes == sum(held.values()), held


def crop(model, cache, inputs):
    cache.crop(-2)


def crop_deep(model, cache, inputs):
    cache.flush()
    cache.crop(-7)


def decode(model, cache, inputs):
    greedy(model, inputs, cache)


def reorder(model, cache, inputs):
    cache.reorder_cache(torch.tensor([2, 0, 0]))


def select(model, cache, inputs):
    cache.batch_select_indices(torch.tensor([1]))


def repeat(model, cache, inputs):
    cache.batch_repeat_interleave(2)


def prefill(model, cache, inputs):
    pass


def flush(model, cache, inputs):
    cache.flush()


def reset(model, cache, inputs):
    cache.reset()


def beams(model, cache, inputs):
    cache.reset()
    greedy(model, inputs, cache, num_beams=2)


STAGES = [prefill, decode, flush, crop, crop_deep, reorder, select, repeat, beams, reset]
PROMPTS = {"even": {"input_ids": prompt(3, 60)}, "ragged": left_padded([60, 44, 20]), "short": left_padded([4, 3, 2])}


@pytest.mark.parametrize("prompt_kind", PROMPTS)
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_reported_bytes_are_held_bytes(stage, prompt_kind):
    if stage is crop_deep and prompt_kind == "short":
        pytest.skip("nothing to go back to")
    model, inputs = tiny_model("llama"), dict(PROMPTS[prompt_kind])
    cache = DeltaKVCache(model, **TIGHT)
    if stage is not decode:
        model(**inputs, past_key_values=cache)
    stage(model, cache, inputs)
    assert_reported(cache)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["gemma3", "mistral-sliding", "smollm3", "cohere2", "gpt2", "phi3-partial"])
def test_reported_bytes_are_held_bytes_in_every_kind_of_layer(family, padded):
    model = tiny_model(family)
    cache = DeltaKVCache(model, **TIGHT)
    greedy(model, left_padded([60, 41]) if padded else prompt(2, 60), cache)
    assert_reported(cache)


def test_reported_bytes_are_held_bytes_after_every_step():
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    inputs = left_padded([30, 20])
    model(**inputs, past_key_values=cache)
    for i in range(12):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, i + 1), value=1)
        model(prompt(2, 1, seed=i), attention_mask=mask, past_key_values=cache)
        assert_reported(cache)


def test_reported_bytes_of_a_bare_config_are_held_bytes():
    model = tiny_model("llama")
    cache = DeltaKVCache(model.config, **TIGHT)
    model(prompt(1, 200), past_key_values=cache)
    assert_reported(cache)


def test_reported_bytes_of_a_copy_are_held_bytes():
    cache = driven(make_tokens(60, batch=2))
    other = copy.deepcopy(cache)
    assert_reported(other)
    assert other.memory_report() == cache.memory_report()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral-sliding", "gpt2"])
@pytest.mark.parametrize("length", [5, 60])
def test_dense_bytes_are_those_of_the_full_cache(family, length):
    model = tiny_model(family)
    cache, dense = DeltaKVCache(model, **TIGHT), full_cache(model)
    for each in (cache, dense):
        model(prompt(2, length), past_key_values=each)
        model(prompt(2, 1), past_key_values=each)
    # a sliding layer of the host holds more than its window: a view of a longer tensor
    assert cache.memory_report().dense_bytes == sum(held_storages(dense).values())


@pytest.mark.parametrize("lengths", [[5], [60], [60, 1], [60, 3, 1]], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_report_counts_every_token_seen(lengths, padded):
    """Also those of the last short call, which wait to be sorted in."""
    total = sum(lengths)
    mask = torch.ones(2, total, dtype=torch.long)
    mask[0, :2] = 0
    cache = driven(make_tokens(total, batch=2, mask=mask if padded else None), lengths, flush=False)
    assert cache.memory_report().tokens == 2 * total - (2 if padded else 0)


def test_report_counts_tokens_without_padding():
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    model(**left_padded([60, 44, 20]), past_key_values=cache)
    report = cache.memory_report()
    assert (report.columns, report.tokens) == (60, 124)
    # whole blocks of 4 beyond 2 sinks and a window of 8
    assert report.compressed_tokens == 48 + 32 + 8


def test_report_is_a_table():
    cache = driven(make_tokens(60))
    lines = str(cache.memory_report()).splitlines()
    assert "60 tokens" in lines[0] and "48" in lines[0]
    for name in ("sinks", "recent window", "references", "residual codes", "stored", "dense"):
        assert any(line.startswith(name) and "MiB" in line and "%" in line for line in lines), name
    assert len({line.index("MiB") for line in lines[1:]}) == 1, "columns are aligned"


def test_report_of_an_empty_cache():
    report = DeltaKVCache(tiny_model("llama")).memory_report()
    assert (report.stored_bytes, report.dense_bytes, report.ratio, report.tokens) == (0, 0, 0.0, 0)
    assert "0 tokens" in str(report)


def test_ratio_is_stored_over_dense():
    report = driven(make_tokens(200)).memory_report()
    assert report.ratio == report.stored_bytes / report.dense_bytes < 1
    assert sum(report.parts.values()) == report.stored_bytes


@pytest.mark.parametrize("lengths", [[60], [3], [60, 1], [60, 3, 1], [3, 60]], ids=str)
@pytest.mark.parametrize("options", [TIGHT, LOSSLESS], ids=["compressed", "lossless"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_the_models_own_tensors_are_let_go(lengths, options, padded):
    """Slices of a fused projection would keep all of it alive: what is held is a copy of exactly what is needed."""
    total = sum(lengths)
    mask = None
    if padded:
        mask = torch.ones(2, total, dtype=torch.long)
        mask[0, 0] = 0
    tokens = make_tokens(total, batch=2, mask=mask)
    cache = DeltaKVCache(tiny_model("llama"), **options)
    past, given = 0, []
    for length in lengths:
        part = tokens.columns(slice(past, past + length))
        past += length
        cache._ledger.note_mask(None if mask is None else mask[:, :past].clone(), outermost=True)
        for layer_idx, layer in enumerate(cache.layers):
            qkv = torch.cat([part.keys[layer_idx], part.values[layer_idx], part.keys[layer_idx]], dim=1)
            given.append(StorageWeakRef(qkv.untyped_storage()))
            cos, sin = part.cos.clone(), part.sin.clone()
            given += [StorageWeakRef(table.untyped_storage()) for table in (cos, sin)]
            layer.receive_tables(cos, sin)
            cache.update(qkv[:, :2], qkv[:, 2:4], layer_idx)
            del qkv, cos, sin
    assert all(reference.expired() for reference in given)


def test_window_shrinks_when_it_is_compressed():
    """No view of the prompt is left: raw parts hold as many bytes as they have numbers."""
    state = driven(make_tokens(300)).layers[0].state
    for part in (state.tail_keys, state.tail_values, state.sink_keys, state.sink_values):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_peak_of_a_long_prefill(monkeypatch):
    """While layer after layer comes, alive are: what finished layers store, two dense layers, and tiles of work."""
    monkeypatch.setattr(coder.Coder, "encode_tile", 128)
    num_layers, length, heads, head_dim = 4, 2048, 4, 32
    dense = 2 * heads * length * head_dim * 4
    work = dense // 4
    cache = DeltaKVCache(tiny_model("llama-4-layers"), num_sink_tokens=4, recent_window=64)
    cos, sin = rope_tables(torch.arange(length)[None], head_dim)
    cache._ledger.note_mask(None, outermost=True)
    finished = 0
    for layer_idx, layer in enumerate(cache.layers):
        with StorageTracker() as tracker:
            keys, values = torch.randn(1, heads, length, head_dim), torch.randn(1, heads, length, head_dim)
            layer.receive_tables(cos, sin)
            view = cache.update(keys, values, layer_idx)
            del keys, values, view
        # what earlier layers hold was made under earlier trackers
        assert tracker.peak <= 2 * dense + work, (layer_idx, tracker.peak / dense)
        held = sum(held_storages(cache).values())
        assert held - finished <= 0.5 * dense, "the dense copy is gone before the next layer comes"
        finished = held
    assert num_layers == len(cache.layers)


def test_peak_of_a_long_prefill_in_a_model(monkeypatch):
    """Through a model, the full cache's own prefill needs more: a dense layer is gone before the next one's exists."""
    monkeypatch.setattr(coder.Coder, "encode_tile", 128)
    model = tiny_model("llama-4-layers")
    peaks = []
    for cache in (full_cache(model), DeltaKVCache(model)):
        with StorageTracker() as tracker:
            model(prompt(1, 2048), past_key_values=cache, logits_to_keep=1)
        peaks.append(tracker.peak)
    assert peaks[1] < peaks[0] + 2 * 2 * 2048 * 2 * 8 * 4


def test_peak_of_a_decode_step(monkeypatch):
    """One dense layer, and scratch of a bounded size."""
    set_scratch_bytes(monkeypatch, 2**16)
    model = tiny_model("llama-4-layers")
    cache = DeltaKVCache(model, recent_window=64)
    model(prompt(1, 2048), past_key_values=cache, logits_to_keep=1)
    dense = 2 * 2048 * 2 * 8 * 4
    with StorageTracker() as tracker:
        model(prompt(1, 1), past_key_values=cache)
    # the attention's own copy of repeated heads is up to twice as large as keys and values
    assert tracker.peak <= 3.5 * dense + 2**18, tracker.peak / dense


def test_memory_does_not_grow_with_flushes():
    """Token by token or at once, the same bytes are held."""
    tokens = make_tokens(300)
    slow, fast = driven(tokens, [1] * 300), driven(tokens)
    assert slow.memory_report().stored_bytes == fast.memory_report().stored_bytes


def test_an_old_view_does_not_stay_in_the_cache():
    tokens = make_tokens(60)
    cache = driven(tokens.columns(slice(0, 59)))
    views = feed(cache, tokens, [1], past=59)
    for keys, values in views:
        keys + 0, values + 0
    before = sum(held_storages(cache).values())
    del views, keys, values
    assert sum(held_storages(cache).values()) == before


@pytest.mark.parametrize("lengths", [[60], [60, 41]])
def test_the_share_of_compressed_tokens_is_that_of_their_bytes(lengths):
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    assert cache.memory_report().compressed_share == 0
    model(**left_padded(lengths), past_key_values=cache)
    report = cache.memory_report()
    # keys and values of 2 layers, 2 heads of 8, float32
    assert report.compressed_dense_bytes == report.compressed_tokens * 2 * 2 * 2 * 8 * 4 > 0
    held = sum(report.parts[part] for part in ("references", "residual codes", "residual levels", "reference ids"))
    assert report.compressed_share == held / report.compressed_dense_bytes
    if len(lengths) == 1:
        # a whole number of strides: what a token takes on average
        assert report.compressed_tokens % TIGHT["reference_stride"] == 0
        layer = cache.layers[0]
        assert report.compressed_share == pytest.approx(layer.compressor.bytes_per_token() / (2 * 2 * 8 * 4))
