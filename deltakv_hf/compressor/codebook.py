"""Codebooks of one layer: which components of a token share a byte, and the 256 vectors that the byte chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .. import dispatch


@dataclass(frozen=True)
class Codebook:
    """Runs of groups of components, one byte a group; components outside of every run are not stored.

    Attributes:
        starts: first component of each run, ascending.
        tables: vectors of each run, `[groups, 256, size]` int8 or int16, integers up to `grid_limit(size)`.
        steps: of each run, `[groups]` float32: a vector is its integers times the step of its group.
        num_components: components of what is coded.
    """

    starts: list[int]
    tables: list[torch.Tensor]
    steps: list[torch.Tensor]
    num_components: int

    @property
    def num_bytes(self) -> int:
        """Bytes of a coded token."""
        return sum(len(step) for step in self.steps)

    @property
    def sizes(self) -> list[int]:
        """Components that share a byte, of each run."""
        return [table.shape[2] for table in self.tables]

    @property
    def end(self) -> int:
        """Behind the last component that is stored."""
        runs = zip(self.starts, self.tables, strict=True)
        return max((start + table.shape[0] * table.shape[2] for start, table in runs), default=0)

    @cached_property
    def scale(self) -> torch.Tensor:
        """The step of each component's group, `[num_components]` float32; 0 where nothing is stored."""
        scale = torch.zeros(self.num_components, device=self.steps[0].device if self.steps else None)
        for start, size, step in zip(self.starts, self.sizes, self.steps, strict=True):
            scale[start : start + size * len(step)] = step.repeat_interleave(size)
        return scale

    @cached_property
    def groups(self) -> dispatch.Groups:
        """As a kernel reads them: made when first encoded by one, and held from then on."""
        return dispatch.group_runs(self.starts, self.tables, self.steps)

    def components_in(self, num_bytes: int) -> int:
        """How many of the first components the first bytes of a token stand for (at least those of one byte)."""
        covered = 0
        for start, size, step in zip(self.starts, self.sizes, self.steps, strict=True):
            groups = min(len(step), max(1, num_bytes) - covered)
            covered += groups
            if covered >= num_bytes or groups < len(step):
                return start + groups * size
        return self.end

    def leading(self, num_components: int) -> Codebook:
        """The groups of the first components."""
        kept = [
            (start, table[:groups], step[:groups])
            for start, table, step in zip(self.starts, self.tables, self.steps, strict=True)
            if (groups := max(0, -(-(num_components - start) // table.shape[2])))
        ]
        starts, tables, steps = ([row[part] for row in kept] for part in range(3))
        return Codebook(starts, tables, steps, self.num_components)

    def to(self, device: torch.device) -> Codebook:
        """The same on `device`."""
        parts = ([part.to(device) for part in held] for held in (self.tables, self.steps))
        return Codebook(self.starts, *parts, self.num_components)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, tokens, num_components]` float32 -> `[batch, tokens, num_bytes]` uint8."""
        return dispatch.vector_quantize(x, self.starts, self.tables, self.steps, self._groups_of(x))

    def decode(self, codes: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """`[batch, ..., num_bytes]` uint8 -> `[batch, ..., num_components]` float32."""
        return dispatch.vector_dequantize(codes, self.starts, self.tables, self.scale, scratch, self._groups_of(codes))

    def _groups_of(self, x: torch.Tensor) -> dispatch.Groups | None:
        return self.groups if dispatch.has_kernels(x.device) else None

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        made = self.__dict__.get("groups", ())
        return [*self.tables, *self.steps, self.scale, *made[:9]]
