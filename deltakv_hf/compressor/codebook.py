"""Codebooks of one layer: which components of a token share a byte, and the 256 vectors that the byte chooses from."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import dispatch


@dataclass(frozen=True)
class Codebook:
    """Runs of groups of components, one byte a group; components outside of every run are not stored.

    Attributes:
        starts: first component of each run.
        vectors: of each run, `[groups, 256, size]` float32, integers up to `grid_limit(size)` times the group's step.
        steps: of each run, `[groups]` float32, widths of the grids.
        num_components: components of what is coded.
    """

    starts: list[int]
    vectors: list[torch.Tensor]
    steps: list[torch.Tensor]
    num_components: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a coded token."""
        return sum(len(step) for step in self.steps)

    @property
    def sizes(self) -> list[int]:
        """Components that share a byte, of each run."""
        return [run.shape[2] for run in self.vectors]

    @property
    def end(self) -> int:
        """Behind the last component that is stored."""
        ends = [start + run.shape[0] * run.shape[2] for start, run in zip(self.starts, self.vectors, strict=True)]
        return max(ends, default=0)

    def tables(self) -> list[torch.Tensor]:
        """The vectors as float32 integers on their grids."""
        return [(run / step[:, None, None]).round_() for run, step in zip(self.vectors, self.steps, strict=True)]

    def to(self, device: torch.device) -> Codebook:
        """The same on `device`."""
        parts = ([part.to(device) for part in held] for held in (self.vectors, self.steps))
        return Codebook(self.starts, *parts, self.num_components)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, num_components]` float32 -> `[batch, tokens, num_bytes]` uint8."""
        return dispatch.vector_quantize(x, self.starts, self.tables(), self.steps)

    def decode(self, codes: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, ..., num_bytes]` uint8 -> `[batch, ..., num_components]` float32."""
        return dispatch.vector_dequantize(codes, self.starts, self.vectors, self.num_components, scratch)

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        return [*self.vectors, *self.steps]
