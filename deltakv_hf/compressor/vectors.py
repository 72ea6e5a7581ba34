"""Codebooks of one layer as `reconstruct_and_attend` reads them: one table of all vectors, components in its order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..dispatch import Vectors
from .codebook import Codebook

# a vector of any size is read in pieces of these; those of each size fill multiples of WHOLE places
PIECES, WHOLE = (16, 8, 4, 2, 1), 8


@dataclass(frozen=True)
class TokenVectors:
    """How the bytes of a token, and those of its reference, stand for components.

    Attributes:
        order: `[places]` int64, the component at each place; a place that only fills up may name any.
        vectors: of the token's own bytes.
        added: `byte_idx, first_entry, vector_size` of its reference's bytes, or None without references.
        largest: float32 without axes, what entries of the table are divided by.
        maps: to keys and values, what readers have made of it and hold, by how keys are rotated.
    """

    order: torch.Tensor
    vectors: Vectors
    added: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    largest: torch.Tensor
    maps: dict = field(default_factory=dict, compare=False)

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        own = [self.order, *self.vectors[:4], *(self.added or ()), self.largest]
        return own + [part for made in self.maps.values() for kind in made for part in kind]


def token_vectors(book: Codebook, added: Codebook | None = None, share: torch.Tensor | None = None) -> TokenVectors:
    """Puts codebooks into a table, in float16 for tensor cores.

    Args:
        book: of a token's own bytes.
        added: of its reference's bytes, or None.
        share: `[components]` float32, what a reference's components are multiplied by.
    """
    device = book.scale.device
    # what has no byte may read a zero
    table, entry = [torch.zeros(PIECES[0], device=device)], PIECES[0]
    # of every piece: its first component, its byte, its first entry, its size
    held = {piece: [torch.zeros(4, 0, dtype=torch.int64)] for piece in PIECES}
    for start, byte, vectors in _runs(book):
        groups, _, size = vectors.shape
        group = torch.arange(groups)
        for place, piece in _pieces(size):
            first = start + group * size + place, byte + group, entry + group * 256 * piece
            held[piece].append(torch.stack([*first, torch.full_like(group, piece)]))
            table.append(vectors[:, :, place : place + piece].flatten())
            entry += table[-1].numel()
    of_reference = torch.zeros(3, book.num_components, dtype=torch.int64)
    for start, byte, vectors in _runs(added) if added is not None else ():
        groups, _, size = vectors.shape
        span, number = slice(start, start + groups * size), torch.arange(groups * size)
        group, place = number // size, number % size
        own = byte + group, entry + group * 256 * size + place, torch.full_like(group, size)
        of_reference[:, span] = torch.stack(own)
        table.append((vectors * share[span].view(groups, 1, size)).flatten())
        entry += table[-1].numel()
    alone = (of_reference[2] > 0) & (book.scale.cpu() == 0)
    held[1].append(F.pad(alone.nonzero().T, (0, 0, 0, 3)))
    columns = [_numbers(torch.cat(parts, dim=1), piece) for piece, parts in held.items()]
    order, *own, is_held = torch.cat(columns, dim=1)
    added_own = [(part[order] * is_held).int().to(device) for part in of_reference]
    entries = torch.cat(table)
    largest = entries.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
    counts = tuple(part.shape[1] for part in columns[:-1])
    vectors = Vectors((entries / largest).half(), *(part.int().to(device) for part in own), counts)
    return TokenVectors(order.to(device), vectors, None if added is None else tuple(added_own), largest)


def _runs(book: Codebook) -> Iterator[tuple[int, int, torch.Tensor]]:
    """First component, first byte and vectors `[groups, 256, size]` float32 of each run."""
    byte = 0
    for start, table, step in zip(book.starts, book.tables, book.steps, strict=True):
        yield start, byte, table * step[:, None, None]
        byte += len(step)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a vector begin, and how large they are."""
    place = 0
    for piece in PIECES:
        while size - place >= piece:
            yield place, piece
            place += piece


def _numbers(pieces: torch.Tensor, size: int) -> torch.Tensor:
    """Pieces `[4, n]` -> component, byte, first entry, size and whether it is held, of each place `[5, places]`."""
    count = pieces.shape[1]
    pieces = F.pad(pieces, (0, -count % max(1, WHOLE // size)))
    is_held = torch.arange(pieces.shape[1]) < count
    numbers = torch.cat([pieces, is_held[None]]).repeat_interleave(size, dim=1)
    number = torch.arange(numbers.shape[1]) % size
    numbers[0] += number * numbers[4]
    numbers[2] += number
    return numbers
