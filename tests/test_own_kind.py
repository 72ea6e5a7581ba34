"""A compressor from elsewhere: registered by its kind, it is used, cut, shared, saved and loaded like the package's."""

from dataclasses import dataclass

import pytest
import torch
from compressors import TIGHT_WINDOW, append
from helpers import prompt
from models import new_model, tiny_model

from deltakv_hf import CompressorError, DeltaKVCache, InvalidOptionError, JointEncodedCache, KVCompressor, dispatch
from deltakv_hf.calibration.capture import Observer
from deltakv_hf.compressor import TokenCoder, TokenStore
from deltakv_hf.compressor.base_model import describe_model
from deltakv_hf.compressor.kv_compressor import KINDS
from deltakv_hf.training import train


@dataclass(frozen=True)
class TurnedStore(TokenStore):
    codes: torch.Tensor
    levels: torch.Tensor


class TurnedCoder(TokenCoder):
    """Numbers of a turned token in eight bits."""

    encode_tile = 16

    def __init__(self, rotation):
        self.rotation, self.width = rotation, rotation.shape[0]

    def tensors(self):
        return [self.rotation]

    def code_tokens(self, tokens):
        turned = (tokens.double() @ self.rotation.double()).float()
        return TurnedStore(*dispatch.quantize(turned, 8, 8))

    def read_tokens(self, store):
        return dispatch.dequantize(store.codes, store.levels, 8) @ self.rotation.T


def read(tensors, layer, layer_idx, name):
    return tensors[f"layers.{layer_idx}.rotation"]


@pytest.fixture(autouse=True)
def registered():
    KVCompressor.register("turned", read, TurnedCoder)
    yield
    KINDS.pop("turned", None)


def turned(model):
    layers, tensors = [], {}
    for layer_idx, widths in Observer(model).widths.items():
        generator = torch.Generator().manual_seed(layer_idx)
        tensors[f"layers.{layer_idx}.rotation"] = torch.linalg.qr(torch.randn(2 * [sum(widths)], generator=generator))[
            0
        ]
        layers.append({"widths": list(widths)})
    return KVCompressor({"kind": "turned", "model": describe_model(model), "layers": layers}, tensors)


def test_a_cache_reads_back_what_it_was_given():
    model, ids = tiny_model("llama"), prompt(2, 90)
    dense, cache = DeltaKVCache(model), DeltaKVCache(model, compressor=turned(model), **TIGHT_WINDOW)
    for one in (dense, cache):
        model(ids, past_key_values=one)
    report = cache.memory_report()
    assert report.compressed_tokens > 100 and dense.memory_report().compressed_tokens == 0
    # 32 numbers of a byte, four groups of two float16: two layers
    assert report.parts["codes"] == 2 * report.compressed_tokens * (32 + 16)
    assert cache.compressor.bytes_per_token() == 2 * (32 + 16)
    assert report.compressor_bytes == 2 * 32 * 32 * 4
    for layer_idx in range(2):
        for got, expected in zip(cache.dequantize(layer_idx), dense.dequantize(layer_idx), strict=True):
            error = (got - expected).norm() / expected.norm()
            assert 0 < error < 0.01


def test_codes_do_not_depend_on_how_tokens_came():
    coder = turned(tiny_model("llama")).layer(0, 16, 16, torch.device("cpu"))
    tokens = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    whole = append(coder, tokens, [])
    for edges in ([1, 2, 33], [17], [49]):
        pieces = append(coder, tokens, edges)
        assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in whole.names())
    cut = coder.cut(whole, 20)
    assert torch.equal(cut.codes, whole.codes[:, :20]) and cut.codes.is_contiguous()


def test_it_comes_back_from_a_folder_and_so_does_a_cache(tmp_path):
    model, ids = tiny_model("llama"), prompt(1, 90)
    made = turned(model)
    made.save_pretrained(tmp_path / "turned")
    assert "turned" in (tmp_path / "turned" / "README.md").read_text(encoding="utf-8")
    loaded = KVCompressor.from_pretrained(tmp_path / "turned")
    assert loaded.fingerprint == made.fingerprint
    cache = DeltaKVCache(model, compressor=made, **TIGHT_WINDOW)
    model(ids, past_key_values=cache)
    cache.crop(-30)
    cache.save(tmp_path / "cache")
    again = DeltaKVCache.load(tmp_path / "cache", model, compressor=loaded)
    assert all(map(torch.equal, again.dequantize(1), cache.dequantize(1)))


def test_it_codes_blocks_that_rows_share():
    model, ids = tiny_model("llama"), prompt(1, 90).expand(3, -1)
    made = turned(model)
    cache, alone = JointEncodedCache(model, residual=made), JointEncodedCache(model, residual=made)
    model(ids, past_key_values=cache)
    model(ids[:1], past_key_values=alone)
    assert cache.num_blocks == alone.num_blocks > 0
    assert torch.equal(cache.dequantize(0)[0][2], alone.dequantize(0)[0][0])


def test_it_has_a_fixed_size():
    """Steps of a cache of fixed size decode any compressor."""
    model, ids = new_model("llama", "sdpa", 0), prompt(2, 60)
    how = {"max_new_tokens": 20, "do_sample": False, "disable_compile": True}
    made, outputs = turned(model), []
    for attention, size in (("sdpa", None), ("deltakv", 128)):
        model.set_attn_implementation(attention)
        cache = DeltaKVCache(model, compressor=made, max_cache_len=size, **TIGHT_WINDOW)
        outputs.append(model.generate(ids, past_key_values=cache, **how))
    assert torch.equal(*outputs)


def test_what_is_not_known_is_refused():
    model = tiny_model("llama")
    made = turned(model)
    KINDS.pop("turned")
    with pytest.raises(CompressorError, match=r"kind 'turned' in mine.*`KVCompressor.register`"):
        KVCompressor(made.config, made.tensors, "mine")
    for kind in ("transform", "learned"):
        with pytest.raises(InvalidOptionError, match=f"`kind` must be a name of your own, got '{kind}'"):
            KVCompressor.register(kind, read, TurnedCoder)
    with pytest.raises(InvalidOptionError, match="`compressor` must be of kind transform or learned, got 'turned'"):
        train(model, torch.zeros(8, 200, dtype=torch.int64), made)
    with pytest.raises(InvalidOptionError, match='`selection` must be "all" without a calibrated compressor'):
        DeltaKVCache(model, compressor=made, selection="coarse_to_fine")
