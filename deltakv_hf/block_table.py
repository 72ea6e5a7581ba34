"""Where the compressed tokens of rows stand in a pool that they share: blocks, and who holds which."""

from __future__ import annotations

import weakref

import torch

from .errors import CacheStateError
from .hf_compat import upload


class BlockTable:
    """Which blocks of a pool each row holds, in the order of its tokens. It never changes; `fitted` gives the next one.

    Args:
        rows: of each row the numbers of its blocks.
        free: numbers of the blocks that no row holds, the next to be taken last.
        block_size: tokens of a block.
    """

    def __init__(self, rows: tuple[tuple[int, ...], ...], free: tuple[int, ...], block_size: int):
        self.rows, self.free, self.block_size = rows, free, block_size
        self._next: tuple[list[int], weakref.ref[BlockTable]] | None = None
        self._numbers: dict[torch.device, torch.Tensor] = {}
        self._slots: dict[tuple[int, torch.device], torch.Tensor] = {}

    @classmethod
    def empty(cls, batch_size: int, num_blocks: int, block_size: int) -> BlockTable:
        """A table of rows that hold nothing."""
        return cls(((),) * batch_size, tuple(reversed(range(num_blocks))), block_size)

    def __deepcopy__(self, memo: dict) -> BlockTable:
        return self

    @property
    def num_blocks(self) -> int:
        """Of the pool."""
        return sum(map(len, self.rows)) + len(self.free)

    def fitted(self, counts: list[int]) -> BlockTable:
        """A table whose rows hold room for so many tokens: blocks are given back, or taken.

        Layers that ask in turn get one and the same. Where blocks are missing, the pool is a larger one.
        """
        if self._next is not None and self._next[0] == counts:
            table = self._next[1]()
            if table is not None:
                return table
        wanted = blocks_of(counts, self.block_size)
        kept = [row[:number] for row, number in zip(self.rows, wanted, strict=True)]
        given = [block for row, number in zip(self.rows, wanted, strict=True) for block in row[number:]]
        free, missing = [*self.free, *reversed(given)], sum(wanted) - sum(map(len, kept))
        if missing > len(free):
            end = self.num_blocks
            free = [*reversed(range(end, end + missing - len(free))), *free]
        rows = tuple((*row, *(free.pop() for _ in range(n - len(row)))) for row, n in zip(kept, wanted, strict=True))
        table = BlockTable(rows, tuple(free), self.block_size)
        # held by the layers alone
        self._next = list(counts), weakref.ref(table)
        return table

    def numbers(self, device: torch.device) -> torch.Tensor:
        """`[batch, most blocks of a row]` int32, 0 behind a row's last."""
        if device not in self._numbers:
            most = max(map(len, self.rows), default=0)
            padded = [row + (0,) * (most - len(row)) for row in self.rows]
            numbers = torch.tensor(padded, dtype=torch.int32).view(len(self.rows), most)
            self._numbers[device] = upload(numbers, device)
        return self._numbers[device]

    def slots(self, records: int, device: torch.device) -> torch.Tensor:
        """Slots of each row's records, `[batch, n]` int32, of which a block holds so many."""
        if (records, device) not in self._slots:
            self._slots[records, device] = slots_of(self.numbers(device), records)
        return self._slots[records, device]


def blocks_of(counts: list[int], block_size: int) -> list[int]:
    """How many blocks hold so many tokens, each."""
    return [-(-count // block_size) for count in counts]


def slots_of(numbers: torch.Tensor, records: int) -> torch.Tensor:
    """Slots `[batch, blocks * records]` of the records in blocks `[batch, blocks]` int32."""
    own = torch.arange(records, dtype=numbers.dtype, device=numbers.device)
    return (numbers[:, :, None] * records + own).flatten(1)


class BlockPool:
    """How many blocks the rows of a cache share; the tensors themselves are the layers'.

    Args:
        block_size: tokens of a block.
        max_pool_tokens: compressed tokens that all rows together have room for; None: what they may come to need.
    """

    def __init__(self, block_size: int, max_pool_tokens: int | None):
        self.block_size, self.max_pool_tokens = block_size, max_pool_tokens
        self._empty: BlockTable | None = None

    def num_blocks(self, most: list[int]) -> int:
        """Of a pool for rows that may come to hold `most` compressed tokens each: one to read at least."""
        tokens = most if self.max_pool_tokens is None else [self.max_pool_tokens]
        return max(1, sum(blocks_of(tokens, self.block_size)))

    def empty(self, batch_size: int, num_blocks: int) -> BlockTable:
        """The table that all layers begin with."""
        held = self._empty
        if held is None or (len(held.rows), held.num_blocks) != (batch_size, num_blocks):
            self._empty = BlockTable.empty(batch_size, num_blocks, self.block_size)
        return self._empty

    def check(self, counts: list[int]) -> None:
        """Raises if rows of so many compressed tokens have no room."""
        needed = sum(blocks_of(counts, self.block_size))
        if self.max_pool_tokens is not None and needed > self.num_blocks([]):
            raise CacheStateError(
                f"`max_pool_tokens` must be at least {needed * self.block_size} for the compressed tokens of all rows, "
                f"got {self.max_pool_tokens}: call `cache.resize(max_cache_len, max_pool_tokens)` with more, or "
                "`cache.release_rows(rows)` for rows that have come to their end."
            )
