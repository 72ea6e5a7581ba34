"""What a store of packed tokens of one layer is made of; each compressor has its own fields."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class TokenStore:
    """Packed tokens of one layer; rows are left-aligned, a shorter row's tail end is unused.

    Every field of a subclass is a tensor `[batch, records, ...]`: of references if its name begins with "reference_"
    and is not `reference_idx` (the references' numbers, which stand with the residuals), else of residuals.
    """

    @classmethod
    def counts(cls, num_references: int, num_residuals: int) -> dict[str, int]:
        """Records of each field."""
        names = [field.name for field in fields(cls)]
        own = {name for name in names if name.startswith("reference_")} - {"reference_idx"}
        return {name: num_references if name in own else num_residuals for name in names}

    @classmethod
    def join(cls, parts: list[TokenStore]) -> TokenStore:
        """Stores of following tokens as one."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))

    def map(self, change) -> TokenStore:
        """A store whose every tensor is `change(tensor)`."""
        return type(self)(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def write(self, new: TokenStore, rows: list[int] | None, num_references: int, num_residuals: int) -> TokenStore:
        """Places `new` behind the first `num_references` and `num_residuals` records of `rows` (None: of all rows)."""
        starts = self.counts(num_references, num_residuals)
        return replace(
            self, **{name: _write(getattr(self, name), getattr(new, name), rows, at) for name, at in starts.items()}
        )

    def cut(self, num_references: int, num_residuals: int) -> TokenStore:
        """The first records of every row, in memory of their own."""
        counts = self.counts(num_references, num_residuals)
        return type(self)(**{name: getattr(self, name)[:, :count].clone() for name, count in counts.items()})


def _write(held: torch.Tensor, new: torch.Tensor, rows: list[int] | None, start: int) -> torch.Tensor:
    stop = start + new.shape[1]
    if rows is None:
        return torch.cat([held[:, :start], new], dim=1)
    size = max(stop, held.shape[1])
    grown = held.new_zeros(held.shape[0], size, *held.shape[2:])
    grown[:, : held.shape[1]] = held
    for place, row in enumerate(rows):
        grown[row, start:stop] = new[place]
    return grown
