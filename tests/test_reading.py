"""Attention without dense numbers gives what attention to the decoded tokens gives."""

import math
import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from compressors import TIGHT_WINDOW, compressor_of, random_compressor
from deltakv_hf.kernels.reference import attend, weigh
from families import BY_NAME
from helpers import TIGHT, left_padded, prompt, set_scratch_bytes
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import DeltaKVCache, dispatch, reading
from deltakv_hf.lazy import lazy_pair
from deltakv_hf.reading import StateReader

# rotations of every form, none, and every number of key-value heads
FORMS = "llama llama-mha llama-mqa llama-yarn phi3-partial smollm3 cohere glm4 granite gpt2".split()


@pytest.fixture
def attended(monkeypatch):
    """How often attention did without dense numbers; `attended.off` makes it decode."""
    original = StateReader.attend

    class Count:
        times = 0
        off = False

        def __call__(self, reader, *args):
            result = None if self.off else original(reader, *args)
            self.times += result is not None
            return result

    count = Count()
    monkeypatch.setattr(StateReader, "attend", lambda *args: count(*args))
    return count


@given(
    edges=st.lists(st.integers(1, 23), max_size=3, unique=True),
    heads=st.integers(1, 3),
    queries=st.integers(1, 3),
    seed=st.integers(0, 99),
    masked=st.booleans(),
)
def test_parts_merge_to_the_whole(edges, heads, queries, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (torch.randn(2, heads, n, 8, generator=generator) for n in (queries, 24, 24))
    mask = None
    if masked:
        # the first query may see nothing in some part
        mask = torch.zeros(2, 1, queries, 24)
        mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.5, -torch.inf)[..., -1] = 0
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.7)
    edges = [0, *sorted(edges), 24]
    for common in (False, True):
        if common:
            values = values[:, :1].expand(-1, heads, -1, -1)
            expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.7)
        parts = []
        for a, b in zip(edges, edges[1:], strict=False):
            scores, part = query @ keys[:, :, a:b].mT * 0.7, None if mask is None else mask[..., a:b]
            if common:
                parts.append(weigh(scores, values[:, 0, a:b], part))
            else:
                parts.append(attend(query, [(keys[:, :, a:b], values[:, :, a:b])], part, 0.7))
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        torch.testing.assert_close(merged.output, expected)


def test_a_query_that_sees_nothing_gets_zero():
    tokens = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 5)
    seen = attend(torch.ones(1, 1, 2, 4), [tokens], torch.full((2, 3), -torch.inf))
    assert torch.equal(seen.merge(seen).output, torch.zeros(1, 1, 2, 5)) and seen.log_total.isneginf().all()


def steps(model, inputs, lengths=(1, 1, 1, 1), crop=0, keep=None, make=random_compressor):
    """Logits of steps of `lengths` tokens behind a prompt, of which the last `crop` columns were forgotten."""
    cache = DeltaKVCache(model, compressor=make and compressor_of(model, make), **TIGHT_WINDOW)
    mask = inputs.get("attention_mask")
    model(**inputs, past_key_values=cache)
    assert cache.memory_report().compressed_tokens > 0
    if crop:
        cache.crop(-crop)
        mask = None if mask is None else mask[:, :-crop]
    if keep is not None:
        cache.batch_select_indices(torch.tensor(keep))
        mask = None if mask is None else mask[keep]
    logits, batch = [], inputs["input_ids"].shape[0] if keep is None else len(keep)
    for i, length in enumerate(lengths):
        if mask is not None:
            mask = F.pad(mask, (0, length), value=1)
        logits.append(model(prompt(batch, length, i), past_key_values=cache, attention_mask=mask).logits)
    return torch.cat(logits, dim=1)


