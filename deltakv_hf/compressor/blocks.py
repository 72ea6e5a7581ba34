"""Whole blocks of tokens as the model made them, each stored once however many rows hold it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..hf_compat import upload
from ..layout import Arrangement
from ..references import Lattice
from .coder import Coder, Pieces
from .store import TokenStore


@dataclass(frozen=True)
class BlockStore(TokenStore):
    """A pool of blocks and which of them each row holds.

    Attributes:
        blocks: `[slots, block_size, width]` in the model's dtype.
        block_table: `[batch, blocks of a row]` int64: the slot of each, any behind a row's last.
    """

    blocks: torch.Tensor
    block_table: torch.Tensor

    def arranged(self, arrangement: Arrangement) -> BlockStore:
        """After slots were given up and rows chosen anew."""
        device, blocks = self.blocks.device, self.blocks
        if arrangement.kept is not None:
            blocks = blocks.index_select(0, upload(arrangement.kept, device))
        return BlockStore(blocks, upload(arrangement.block_table, device))


class BlockCoder(Coder):
    """Stores tokens as they are, in blocks.

    Args:
        block_size: tokens of a block.
        width, dtype: of a token.
    """

    def __init__(self, block_size: int, width: int, dtype: torch.dtype):
        self.block_size, self.width, self.dtype, self.lattice = block_size, width, dtype, Lattice(1)

    def tensors(self) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> BlockStore:
        """A store of rows of `num_tokens` tokens that have nothing in common."""
        number = -(-num_tokens // self.block_size)
        blocks = torch.empty(batch_size * number, self.block_size, self.width, dtype=self.dtype, device=device)
        return BlockStore(blocks, torch.zeros(batch_size, number, dtype=torch.int64, device=device))

    def of_blocks(self, num_blocks: int, block_table: torch.Tensor) -> BlockStore:
        """A store without data, on the meta device."""
        blocks = torch.empty(num_blocks, self.block_size, self.width, dtype=self.dtype, device="meta")
        return BlockStore(blocks, block_table.to("meta"))

    def bytes_per_token(self) -> float:
        """Stored bytes of a token that no other row has."""
        return self.width * self.dtype.itemsize

    def append(
        self,
        store: BlockStore,
        rows: list[int] | None,
        start: int,
        stop: int,
        read,
        new_blocks: torch.Tensor | None = None,
    ) -> BlockStore:
        """Puts blocks behind those in the pool; the table is that of an `Arrangement` to come.

        Args:
            rows, start, stop, read: as of `Coder.append`; `stop` is a multiple of `block_size`.
            new_blocks: which to store, `[n, 2]` int64: place in `rows` and number of the row's block.
        """
        size = self.block_size
        added = store.blocks.new_empty(len(new_blocks), size, self.width)
        tile = max(1, self.encode_tile // size) * size
        for begin in range(start // size * size, stop, tile):
            end = min(begin + tile, stop)
            wanted = ((new_blocks[:, 1] >= begin // size) & (new_blocks[:, 1] < -(-end // size))).nonzero()
            if len(wanted) == 0:
                continue
            tokens = read(max(begin, start), end).to(self.dtype)
            if begin < start:
                # a crop has left the beginning of a block that others may hold too
                picked = slice(None) if rows is None else upload(torch.tensor(rows), tokens.device)
                held = self.tokens_of(store, store.block_table[picked, begin // size].unsqueeze(1), picked)
                tokens = torch.cat([held[:, 0, : start - begin].to(self.dtype), tokens], dim=1)
            wanted = torch.cat([wanted, new_blocks[wanted[:, 0]]], dim=1)
            idx, places, blocks = upload(wanted, tokens.device).unbind(1)
            added[idx] = tokens.unflatten(1, (-1, size))[places, blocks - begin // size]
        return replace(store, blocks=torch.cat([store.blocks, added]))

    def tokens_of(self, store: BlockStore, slots: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """Tokens `[rows, n, block_size, width]` of slots `[rows, n]` that `rows` hold."""
        return store.blocks[slots]

    def cut(self, store: BlockStore, count: int) -> BlockStore:
        """The first blocks of every row; slots are given up by an `Arrangement`."""
        return replace(store, block_table=store.block_table[:, : -(-count // self.block_size)].clone())

    def references(self, store: BlockStore) -> None:
        """Nothing."""

    def decode(
        self, store: BlockStore, references: None, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads tokens `start .. stop - 1` of every row, in one piece; see `Coder.decode`."""
        first = start // self.block_size
        slots = store.block_table[:, first : -(-stop // self.block_size)]
        tokens = self.tokens_of(store, slots, slice(None)).flatten(1, 2)
        yield tokens[:, start - first * self.block_size : stop - first * self.block_size], lambda x: x
