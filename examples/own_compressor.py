"""A compressor of your own, half of the principal components in eight bits: python examples/own_compressor.py [MODEL]

It is used, saved, shared and loaded like those of the package; what it loses is measured at the end.
"""

import sys
from dataclasses import dataclass

import torch

from deltakv_hf import DeltaKVCache, KVCompressor, dispatch
from deltakv_hf.calibration.capture import Observer
from deltakv_hf.compressor import TokenCoder, TokenStore
from deltakv_hf.compressor.base_model import describe_model
from deltakv_hf.evaluation.fidelity import measure_fidelity
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.texts import BUNDLED_TEXT


@dataclass(frozen=True)
class Codes(TokenStore):  # what is held of a layer's tokens
    codes: torch.Tensor  # `[batch, tokens, components]` uint8
    levels: torch.Tensor  # `[batch, tokens, components / 32, 2]` float16, scale and minimum


class PrincipalCoder(TokenCoder):
    def __init__(self, basis: torch.Tensor):  # `[1 + components, width]`: the mean, then directions
        self.basis, self.width = basis, basis.shape[1]

    def code_tokens(self, tokens: torch.Tensor) -> Codes:  # [K; V] of all heads, keys un-rotated
        components = (tokens - self.basis[0]).double() @ self.basis[1:].T.double()
        return Codes(*dispatch.quantize(components.float(), nbits=8, group_size=32))

    def read_tokens(self, store: Codes) -> torch.Tensor:
        return dispatch.dequantize(store.codes, store.levels, nbits=8) @ self.basis[1:] + self.basis[0]

    def tensors(self) -> list[torch.Tensor]:  # counted by `memory_report`
        return [self.basis]


KVCompressor.register("principal", lambda tensors, layer, idx, name: tensors[f"layers.{idx}.basis"], PrincipalCoder)


def fit(model, ids: torch.Tensor) -> KVCompressor:
    observer, tensors = Observer(model), {}
    layers = [{"widths": list(widths)} for widths in observer.widths.values()]
    for idx, (tokens,) in observer.read(ids).tokens.items():
        mean = tokens.mean(dim=0, keepdim=True)
        directions = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[: mean.shape[1] // 2]
        tensors[f"layers.{idx}.basis"] = torch.cat([mean, directions])
    return KVCompressor({"kind": "principal", "model": describe_model(model), "layers": layers}, tensors)


if __name__ == "__main__":
    model, tokenizer = load_by_name(sys.argv[1] if len(sys.argv) > 1 else "demo")
    ids = tokenizer(BUNDLED_TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    mine = fit(model, ids[:, :1024])
    caches = {"mine": lambda: DeltaKVCache(model, compressor=mine), "without any": lambda: DeltaKVCache(model)}
    for name, fidelity in measure_fidelity(model, [ids[0, 2048:3072]], caches, context=768).items():
        print(f"{name}: {fidelity.mean('compressed_share'):.1%} of dense, KL {fidelity.mean('kl'):.4f}")
