"""What the ledger tells the layers: what to sort, compress and forget, and where tokens stand between flushes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .hf_compat import upload


@dataclass(frozen=True)
class FlushGroup:
    """Rows that compress the same tokens `start .. stop - 1` (compressed index) in one flush.

    Attributes:
        rows: row numbers, or None for all rows.
        offset: first of these tokens among the tokens that the flush reads (see `Flush.source_idx`).
        row_columns: column of each real token of these rows; None where token `i` stands in column `i`.
        new_blocks: of a cache of blocks, those to store, `[n, 2]` int64: place in `rows` and number of the row's block.
    """

    rows: list[int] | None
    offset: int
    start: int
    stop: int
    row_columns: list[torch.Tensor] | None = None
    new_blocks: torch.Tensor | None = None

    def columns(self, start: int, stop: int) -> torch.Tensor | None:
        """Columns `[rows, stop - start]` of tokens `start .. stop - 1`, sinks counted; None where they are the same."""
        if self.row_columns is None:
            return None
        return torch.stack([columns[start:stop] for columns in self.row_columns])


@dataclass(frozen=True)
class Arrangement:
    """Where blocks of rows stand in the pool of every layer, after a change.

    Attributes:
        kept: slots of the old pool that stay, ascending; None: all.
        block_table: `[batch, most blocks of a row]` int64 on the CPU: slot of each block, 0 behind a row's last.
        row_groups: `[batch]` int64 on the CPU.
        homes: of a flush, where its new blocks come from, `[new slots, columns]` int64 on the CPU (see `fusion`).
    """

    kept: torch.Tensor | None
    block_table: torch.Tensor
    row_groups: torch.Tensor
    homes: torch.Tensor | None = None


@dataclass
class Flush:
    """What every layer does in one flush. `source` is the layer's tail followed by its pending columns.

    Attributes:
        source_idx: `[batch, n]` int64, place in `source` of each row's tokens; None where they stand in order.
        groups: what is compressed.
        tail_idx: `[batch, m]` int64, what stays in the tail; None with `source_idx`, then `tail_start` says it.
        tail_start: first token of `source` that stays in the tail, where rows are equal.
        number: flushes count up, so that a layer can tell whether it has done this one.
        arrangement: of a cache of blocks, where they stand after it.
    """

    number: int
    source_idx: torch.Tensor | None
    groups: list[FlushGroup]
    tail_idx: torch.Tensor | None
    tail_start: int = 0
    arrangement: Arrangement | None = None


@dataclass(frozen=True)
class Crop:
    """What every layer does when the newest columns, or all of some rows, are forgotten.

    Attributes:
        columns: columns that stay.
        pending: of these, pending ones.
        compressed: compressed tokens that stay, by row.
        tail_lengths: tokens in each row's tail after it.
        returned: rows that lose their last compressed token: their sinks go back to the tail.
        num_dropped: compressed tokens that are forgotten, over all rows.
    """

    columns: int
    pending: int
    compressed: list[int]
    tail_lengths: list[int]
    returned: list[bool]
    num_dropped: int


@dataclass(frozen=True)
class View:
    """Where columns are read from when padding was seen. A slot is a place in [sinks | store | tail | pending]."""

    slots: torch.Tensor  # [batch, merged columns] int64: slot of each column, any for padding
    columns: torch.Tensor  # [batch, merged slots] int64: column of each slot, 0 for a slot that is not used
    unused: torch.Tensor  # [batch, merged slots] bool


class Layout:
    """What stood where between two flushes: enough to read a `LayerState` of that time.

    Attributes:
        compressed: most compressed tokens in a row.
    """

    def __init__(self, num_sink_tokens: int, compressed: list[int], merged: int, row_columns):
        self.compressed = max(compressed, default=0)
        self._num_sink_tokens = num_sink_tokens
        self._counts = list(compressed)
        self._merged = merged
        self._row_columns = row_columns
        self._views: dict[torch.device, View] = {}

    def view(self, device: torch.device) -> View | None:
        """Where merged columns are read from; None while no padding was seen and all stand in order."""
        if self._row_columns is None:
            return None
        if device not in self._views:
            self._views[device] = self._make_view(device)
        return self._views[device]

    def _make_view(self, device: torch.device) -> View:
        sinks, most = self._num_sink_tokens, self.compressed
        slots = torch.zeros(len(self._counts), self._merged, dtype=torch.int64)
        used = []
        for row, columns in enumerate(self._row_columns):
            count = self._counts[row]
            columns = columns[columns < self._merged]
            slot = torch.arange(len(columns))
            if count:
                # in the sinks and the store a token's slot is its number; the tail begins behind the longest store
                slot[sinks + count :] += most - count
            elif most:
                slot += sinks + most
            slots[row, columns] = slot
            used.append((slot, columns))
        width = max((int(slot[-1]) + 1 for slot, _ in used if len(slot)), default=0)
        columns, unused = (
            torch.zeros(len(used), width, dtype=torch.int64),
            torch.ones(len(used), width, dtype=torch.bool),
        )
        for row, (slot, column) in enumerate(used):
            columns[row, slot], unused[row, slot] = column, False
        return View(upload(slots, device), upload(columns, device), upload(unused, device))

    def tensors(self) -> list[torch.Tensor]:
        """Index tensors held."""
        views = [t for view in self._views.values() for t in (view.slots, view.columns, view.unused)]
        return views + (self._row_columns or [])


@dataclass(frozen=True)
class Step:
    """One forward: `past` columns before it, `query_length` new ones; a flush before and, in a long call, after.

    `layout` is how the tokens stand between the two.
    """

    past: int
    query_length: int
    before: Flush | None
    layout: Layout
    after: Flush | None


def stack(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of different length -> `[rows, longest]`, the missing places 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
