"""Lazy keys and values: metadata for free, numbers decoded once, both gone with the layer."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.functional as F
import transformers.integrations.flex_attention as host_flex
from helpers import TIGHT, driven, feed, full_cache, left_padded, make_tokens, prompt
from models import new_model, tiny_model

from deltakv_hf import DeltaKVCache
from deltakv_hf.layer import DeltaKVLayer
from deltakv_hf.lazy import LazyStates
from deltakv_hf.reading import StateReader


@pytest.fixture
def decodes(monkeypatch):
    """Decoded layers, each with weak references to its dense tensors and to the dense ones alive before it."""
    calls = []
    original, make_reader = StateReader.decode, DeltaKVLayer._reader

    def reader(layer, *args):
        made = make_reader(layer, *args)
        object.__setattr__(made, "layer_idx", layer.layer_idx)
        return made

    monkeypatch.setattr(DeltaKVLayer, "_reader", reader)

    def decode(self):
        alive = [call for call in calls if any(ref() is not None for ref in call["dense"])]
        pair = original(self)
        # keys and values may be views of one tensor; that is what must die
        dense = [weakref.ref(t) for t in pair] + [weakref.ref(t._base) for t in pair if t._base is not None]
        calls.append({"layer": self.layer_idx, "dense": dense, "alive": [call["layer"] for call in alive]})
        return pair

    monkeypatch.setattr(StateReader, "decode", decode)
    return calls


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """Flex attention without the minutes that its C++ compiler takes; it still goes through dynamo."""

    def plain(query, key, value, training=False, **kwargs):
        return torch_flex.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(host_flex, "compile_friendly_flex_attention", plain)


def lazy_views():
    tokens = make_tokens(60, batch=2)
    return feed(driven(tokens.columns(slice(0, 59))), tokens, [1], past=59)


METADATA = {
    "shape": lambda x: x.shape == (2, 2, 60, 8),
    "size": lambda x: x.size() == (2, 2, 60, 8) and x.size(-2) == 60,
    "dtype": lambda x: x.dtype == torch.float32,
    "device": lambda x: x.device == torch.device("cpu"),
    "ndim": lambda x: x.ndim == 4 and x.dim() == 4,
    "numel": lambda x: x.numel() == 2 * 2 * 60 * 8,
    "element_size": lambda x: x.element_size() == 4,
    "requires_grad": lambda x: not x.requires_grad,
    "is_floating_point": lambda x: x.is_floating_point(),
    "repr": lambda x: "60" in repr(x),
    "is_tensor": lambda x: torch.is_tensor(x) and isinstance(x, torch.Tensor),
    "is_cuda": lambda x: not x.is_cuda,
}


@pytest.mark.parametrize("ask", METADATA)
def test_metadata_is_free(decodes, ask):
    for view in lazy_views():
        for states in view:
            assert METADATA[ask](states)
    assert decodes == []


def test_a_step_returns_lazy_tensors():
    assert all(isinstance(states, LazyStates) for view in lazy_views() for states in view)


def test_both_are_decoded_once(decodes):
    keys, values = lazy_views()[0]
    for _ in range(3):
        keys + 0, values + 0, keys.transpose(1, 2), torch.matmul(values, values.mT)
    assert [call["layer"] for call in decodes] == [0]


OPERATIONS = {
    "matmul": lambda q, k, v: torch.matmul(q, k.transpose(2, 3)),
    "@": lambda q, k, v: q @ k.mT,
    "transpose": lambda q, k, v: k.transpose(1, 2),
    "contiguous": lambda q, k, v: v.contiguous(),
    "expand-reshape": lambda q, k, v: k[:, :, None].expand(2, 2, 3, 60, 8).reshape(2, 6, 60, 8),
    "repeat_interleave": lambda q, k, v: v.repeat_interleave(2, dim=1),
    "index": lambda q, k, v: k[:, :, -5:, ::2],
    "index-tensor": lambda q, k, v: k[torch.tensor([1, 0])],
    "to-dtype": lambda q, k, v: v.to(torch.float16),
    "to-same": lambda q, k, v: v.to("cpu"),
    "cat": lambda q, k, v: torch.cat([k, v, q], dim=2),
    "stack": lambda q, k, v: torch.stack([k, v]),
    "+": lambda q, k, v: k + v,
    "radd": lambda q, k, v: 1 - k,
    "einsum": lambda q, k, v: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "sdpa-keywords": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False),
    "sdpa-mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(1, 60, dtype=bool)),
    "split": lambda q, k, v: torch.cat(k.split(20, dim=2)[::-1], dim=2),
    "where": lambda q, k, v: torch.where(k > 0, k, v),
    "T": lambda q, k, v: k[0, 0].T,
    "numpy": lambda q, k, v: torch.from_numpy(k.numpy().copy()),
    "clone": lambda q, k, v: k.clone(),
    "detach": lambda q, k, v: k.detach(),
    "deepcopy": lambda q, k, v: copy.deepcopy(k),
    "iteration": lambda q, k, v: torch.stack([row for row in k]),
    "out": lambda q, k, v: torch.add(k, v, out=torch.empty(2, 2, 60, 8)),
    "stride": lambda q, k, v: torch.as_strided(k.contiguous(), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_see_the_dense_tensor(operation):
    keys, values = lazy_views()[0]
    dense = keys.materialize(), values.materialize()
    query = torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    got, expected = OPERATIONS[operation](query, keys, values), OPERATIONS[operation](query, *dense)
    assert type(got) is torch.Tensor
    assert torch.equal(got, expected)


def test_the_pair_dies_with_its_last_user(decodes):
    views = lazy_views()
    views[0][0] + 0
    del views
    assert all(ref() is None for call in decodes for ref in call["dense"])


def test_an_untouched_pair_holds_nothing_after_the_layer():
    """What waits to be decoded is the stored state itself, never a copy."""
    cache = driven(make_tokens(60).columns(slice(0, 59)))
    feed(cache, make_tokens(60), [1], past=59)
    sealed = weakref.ref(cache.layers[0].state.tail_keys)
    cache.reset()
    assert sealed() is None


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama-4-layers", "llama-mha"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_at_most_one_dense_layer_is_alive(decodes, uncompiled_flex, attention, family, padded):
    model = new_model(family, attention)
    inputs = left_padded([60, 41]) if padded else {"input_ids": prompt(2, 60)}
    cache = DeltaKVCache(model, **TIGHT)
    model(**inputs, past_key_values=cache)
    assert decodes == [], "a prompt's attention is exact and needs no decoding"
    for i in range(3):
        if padded:
            inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
        model(prompt(2, 1, seed=i), past_key_values=cache, **{k: v for k, v in inputs.items() if k != "input_ids"})
        if attention == "flex_attention" and i == 0:
            # dynamo's first trace keeps its example inputs until its garbage is collected
            gc.collect()
    num_layers = model.config.num_hidden_layers
    assert [call["layer"] for call in decodes] == list(range(num_layers)) * 3, "decoded once per layer per forward"
    steady = decodes[num_layers:] if attention == "flex_attention" else decodes
    assert all(call["alive"] == [] for call in steady)
    assert all(ref() is None for ref in decodes[-1]["dense"])


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_flex_attention_gives_the_logits_of_sdpa(uncompiled_flex, padded):
    logits = []
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model("llama", attention)
        inputs = left_padded([60, 41]) if padded else {"input_ids": prompt(2, 60)}
        cache = DeltaKVCache(model, **TIGHT)
        model(**inputs, past_key_values=cache)
        mask = {"attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1)} if padded else {}
        logits.append(model(prompt(2, 1), past_key_values=cache, **mask).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_a_view_taken_before_a_flush_is_of_that_time():
    """A long call compresses its own tokens after its view is made: the call itself attends to them raw."""
    tokens = make_tokens(60)
    cache = DeltaKVCache(tiny_model("llama"), **TIGHT)
    feed(cache, tokens.columns(slice(0, 20)), [20])
    keys, values = feed(cache, tokens, [40], past=20)[0]
    assert torch.equal(keys[:, :, 20:], tokens.keys[0][:, :, 20:])
    assert torch.equal(values[:, :, 20:], tokens.values[0][:, :, 20:])


def test_the_first_call_returns_what_it_was_given():
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    tokens = make_tokens(60)
    keys, values = feed(cache, tokens, [60])[0]
    assert type(keys) is torch.Tensor and torch.equal(keys, tokens.keys[0]) and torch.equal(values, tokens.values[0])


def test_full_cache_is_not_touched():
    model = tiny_model("llama")
    cache = full_cache(model)
    model(prompt(), past_key_values=cache)
    assert all(type(layer.keys) is torch.Tensor for layer in cache.layers)
