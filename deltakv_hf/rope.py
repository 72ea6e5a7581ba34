"""Rotary position embeddings: how a model turns keys, undone and done again from the tables that the model used.

`transformers` hands keys to the cache after rotation. Similar tokens at different positions look different then, so
keys are un-rotated before they are compressed. The model's own tables are kept (once per RoPE type, not per layer),
so scaled, partial and position-dependent variants need no formula here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from . import dispatch
from .errors import CacheStateError


@dataclass(frozen=True)
class RopeForm:
    """How one attention module rotates its keys.

    Attributes:
        pairing: "half" turns channel `i` with `i + n/2`, "interleaved" channel `2i` with `2i + 1`, of the first `n`
            channels of a head.
        table: where the angle of pair `i` stands in a table row: "halves" at `i` (the row holds the angles twice, one
            copy after the other), "pairs" at `2i` (each angle twice in a row), "single" at `i` (held once).
    """

    pairing: str
    table: str

    @property
    def is_interleaved(self) -> bool:
        """Whether the numbers of a pair are neighbours."""
        return self.pairing == "interleaved"

    def angles(self, table: torch.Tensor) -> torch.Tensor:
        """Cuts a table `[.., tokens, width]` to one number per pair, `[.., tokens, n/2]`, as a copy."""
        if self.table == "single":
            return table.clone()
        width = table.shape[-1] // 2
        return (table[..., :width] if self.table == "halves" else table[..., ::2]).contiguous().clone()

    def apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
        """Rotates the last axis. x, out `[..., head_dim]` float32, not the same; cos, sin broadcast to `[..., n/2]`."""
        num_pairs = cos.shape[-1]
        first, second = self._pairs(x, num_pairs)
        out_first, out_second = self._pairs(out, num_pairs)
        torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out_second).addcmul_(first, sin)
        if 2 * num_pairs < x.shape[-1]:
            out[..., 2 * num_pairs :] = x[..., 2 * num_pairs :]

    def rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`apply` into new memory, for gradients to go through."""
        first, second = self._pairs(x, cos.shape[-1])
        pair = first * cos - second * sin, second * cos + first * sin
        turned = torch.cat(pair, dim=-1) if self.pairing == "half" else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat([turned, x[..., turned.shape[-1] :]], dim=-1)

    def paired(self, x: torch.Tensor, num_pairs: int) -> torch.Tensor:
        """The last axis with both numbers of a rotated pair side by side, pairs first."""
        return dispatch.paired(x, num_pairs, self.is_interleaved)

    def _pairs(self, x: torch.Tensor, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.pairing == "half":
            return x[..., :num_pairs], x[..., num_pairs : 2 * num_pairs]
        return x[..., 0 : 2 * num_pairs : 2], x[..., 1 : 2 * num_pairs : 2]


def unrotated_tokens(
    form: RopeForm | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Raw `[rows, heads, n, head_dim]` -> `[K; V]`, all heads joined, keys un-rotated: `[rows, n, width]` float32.

    Args:
        form: how the keys are rotated, or None if they are not.
        angles: cos, sin `[1 or rows, n, n/2]` float32; None without a form.
    """
    return dispatch.unrotate(keys, values, angles, form is not None and form.is_interleaved)


class RopeTables:
    """Angles of every column that a cache has seen, for all layers with the same RoPE type on one device.

    Attributes:
        cos, sin: `[1 or batch, columns, n/2]` in the model's dtype.
        by_content: whether layers share them that were handed equal tensors, but not the same one.
    """

    def __init__(self, form: RopeForm):
        self.form = form
        self.by_content = False
        self.cos: torch.Tensor | None = None
        self.sin: torch.Tensor | None = None
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._last = None

    @property
    def columns(self) -> int:
        return 0 if self.cos is None else self.cos.shape[1]

    def reserve(self, columns: int, num_rows: int, room: tuple[torch.Tensor, torch.Tensor] | None):
        """Moves the tables into room for `columns` columns of `num_rows` rows, at an address that stays.

        Args:
            room: to be used if it is of the right form, `[num_rows, columns, n/2]` each.

        Returns:
            the room.
        """
        shape, held = (num_rows, columns, self.cos.shape[2]), self.columns
        like = self.cos.dtype, self.cos.device
        if room is None or room[0].shape != shape or (room[0].dtype, room[0].device) != like:
            room = tuple(table.new_zeros(shape) for table in (self.cos, self.sin))
        for place, table in zip(room, (self.cos, self.sin), strict=True):
            torch._dynamo.mark_static_address(place, guard=False)
            if table.data_ptr() != place.data_ptr():
                place[:, :held] = table
        self.room = room
        self.take(held)
        return room

    def leave_room(self) -> None:
        """Holds what it holds in memory of its own."""
        self.cos, self.sin, self.room = self.cos.clone(), self.sin.clone(), None

    def take(self, columns: int) -> None:
        """Holds the first `columns` columns of the room."""
        self.cos, self.sin = (place[:, :columns] for place in self.room)

    def write(self, column: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Into the room, the tables `[1 or batch, 1, width]` of one column, `[1]` int64."""
        for place, table in zip(self.room, (cos, sin), strict=True):
            place.index_copy_(1, column, self.form.angles(table).expand(place.shape[0], -1, -1))

    def whole(self) -> RopeTables:
        """Tables of all columns that there is room for."""
        tables = RopeTables(self.form)
        tables.cos, tables.sin = self.room
        return tables

    def is_last(self, cos: torch.Tensor) -> bool:
        """Whether `cos` is the very tensor that was added last (layers of one type are handed one tensor)."""
        return self._last is not None and self._last() is cos

    def is_equal(self, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Whether what is held is what `cos` and `sin` would give."""
        return torch.equal(self.cos, self.form.angles(cos)) and torch.equal(self.sin, self.form.angles(sin))

    def extend(self, cos: torch.Tensor, sin: torch.Tensor, past: int) -> None:
        """Appends the tables of a forward, `[1 or batch, q, width]`; a second layer with the same ones adds nothing."""
        if self.is_last(cos):
            if self.columns == past + cos.shape[1]:
                return
            raise CacheStateError("the RoPE tables of a forward must be new, got those of the forward before again.")
        if self.by_content and self.columns == past + cos.shape[1]:
            return
        if self.columns != past:
            raise CacheStateError(
                f"the RoPE tables of this forward must follow column {past}, but tables for {self.columns} columns are "
                "held: another layer was given different tables. Call `cache.reset()` and run the prompt again."
            )
        new_cos, new_sin = self.form.angles(cos), self.form.angles(sin)
        if self.cos is None:
            self.cos, self.sin = new_cos, new_sin
        else:
            rows = max(self.cos.shape[0], new_cos.shape[0])
            self.cos = torch.cat([self.cos.expand(rows, -1, -1), new_cos.expand(rows, -1, -1)], dim=1)
            self.sin = torch.cat([self.sin.expand(rows, -1, -1), new_sin.expand(rows, -1, -1)], dim=1)
        self._last = weakref.ref(cos)

    def rows(self, rows: slice | torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 cos, sin `[1 or rows, stop - start, n/2]` of columns `start .. stop - 1`."""
        picked = slice(None) if self.cos.shape[0] == 1 else rows
        return self.cos[picked, start:stop].float(), self.sin[picked, start:stop].float()

    def gather(self, columns: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 cos, sin `[n_rows, m, n/2]` of `columns` int64 `[n_rows, m]`, of `rows` (None: all)."""
        held = (self.cos, self.sin)
        if self.cos.shape[0] > 1 and rows is not None:
            held = (self.cos[rows], self.sin[rows])
        idx = columns.unsqueeze(-1).expand(-1, -1, self.cos.shape[-1])
        cos, sin = (table.expand(idx.shape[0], -1, -1).gather(1, idx).float() for table in held)
        return cos, sin

    def map(self, change) -> None:
        """Applies `change` (a function of a `[batch, ..]` tensor) to tables that differ by row."""
        if self.cos is not None and self.cos.shape[0] > 1:
            self.cos, self.sin = change(self.cos), change(self.sin)

    def pad(self, columns: int) -> None:
        """Repeats the last column up to `columns`."""
        missing = columns - self.columns
        self.cos, self.sin = (torch.cat([t, t[:, -1:].expand(-1, missing, -1)], dim=1) for t in (self.cos, self.sin))

    def crop(self, columns: int) -> None:
        """Keeps the first `columns` columns."""
        if self.cos is not None:
            self.cos, self.sin = self.cos[:, :columns].clone(), self.sin[:, :columns].clone()
        self._last = None


class RopeRegistry:
    """The tables of one cache: layers that were handed the same ones in their first forward share one copy."""

    def __init__(self):
        self.tables: list[RopeTables] = []

    def find(self, form: RopeForm, cos: torch.Tensor, sin: torch.Tensor) -> RopeTables:
        """Tables to which `cos` and `sin` were just added by another layer of the same form, or new ones."""
        known = [tables for tables in self.tables if tables.form == form]
        for tables in known:
            if tables.is_last(cos):
                return tables
        # a model that is split over devices hands each layer a copy
        for tables in known:
            if tables.cos.device == cos.device and tables.is_equal(cos, sin):
                tables.by_content = True
                return tables
        self.tables.append(RopeTables(form))
        return self.tables[-1]
