"""Where references are placed: a lattice that is a function of a token's own position and of nothing else."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import torch

from .errors import CacheStateError
from .hf_compat import upload

MAX_REFERENCES = 2**16


@dataclass(frozen=True)
class Span:
    """A run of compressed tokens `start .. stop - 1` of a row, split into references and others.

    Attributes:
        reference_offsets: int64 `[n_ref]`, offsets from `start` of the tokens that are references.
        residual_offsets: int64 `[n_res]`, offsets from `start` of all other tokens.
        num_visible: int64 `[n_res]`, how many references of the row stand before each of those.
    """

    reference_offsets: torch.Tensor
    residual_offsets: torch.Tensor
    num_visible: torch.Tensor


@dataclass(frozen=True)
class Lattice:
    """Positions of references among the compressed tokens of a row: 0, then `stride + int(growth * p)` after `p`.

    With `growth > 0` the number of references grows like the logarithm of the length (the paper's growing stride).
    """

    stride: int
    growth: float = 0.0

    def count(self, num_tokens: int) -> int:
        """Number of references among the first `num_tokens` compressed tokens."""
        if self.growth == 0:
            return -(-num_tokens // self.stride)
        positions = _growing_positions(self.stride, self.growth, _round_up(num_tokens))
        return bisect_left(positions, num_tokens)

    @property
    def is_everywhere(self) -> bool:
        """Whether every token is a reference."""
        return self.stride == 1 and self.growth == 0

    def span(self, start: int, stop: int, device: torch.device | str = "cpu") -> Span:
        """Splits tokens `start .. stop - 1`; the index tensors are on `device`."""
        return _span(self, start, stop, torch.device(device))

    def is_regular(self, start: int, stop: int) -> bool:
        """Whether `start .. stop - 1` is whole strides, each beginning with its reference."""
        return self.growth == 0 and start % self.stride == 0 and stop % self.stride == 0


def _round_up(n: int) -> int:
    # few distinct lengths, so that the cache of position lists is hit
    return 1 << max(n, 1024).bit_length()


@lru_cache(maxsize=8)
def _growing_positions(stride: int, growth: float, limit: int) -> list[int]:
    positions, p = [], 0
    while p < limit:
        positions.append(p)
        p += stride + int(growth * p)
    return positions


@lru_cache(maxsize=16)
def _span(lattice: Lattice, start: int, stop: int, device: torch.device) -> Span:
    if lattice.growth == 0:
        return _regular_span(lattice, start, stop, device)
    offsets = torch.arange(stop - start)
    positions = torch.tensor(_growing_positions(lattice.stride, lattice.growth, _round_up(stop)))
    is_reference = torch.isin(offsets + start, positions)
    num_before = is_reference.cumsum(0) - is_reference.long() + lattice.count(start)
    parts = offsets[is_reference], offsets[~is_reference], num_before[~is_reference]
    return Span(*(upload(part, device) for part in parts))


def _regular_span(lattice: Lattice, start: int, stop: int, device: torch.device) -> Span:
    """The same without growth, made on the device: an upload costs more than the arithmetic."""
    first, last, stride = lattice.count(start), lattice.count(stop), lattice.stride
    references = torch.arange(first, last, device=device) * stride - start
    residual = torch.arange(start - first, stop - last, device=device)
    # all residuals but the first `stride - 1` stand behind one more reference
    num_visible = residual // max(stride - 1, 1) + 1
    return Span(references, residual + num_visible - start, num_visible)


def check_num_references(lattice: Lattice, num_tokens: int) -> None:
    """Raises if `num_tokens` compressed tokens of a row have more references than 16 bits can number."""
    if lattice.is_everywhere:
        # all are references, and none has a number
        return
    if lattice.count(num_tokens) > MAX_REFERENCES:
        raise CacheStateError(
            f"a row must have at most {MAX_REFERENCES} references (their numbers are 16 bits), got "
            f"{lattice.count(num_tokens)} for {num_tokens} compressed tokens: raise `reference_stride` or "
            "`reference_growth`, or take a compressor that was made with a larger `reference_stride`, or with 1."
        )
