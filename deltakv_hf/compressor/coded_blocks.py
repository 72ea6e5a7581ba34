"""Whole blocks of tokens as a compressor codes them, each stored once however many rows hold it.

A token may be coded against earlier tokens of its row, by their numbers. Rows that hold a block hold the same blocks
before it, so the numbers mean the same in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass, replace
from functools import cache

import torch

from ..hf_compat import upload
from ..layout import Arrangement
from .coder import Coder, Pieces
from .store import TokenStore


@dataclass(frozen=True)
class CodedBlocks(TokenStore):
    """Mixed into the store of a compressor: a row of it is a block, with what the compressor keeps of its tokens.

    Attributes:
        block_table: `[batch, blocks of a row]` int64: the slot of each, any behind a row's last.
    """

    block_table: torch.Tensor

    def arranged(self, arrangement: Arrangement) -> CodedBlocks:
        """After slots were given up and rows chosen anew."""
        device, pool = self.block_table.device, self
        if arrangement.kept is not None:
            kept = upload(arrangement.kept, device)
            pool = self.map(lambda part: part.index_select(0, kept) if part is not self.block_table else part)
        return replace(pool, block_table=upload(arrangement.block_table, device))


@cache
def store_class(kind: type[TokenStore]) -> type[CodedBlocks]:
    """Blocks of a compressor whose store is a `kind`."""
    held = [(field.name, torch.Tensor) for field in fields(kind)]
    return make_dataclass(
        f"{kind.__name__}Blocks", [*held, ("block_table", torch.Tensor)], bases=(CodedBlocks,), frozen=True
    )


class CodedBlockCoder(Coder):
    """Stores tokens as `inner` codes them, in blocks.

    Args:
        block_size: tokens of a block, whole strides of the references of `inner`.
        inner: compressor of the layer.
    """

    def __init__(self, block_size: int, inner: Coder):
        self.block_size, self.inner, self.width, self.lattice = block_size, inner, inner.width, inner.lattice

    def tensors(self) -> list[torch.Tensor]:
        """What the compressor holds."""
        return self.inner.tensors()

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> CodedBlocks:
        """A store of rows of `num_tokens` tokens that have nothing in common."""
        number = -(-num_tokens // self.block_size)
        return self.of_blocks(batch_size * number, torch.zeros(batch_size, number, dtype=torch.int64, device=device))

    def of_blocks(self, num_blocks: int, block_table: torch.Tensor) -> CodedBlocks:
        """A store of so many blocks, without data."""
        pool = self.inner.empty(num_blocks, block_table.device, self.block_size)
        return store_class(type(pool))(**vars(pool), block_table=block_table)

    def bytes_per_token(self) -> float:
        """Stored bytes of a token that no other row has."""
        return self.inner.bytes_per_token()

    def gathered(self, store: CodedBlocks, rows: torch.Tensor | slice = slice(None)) -> TokenStore:
        """What `inner` would hold for `rows`, in memory of its own."""
        table, kind = store.block_table[rows], type(self.inner.empty(0, torch.device("meta")))
        return kind(**{name: getattr(store, name)[table].flatten(1, 2) for name in kind.names()})

    def prepare(self, *states) -> torch.Tensor:
        """See `Coder.prepare`."""
        return self.inner.prepare(*states)

    def append(
        self,
        store: CodedBlocks,
        rows: list[int] | None,
        start: int,
        stop: int,
        read,
        new_blocks: torch.Tensor | None = None,
    ) -> CodedBlocks:
        """Puts blocks behind those in the pool; see `BlockCoder.append`."""
        device, size = store.block_table.device, self.block_size
        picked = slice(None) if rows is None else upload(torch.tensor(rows), device)
        # a row's codes are made behind its own; those that another row has made already are dropped
        held = self.inner.append(self.gathered(store, picked), None, start, stop, read)
        places, blocks = upload(new_blocks, device).unbind(1)
        parts = {}
        for name in held.names():
            count = getattr(store, name).shape[1]
            made = getattr(held, name)[:, : stop // size * count].unflatten(1, (stop // size, count))
            parts[name] = torch.cat([getattr(store, name), made[places, blocks]])
        return replace(store, **parts)

    def cut(self, store: CodedBlocks, count: int) -> CodedBlocks:
        """The first blocks of every row; slots are given up by an `Arrangement`."""
        return replace(store, block_table=store.block_table[:, : -(-count // self.block_size)].clone())

    def references(self, store: CodedBlocks):
        """See `Coder.references`."""
        return self.inner.references(self.gathered(store))

    def decode(
        self, store: CodedBlocks, references, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """See `Coder.decode`."""
        return self.inner.decode(self.gathered(store), references, start, stop, scratch)
