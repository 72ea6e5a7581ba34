"""What a store of packed tokens of one layer is made of; each compressor has its own fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from ..references import Lattice


@dataclass(frozen=True)
class TokenStore:
    """Packed tokens of one layer; rows are left-aligned, a shorter row's tail end is unused.

    Every field of a subclass is a tensor `[batch, records, ...]`: first those of references, whose names begin with
    "reference_", then those of residuals, the last of them `reference_idx`, the references' numbers. A store with one
    row, whose records rows of a cache share, is a pool; a record's place in it is a slot.

    Attributes:
        axis: of the records in every field.
    """

    axis: ClassVar[int] = 1

    @classmethod
    def names(cls) -> list[str]:
        """Of all fields."""
        return [field.name for field in fields(cls)]

    @classmethod
    def reference_names(cls) -> list[str]:
        """Of the fields that stand with references."""
        return [name for name in cls.names()[:-1] if name.startswith("reference_")]

    @classmethod
    def counts(cls, num_references: int, num_residuals: int) -> dict[str, int]:
        """Records of each field."""
        own = cls.reference_names()
        return {name: num_references if name in own else num_residuals for name in cls.names()}

    @classmethod
    def join(cls, parts: list[TokenStore]) -> TokenStore:
        """Stores of following tokens as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=cls.axis) for name in cls.names()))

    def map(self, change) -> TokenStore:
        """A store whose every tensor is `change(tensor)`."""
        return type(self)(*(change(getattr(self, name)) for name in self.names()))

    def write(self, new: TokenStore, rows: list[int] | None, num_references: int, num_residuals: int) -> TokenStore:
        """Places `new` behind the first `num_references` and `num_residuals` records of `rows` (None: of all rows)."""
        starts = self.counts(num_references, num_residuals)
        return type(self)(
            *(_write(getattr(self, name), getattr(new, name), rows, at, self.axis) for name, at in starts.items())
        )

    def first(self, num_references: int, num_residuals: int) -> TokenStore:
        """The first records of every row, where they stand."""
        counts = self.counts(num_references, num_residuals)
        return type(self)(*(getattr(self, name).narrow(self.axis, 0, n) for name, n in counts.items()))

    def take(self, references: torch.Tensor, residuals: torch.Tensor) -> TokenStore:
        """Out of this pool a store of the records in slots `[rows, n]` of references and of residuals."""
        axis, taken = self.axis - 1, []
        for name, slots in self._slots(references, residuals):
            records = getattr(self, name)[0].index_select(axis, slots.flatten()).unflatten(axis, slots.shape)
            taken.append(records.movedim(axis, 0).contiguous())
        return type(self)(*taken)

    def put(self, new: TokenStore, references: torch.Tensor, residuals: torch.Tensor) -> None:
        """Writes the records of `new` into slots `[rows, n]` of this pool."""
        axis = self.axis - 1
        for name, slots in self._slots(references, residuals):
            records = getattr(new, name).movedim(0, axis).flatten(axis, axis + 1)
            getattr(self, name)[0].index_copy_(axis, slots.flatten().long(), records)

    def _slots(self, references: torch.Tensor, residuals: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        own = self.reference_names()
        return ((name, references if name in own else residuals) for name in self.names())

    def read_in_pieces(
        self,
        lattice: Lattice,
        start: int,
        stop: int,
        references: torch.Tensor,
        decode: Callable[..., torch.Tensor],
    ) -> Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
        """Compressed tokens `start .. stop - 1` of every row: references first, the others between them after.

        Args:
            lattice: where references are.
            references: those of the range as tokens `[batch, n, width]`; used up before `decode` is called.
            decode: function of the fields that stand with residuals, in their order, `[batch, ..., numbers]` each,
                that gives tokens `[batch, ..., width]`.

        Yields:
            tokens `[batch, ..., width]`, and a function that picks their places out of any tensor
            `[batch, stop - start, ..]`, as a view `[batch, ..., ..]`.
        """
        first, last, stride = lattice.count(start), lattice.count(stop), lattice.stride
        with_residuals = [name for name, count in self.counts(0, 1).items() if count]
        residuals = [getattr(self, name)[:, start - first : stop - last] for name in with_residuals]
        if lattice.is_regular(start, stop):
            yield references, lambda x: x.unflatten(1, (-1, stride))[:, :, 0]
            if stride > 1:
                tokens = decode(*(part.unflatten(1, (-1, stride - 1)) for part in residuals))
                yield tokens, lambda x: x.unflatten(1, (-1, stride))[:, :, 1:]
            return
        span = lattice.span(start, stop, references.device)
        tokens = references.new_empty(references.shape[0], stop - start, references.shape[-1])
        tokens[:, span.reference_offsets] = references
        tokens[:, span.residual_offsets] = decode(*residuals)
        yield tokens, lambda x: x


def _write(held: torch.Tensor, new: torch.Tensor, rows: list[int] | None, start: int, axis: int) -> torch.Tensor:
    stop = start + new.shape[axis]
    if rows is None:
        return torch.cat([held.narrow(axis, 0, start), new], dim=axis)
    shape = list(held.shape)
    shape[axis] = max(stop, shape[axis])
    grown = held.new_zeros(shape)
    grown.narrow(axis, 0, held.shape[axis]).copy_(held)
    places = grown.narrow(axis, start, new.shape[axis])
    for place, row in enumerate(rows):
        places[row] = new[place]
    return grown
