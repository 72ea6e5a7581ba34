"""Caches of others, as the evaluation measures them: what KIVI stores, and how bytes are counted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from transformers import LlamaConfig, QuantizedCache, StaticCache

from deltakv_hf import InvalidOptionError
from deltakv_hf.dispatch import dequantize, quantize
from deltakv_hf.evaluation import peers
from deltakv_hf.evaluation.kivi import KiviCache, KiviLayer
from deltakv_hf.evaluation.peers import PEERS, pick_peer, stored_share

GROUP, HEADS, WIDTH = 4, 2, 8


def round_trip(numbers, nbits):
    """Of groups along the last axis."""
    return dequantize(*quantize(numbers.contiguous(), nbits, GROUP), nbits) if numbers.numel() else numbers


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=6), nbits=st.sampled_from([2, 4]), times=st.integers(1, 3)
)
def test_kivi_reads_back_groups_of_tokens_and_of_channels_and_newer_tokens_as_they_came(chunks, nbits, times):
    layer, window = KiviLayer(nbits, GROUP, GROUP * times), GROUP * times
    keys, values = torch.randn(2, 2, HEADS, sum(chunks), WIDTH)
    for number, (new_keys, new_values) in enumerate(zip(keys.split(chunks, 2), values.split(chunks, 2), strict=True)):
        before = sum(chunks[:number])
        read_keys, read_values = layer.update(new_keys, new_values)
        old_keys, old_values = before // window * window, max(0, before - window)
        coded = round_trip(keys[:, :, :old_keys].transpose(2, 3), nbits).transpose(2, 3)
        assert torch.equal(read_keys, torch.cat([coded, keys[:, :, old_keys : before + chunks[number]]], 2))
        coded = round_trip(values[:, :, :old_values], nbits)
        assert torch.equal(read_values, torch.cat([coded, values[:, :, old_values : before + chunks[number]]], 2))
    assert layer.get_seq_length() == sum(chunks)


@pytest.mark.parametrize("nbits", [4, 2])
def test_bytes_of_kivi_are_its_codes_levels_and_raw_tokens(nbits):
    """Of 400 tokens all keys and 392 values are coded: so many bits a number, and 32 bits of levels for 8 numbers."""
    model = tiny_model("llama")
    cache = KiviCache(model.config, nbits, group_size=8, residual_length=8)
    model(prompt(1, 400), past_key_values=cache, logits_to_keep=1)
    bits = (400 + 392) * (nbits + 32 / 8) + 8 * 32
    assert stored_share(model, cache) == pytest.approx(bits / (2 * 400 * 32))
    assert cache.compressed_share == pytest.approx((nbits + 32 / 8) / 32)


def test_bytes_are_those_of_what_a_cache_holds_used_or_not():
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(prompt(1, 40), past_key_values=cache)
    assert stored_share(model, cache) == pytest.approx(50 / 40, rel=1e-2)


def test_tensors_made_of_others_are_counted_by_these():
    class Packed(torch.Tensor):
        """As quanto's are: what it shows is bigger than what it holds."""

        @staticmethod
        def __new__(cls, codes, levels):
            packed = torch.Tensor._make_wrapper_subclass(cls, (1000,), dtype=torch.float32)
            packed.codes, packed.levels = codes, levels
            return packed

        def __tensor_flatten__(self):
            return ["codes", "levels"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("is not computed with")

    codes, levels = torch.zeros(500, dtype=torch.uint8), torch.zeros(10)
    held = {"keys": Packed(codes, levels), "meta": (codes, {"levels": [levels]}, "name")}
    assert [t.data_ptr() for t in peers._plain_tensors(held)] == 2 * [codes.data_ptr(), levels.data_ptr()]


def test_a_copy_is_its_own_and_a_reset_forgets():
    model = tiny_model("llama")
    cache = KiviCache(model.config, group_size=8, residual_length=8)
    first = model(prompt(1, 70), past_key_values=cache).logits
    other = copy.deepcopy(cache)
    behind = [model(prompt(1, 5), past_key_values=each).logits for each in (cache, other)]
    assert torch.equal(*behind)
    cache.reset()
    assert cache.get_seq_length() == 0 and torch.equal(model(prompt(1, 70), past_key_values=cache).logits, first)


def test_a_quantized_cache_is_copied_without_its_tensors_which_cannot_be():
    class Packed:
        def __deepcopy__(self, memo):
            raise RuntimeError("as quanto's tensors do")

    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers = [SimpleNamespace(keys=Packed(), cumulative_length=3)]
    other = peers.copy_cache(cache)
    assert other.layers[0].keys is cache.layers[0].keys
    other.layers[0].keys, other.layers[0].cumulative_length = None, 4
    assert cache.layers[0].keys is not None and cache.layers[0].cumulative_length == 3


@pytest.mark.parametrize("call", ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_what_kivi_cannot_do_it_says(call):
    cache = KiviCache(tiny_model("llama").config, group_size=8, residual_length=8)
    with pytest.raises(NotImplementedError, match="KiviCache"):
        getattr(cache, call)(-1)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"nbits": 3}, "`nbits` must be 2 or 4, got 3"),
        ({"group_size": 0}, "`residual_length` must be a multiple"),
        ({"residual_length": 40}, "`residual_length` must be a multiple"),
        ({}, "`group_size` must divide the head dimension 8, got 32"),
    ],
)
def test_bad_options_of_kivi_are_named(options, named):
    with pytest.raises(InvalidOptionError, match=named):
        KiviCache(tiny_model("llama").config, **options)


def test_peers_are_picked_by_name():
    assert isinstance(pick_peer("kivi4").make(LlamaConfig()), KiviCache)
    with pytest.raises(InvalidOptionError, match="Did you mean `kivi4`"):
        pick_peer("kivy4")


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.module])
def test_a_peer_without_its_package_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    with pytest.raises(InvalidOptionError, match=f"pip install {PEERS[name].package}"):
        pick_peer(name)
