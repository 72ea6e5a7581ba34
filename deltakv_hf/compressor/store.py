"""What a store of packed tokens of one layer is made of; each compressor has its own fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch

from ..references import Lattice


@dataclass(frozen=True)
class TokenStore:
    """Packed tokens of one layer; rows are left-aligned, a shorter row's tail end is unused.

    Every field of a subclass is a tensor `[batch, records, ...]`: first those of references, whose names begin with
    "reference_", then those of residuals, the last of them `reference_idx`, the references' numbers.
    """

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
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in cls.names()))

    def map(self, change) -> TokenStore:
        """A store whose every tensor is `change(tensor)`."""
        return type(self)(*(change(getattr(self, name)) for name in self.names()))

    def write(
        self,
        new: TokenStore,
        rows: list[int] | None,
        num_references: int,
        num_residuals: int,
        room: TokenStore | None = None,
    ) -> TokenStore:
        """Places `new` behind the first `num_references` and `num_residuals` records of `rows` (None: of all rows).

        Args:
            room: a larger store of which this one is the beginning, to be written to in place; None: a new one is made.
        """
        starts, written = self.counts(num_references, num_residuals), {}
        for name, at in starts.items():
            place = None if room is None else getattr(room, name)
            written[name] = _write(getattr(self, name), getattr(new, name), rows, at, place)
        return replace(self, **written)

    def cut(self, num_references: int, num_residuals: int) -> TokenStore:
        """The first records of every row, in memory of their own."""
        counts = self.counts(num_references, num_residuals)
        return type(self)(**{name: getattr(self, name)[:, :count].clone() for name, count in counts.items()})

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


def _write(
    held: torch.Tensor, new: torch.Tensor, rows: list[int] | None, start: int, room: torch.Tensor | None
) -> torch.Tensor:
    stop = start + new.shape[1]
    if rows is None and room is None:
        return torch.cat([held[:, :start], new], dim=1)
    if rows is None:
        room[:, start:stop] = new
        return room[:, :stop]
    size = max(stop, held.shape[1])
    if room is None:
        grown = held.new_zeros(held.shape[0], size, *held.shape[2:])
        grown[:, : held.shape[1]] = held
    else:
        grown = room[:, :size]
    for place, row in enumerate(rows):
        grown[row, start:stop] = new[place]
    return grown
