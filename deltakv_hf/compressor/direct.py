"""The training-free compressor: quantised residuals against decoded references (arXiv 2602.08005, "origin" form).

A token is `x = [K; V]`, all heads joined, keys un-rotated. Every token on the lattice is a reference and is quantised
by itself. Any other token is `x = mean of its nearest references, as decoded + residual`, and only the quantised
residual and the references' numbers are stored. Predicting from decoded references keeps quantisation errors of
references out of the tokens that use them. Every step treats a token by itself or in exact integers, so a token's
bytes do not depend on how the text was cut into calls or which rows stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import dispatch
from ..config import DeltaKVConfig
from ..errors import InvalidOptionError
from ..references import Lattice
from .coder import Pieces, ResidualCoder
from .store import TokenStore


@dataclass(frozen=True)
class DirectStore(TokenStore):
    """Packed tokens of one layer.

    Attributes:
        reference_codes: `[batch, num_references, width * reference_nbits / 8]` uint8.
        reference_levels: `[batch, num_references, groups, 2]` float16, scale and minimum of each group.
        residual_codes: `[batch, num_residuals, width * nbits / 8]` uint8.
        residual_levels: `[batch, num_residuals, groups, 2]` float16.
        reference_idx: `[batch, num_residuals, top_k]` int16 holding unsigned 16-bit numbers of the row's references.
    """

    reference_codes: torch.Tensor
    reference_levels: torch.Tensor
    residual_codes: torch.Tensor
    residual_levels: torch.Tensor
    reference_idx: torch.Tensor


class DirectCompressor(ResidualCoder):
    """Codes tokens of one layer without any trained or calibrated weight.

    Args:
        config: options of the cache.
        key_width, value_width: numbers of a token in K and in V, `num_key_value_heads * head_dim` each.
    """

    def __init__(self, config: DeltaKVConfig, key_width: int, value_width: int):
        self.config, self.top_k = config, config.top_k
        self.width = key_width + value_width
        self.lattice = Lattice(config.reference_stride, config.reference_growth)
        for name in ("nbits", "reference_nbits"):
            if self.width * getattr(config, name) % 8:
                raise InvalidOptionError(
                    f"`{name}` must pack the {self.width} numbers of a token into whole bytes, got "
                    f"{getattr(config, name)}: use 8."
                )
        # a scale never spans K and V, whose sizes differ
        common = math.gcd(key_width, value_width)
        self.group_size = max(d for d in range(1, min(config.group_size, common) + 1) if common % d == 0)

    def tensors(self) -> list[torch.Tensor]:
        """What the compressor itself holds: nothing."""
        return []

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> DirectStore:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""
        groups, config = self.width // self.group_size, self.config
        num_references = self.lattice.count(num_tokens)
        num_residuals = num_tokens - num_references

        def records(number: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(batch_size, number, *shape, dtype=dtype, device=device)

        return DirectStore(
            reference_codes=records(num_references, self.width * config.reference_nbits // 8, dtype=torch.uint8),
            reference_levels=records(num_references, groups, 2, dtype=torch.float16),
            residual_codes=records(num_residuals, self.width * config.nbits // 8, dtype=torch.uint8),
            residual_levels=records(num_residuals, groups, 2, dtype=torch.float16),
            reference_idx=records(num_residuals, config.top_k, dtype=torch.int16),
        )

    def code_references(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and levels."""
        return dispatch.quantize(tokens, self.config.reference_nbits, self.group_size)

    def read_references(self, codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """References as decoded."""
        return dispatch.dequantize(codes, levels, self.config.reference_nbits)

    def code_residuals(
        self, tokens: torch.Tensor, places: torch.Tensor, references: torch.Tensor, idx: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and levels."""
        left = tokens.index_select(1, places).sub_(dispatch.predict(references, idx))
        return dispatch.quantize(left, self.config.nbits, self.group_size)

    def references(self, store: DirectStore) -> torch.Tensor:
        """All references as decoded, `[batch, num_references, width]` float32."""
        return self.read_references(store.reference_codes, store.reference_levels)

    def decode(
        self, store: DirectStore, references: torch.Tensor, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads compressed tokens `start .. stop - 1` of every row, in pieces; see `Coder.decode`."""
        own = references[:, self.lattice.count(start) : self.lattice.count(stop)]

        def others(*residual: torch.Tensor) -> torch.Tensor:
            return dispatch.reconstruct(*residual, references, self.config.nbits, scratch)

        return store.read_in_pieces(self.lattice, start, stop, own, others)