def assert_same_without_dense_numbers(attended, run):
    got, times = run(), attended.times
    assert times > 0, "attention decoded everything"
    attended.off = True
    torch.testing.assert_close(got, run(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FORMS)
def test_logits_are_those_of_decoded_tokens(attended, family, padded):
    model = BY_NAME[family].model()
    inputs = left_padded([48, 31]) if padded else {"input_ids": prompt(2)}
    assert_same_without_dense_numbers(attended, lambda: steps(model, inputs))


@pytest.fixture
def fused(monkeypatch):
    """What a GPU does for a model in 16 bits, here in Triton's interpreter; counts its calls."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are on the GPU, these models are not: see test_gpu.py")
    calls, original = [], dispatch.reconstruct_and_attend
    monkeypatch.setattr(dispatch, "has_kernels", lambda device: True)
    monkeypatch.setattr(reading, "HALVES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(dispatch, "reconstruct_and_attend", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def assert_near(got, expected):
    """But for the rounding to 16 bits."""
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "phi3-partial", "cohere", "gpt2"])
def test_a_fused_read_gives_the_same_logits(attended, fused, family, padded):
    model = BY_NAME[family].model()
    inputs = left_padded([48, 31]) if padded else {"input_ids": prompt(2)}
    got = steps(model, inputs, (1, 1))
    # of two layers the second has no references, which are read apart
    assert 2 * len(fused) == 3 * attended.times > 0
    attended.off = True
    assert_near(got, steps(model, inputs, (1, 1)))


@pytest.mark.parametrize("options", [dict(crop=19), dict(keep=[1, 1, 0])], ids=str)
def test_a_fused_read_after_what_happened_before(attended, fused, options):
    inputs = left_padded([60, 25], 1)
    got = steps(tiny_model("llama"), inputs, (1, 2), **options)
    assert fused
    attended.off = True
    expected = steps(tiny_model("llama"), inputs, (1, 2), **options)
    assert_near(got, expected)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("options", [dict(crop=19), dict(keep=[1, 1, 0]), dict(keep=[1])], ids=str)
def test_what_happened_to_the_cache_before_does_not_matter(attended, options, padded):
    model = tiny_model("llama")
    inputs = left_padded([60, 25], 1) if padded else {"input_ids": prompt(2, 60)}
    assert_same_without_dense_numbers(attended, lambda: steps(model, inputs, **options))


@pytest.mark.parametrize("make", [random_compressor, None], ids=["components", "direct"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "phi3-partial", "gpt2"])
def test_many_queries_read_a_long_past_in_parts(attended, monkeypatch, family, padded, make):
    """Of a chunk of a prompt, of more than one tile, more queries than one scores at once."""
    monkeypatch.setattr(reading, "DENSE_BYTES", 0)
    monkeypatch.setattr(import_module("deltakv_hf.kernels.reference.attend"), "MOST_SCORES", 1000)
    set_scratch_bytes(monkeypatch, 4096)
    model = BY_NAME[family].model()
    inputs = left_padded([48, 31]) if padded else {"input_ids": prompt(2)}
    assert_same_without_dense_numbers(attended, lambda: steps(model, inputs, (24, 1, 19), make=make))


@pytest.mark.parametrize("size", [1, 4096, 20000])
def test_tiles_of_any_size_give_the_same(attended, monkeypatch, size):
    set_scratch_bytes(monkeypatch, size)
    model = tiny_model("llama")
    assert_same_without_dense_numbers(attended, lambda: steps(model, left_padded([60, 41])))


def view_of(attended, query_length=1):
    """What layer 0 hands out for a step, and a query for it; `attended` counts from here."""
    model, batch = tiny_model("llama"), 2
    cache = DeltaKVCache(model, compressor=compressor_of(model), **TIGHT_WINDOW)
    model(prompt(batch, 60), past_key_values=cache)
    handed = {}
    layer = cache.layers[0]
    original = layer.update

    def update(*args, **kwargs):
        handed["view"] = original(*args, **kwargs)
        return handed["view"]

    layer.update = update
    model(prompt(batch, query_length), past_key_values=cache)
    keys, values = handed["view"]
    # a pair that nobody has read yet
    keys, values = lazy_pair(layer._reader(layer.state, layer.ledger.layout), keys.shape, values.shape, *handed["view"])
    heads, width, attended.times = model.config.num_attention_heads, keys.shape[-1], 0
    return torch.randn(batch, heads, query_length, width, generator=torch.Generator().manual_seed(0)), keys, values


MASKS = {
    "none": lambda columns: None,
    "bool": lambda columns: torch.rand(2, 1, 1, columns, generator=torch.Generator().manual_seed(1)) < 0.5,
    "heads": lambda columns: torch.rand(2, 4, 1, columns, generator=torch.Generator().manual_seed(1)) * -5,
    "one-row": lambda columns: torch.zeros(1, 1, 1, columns).index_fill(3, torch.arange(0, columns, 3), -torch.inf),
    "flat": lambda columns: torch.arange(columns)[None] % 3 > 0,
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_form(attended, mask):
    query, keys, values = view_of(attended)
    mask = MASKS[mask](keys.shape[2])
    got = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    assert attended.times == 1
    dense = keys.materialize(), values.materialize()
    torch.testing.assert_close(
        got, F.scaled_dot_product_attention(query, *dense, attn_mask=mask, enable_gqa=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("query_length", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_groups(attended, query_length, dtype):
    """As the host packs them: heads of a group stand as queries of their key-value head."""
    query, keys, values = view_of(attended)
    query = query.view(2, keys.shape[1], -1, keys.shape[-1]).to(dtype)
    got = F.scaled_dot_product_attention(query, keys, values)
    assert got.dtype == dtype and attended.times == 1
    dense = keys.materialize(), values.materialize()
    expected = F.scaled_dot_product_attention(query.float(), *dense)
    torch.testing.assert_close(got.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


REFUSED = {
    "causal": dict(is_causal=True),
    "dropout": dict(dropout_p=1e-9),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_needs_dense_numbers_gets_them(attended, options):
    query, keys, values = view_of(attended)
    F.scaled_dot_product_attention(query, keys, values, enable_gqa=True, **REFUSED[options])
    assert attended.times == 0


def test_a_query_with_gradient_gets_dense_numbers(attended):
    query, keys, values = view_of(attended)
    with torch.enable_grad():
        F.scaled_dot_product_attention(query.requires_grad_(), keys, values, enable_gqa=True).sum().backward()
    assert attended.times == 0 and query.grad.isfinite().all()


def test_many_queries_get_dense_numbers(attended):
    query, keys, values = view_of(attended, 8)
    F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert attended.times == 0


def test_keys_and_values_must_be_those_of_one_layer(attended):
    query, keys, _ = view_of(attended)
    got, dense = F.scaled_dot_product_attention(query, keys, keys, enable_gqa=True), keys.materialize()
    assert attended.times == 0
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, dense, dense, enable_gqa=True))


def test_a_second_reader_of_the_same_keys_has_them_decoded(attended, monkeypatch):
    """Layers that share keys and values: decoded once, not once for each."""
    query, keys, values = view_of(attended)
    decodes = []
    original = StateReader.decode
    monkeypatch.setattr(StateReader, "decode", lambda reader: decodes.append(reader) or original(reader))
    results = [F.scaled_dot_product_attention(query, keys, values, enable_gqa=True) for _ in range(3)]
    assert attended.times == 1 and len(decodes) == 1
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)


def test_without_components_tokens_are_decoded(attended):
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(), past_key_values=cache)
    model(prompt(1, 1), past_key_values=cache)
    assert attended.times == 0


def test_scale_is_that_of_the_width_unless_given(attended):
    query, keys, values = view_of(attended)
    got = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    _, keys, values = view_of(attended)
    given_scale = F.scaled_dot_product_attention(
        query, keys, values, enable_gqa=True, scale=1 / math.sqrt(query.shape[-1])
    )
    assert attended.times == 1
    assert torch.equal(got, given_scale)
