"""A layer of a cache of fixed size: the tokens of a `DeltaKVLayer` in tensors that keep their addresses.

Between decode steps it is a `DeltaKVLayer`: raw tokens are views of the buffers, packed ones stand in blocks of a pool,
and a new state is written into them. A decode step of one token goes another way, which a compiler can trace and a
graph can repeat: the token is written behind the raw ones, and attention reads the buffers up to lengths that are
tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .block_table import BlockTable
from .compressor import Int4Compressor, TokenStore, TransformCompressor
from .errors import CacheStateError, UnsupportedModelError
from .hf_compat import upload
from .layer import DeltaKVLayer
from .layout import FlushGroup, Layout
from .selection import Selector
from .state import LayerState
from .static_plan import StaticPlan, keep_address
from .static_reader import StaticReader, attend_static

RAW = ("sink", "tail", "pending")


class StaticStates:
    """Keys or values of a step, as a layer of fixed size hands them to the attention `deltakv`.

    Args:
        layer: which attends.
        like: the token's own keys or values, `[batch, num_key_value_heads, 1, head_dim]`.
    """

    def __init__(self, layer: StaticLayer, like: torch.Tensor):
        self.layer, self.shape, self.dtype, self.device = layer, like.shape, like.dtype, like.device


@dataclass(frozen=True)
class PooledTokens:
    """Packed tokens that stand in a layer's pool: the `store` of its state.

    Attributes:
        table: their blocks.
        counts: how many of each row.
    """

    table: BlockTable
    counts: list[int]

    def fitted(self, counts: list[int]) -> PooledTokens:
        """The same of rows of so many."""
        return PooledTokens(self.table.fitted(counts), counts)


class StaticLayer(DeltaKVLayer):
    """A cache layer for full attention with room for so many tokens.

    Args:
        *args: as for `DeltaKVLayer`.
        sizes: columns, compressed and raw tokens that a row has room for.

    Attributes:
        pool: packed tokens of all rows, a store with one row.
        plan: of the cache; None before the first step.
        is_first, is_last: of the layers, which take turns in a step.
        writes_tables: whether a step's RoPE tables come from this layer.
        chooses, is_told: whether it chooses tokens for those behind it, or reads what another has chosen.
    """

    is_compileable = True
    saved_as = DeltaKVLayer.__name__

    def __init__(self, *args, sizes: tuple[int, int, int]):
        self.raw_keys: torch.Tensor | None = None
        self.raw_values: torch.Tensor | None = None
        self.pool: TokenStore | None = None
        self.plan: StaticPlan | None = None
        self.reader: StaticReader | None = None
        self.max_cache_len, self.capacity, self.num_raw = sizes
        self.is_first = self.is_last = self.writes_tables = self.chooses = self.is_told = False
        self._num_blocks = 0
        self._held: tuple | None = None
        self._anchor: torch.Tensor | None = None
        super().__init__(*args)

    # -- between steps: the state is views of the buffers ----------------------------------------------------------

    @property
    def held(self) -> LayerState | None:
        """The state; its raw parts are views, its store says where packed tokens stand."""
        if self._held is None:
            return None
        widths, packed, columns, num_flushes = self._held
        raw, at = [], 0
        for width in widths:
            raw += [self.raw_keys[:, :, at : at + width], self.raw_values[:, :, at : at + width]]
            at += width
        return LayerState(*raw, packed, columns, num_flushes)

    @property
    def state(self) -> LayerState | None:
        """The state with a store as a growing layer has it, in memory of its own."""
        held = self.held
        return None if held is None else replace(held, store=self._taken(held.store))

    @state.setter
    def state(self, state: LayerState | None) -> None:
        if self.plan is not None:
            self.plan.is_ready = False
        if state is None:
            self._held = None
            return
        if state.columns > self.max_cache_len:
            raise CacheStateError(
                f"`max_cache_len` must be at least the {state.columns} columns held, got {self.max_cache_len}."
            )
        widths = self._write_raw(state)
        packed = state.store if isinstance(state.store, PooledTokens) else self._put(state.store)
        self._held = widths, packed, state.columns, state.num_flushes

    @property
    def columns(self) -> int:
        """Columns seen."""
        return 0 if self._held is None else self._held[2]

    def _write_raw(self, state: LayerState) -> tuple[int, ...]:
        """Puts the raw parts of `state` where they belong, one behind the other, and gives their widths."""
        widths, tail = tuple(getattr(state, f"{part}_keys").shape[2] for part in RAW), state.tail_keys
        if sum(widths) > self.num_raw:
            # padding in many short calls
            self.num_raw = 2 * sum(widths)
        form, room = (*tail.shape[:2], self.num_raw, tail.shape[3]), self.raw_keys
        if room is None or (room.shape, room.dtype, room.device) != (form, tail.dtype, tail.device):
            # zeros: what is never read is multiplied by zero
            self.raw_keys, self.raw_values = (
                part.new_zeros(*part.shape[:2], self.num_raw, part.shape[3]) for part in (tail, state.tail_values)
            )
            self.reader = None
        places = []
        for room, kind in ((self.raw_keys, "keys"), (self.raw_values, "values")):
            parts = [getattr(state, f"{part}_{kind}") for part in RAW]
            places += zip(room[:, :, : sum(widths)].split(widths, dim=2), parts, strict=True)
        places = [(place, new) for place, new in places if not _is_there(place, new)]
        # a part that moves within the buffers may be overwritten before it is read
        places = [(place, new.clone() if _storage(new) == _storage(place) else new) for place, new in places]
        for place, new in places:
            place.copy_(new)
        return widths

    # -- packed tokens in blocks of the pool -----------------------------------------------------------------------

    def _put(self, store: TokenStore) -> PooledTokens:
        """Writes what the rows of `store` hold, as many tokens of each as the ledger says, into blocks of the pool."""
        counts = self.ledger.compressed
        packed = self._empty(len(counts)).fitted(counts)
        self._make_pool(packed.table)
        for count in set(counts):
            rows, last = [row for row, own in enumerate(counts) if own == count], self.compressor.records(count)
            picked = upload(torch.tensor(rows), self.device)
            part = store.first(*last).map(lambda records, picked=picked: records.index_select(0, picked))
            self.pool.put(part, *self._slots(packed.table, picked, (0, 0), last))
        return packed

    def _taken(self, packed: PooledTokens) -> TokenStore:
        """The inverse: a store of all rows, zeros behind a shorter one's last token."""
        last = self.compressor.records(max(packed.counts, default=0))
        store = self.pool.take(*self._slots(packed.table, None, (0, 0), last))
        ragged = enumerate(packed.counts) if len(set(packed.counts)) > 1 else ()
        for row, count in ragged:
            for name, number in store.counts(*self.compressor.records(count)).items():
                records = getattr(store, name)[row]
                records.narrow(store.axis - 1, number, records.shape[store.axis - 1] - number).zero_()
        return store

    def _slots(
        self, table: BlockTable, rows: torch.Tensor | None, first: tuple[int, int], last: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Of `rows` (None: all) the slots of records `first .. last - 1`, with references and with residuals."""
        sizes = self.compressor.records(table.block_size)
        slots = [table.slots(n, self.device)[:, a:b] for n, a, b in zip(sizes, first, last, strict=True)]
        return slots if rows is None else [part.index_select(0, rows) for part in slots]

    def _empty(self, batch: int) -> PooledTokens:
        """What rows that hold nothing have in the pool, which is as large as they may come to need."""
        ledger, pool = self.ledger, self.ledger.pool
        most = [ledger.canonical(self.max_cache_len - padding) for padding in ledger.num_padding()]
        num_blocks = max(self._num_blocks, pool.num_blocks(most))
        if batch == 1:
            # it is read as a whole
            num_blocks = max(num_blocks, self.capacity // pool.block_size)
        table = pool.empty(batch, num_blocks)
        self._make_pool(table)
        return PooledTokens(table, [0] * batch)

    def _make_pool(self, table: BlockTable) -> None:
        """Makes the pool as large as `table` says; what it holds stays."""
        if self.pool is not None and getattr(self.pool, self.pool.names()[0]).device != self.device:
            # the model has moved since the last reset
            self.pool, self._num_blocks = None, 0
        if self.pool is not None and table.num_blocks <= self._num_blocks:
            return
        before, self._num_blocks = self.pool, table.num_blocks
        num_tokens = table.num_blocks * table.block_size
        self.pool = self.compressor.empty(1, self.device, num_tokens).map(torch.Tensor.zero_)
        self.reader = None
        for name in self.pool.names() if before is not None else ():
            held = getattr(before, name)
            getattr(self.pool, name).narrow(before.axis, 0, held.shape[before.axis]).copy_(held)

    def _coded(self, store: PooledTokens, group: FlushGroup, read) -> PooledTokens:
        rows, start, stop, coder = group.rows, group.start, group.stop, self.compressor
        counts = list(store.counts)
        for row in range(len(counts)) if rows is None else rows:
            counts[row] = stop
        packed, picked = store.fitted(counts), None if rows is None else upload(torch.tensor(rows), self.device)
        self._make_pool(packed.table)
        held = self.pool.take(*self._slots(packed.table, picked, (0, 0), coder.context(start)))
        new = coder.code(held, start, stop, read)
        # behind what is held, so that a state of before stays what it was
        self.pool.put(new, *self._slots(packed.table, picked, coder.begin(start), coder.records(stop)))
        return packed

    def _cut(self, store: PooledTokens, counts: list[int]) -> PooledTokens:
        return store.fitted(counts)

    def _lazy_view(self, state: LayerState, layout: Layout):
        # it is read later, when the flush of a long call has written over the raw part
        kept = {name: part.clone() for name, part in state.raw().items()}
        return super()._lazy_view(replace(state, store=self._taken(state.store), **kept), layout)

    def resize(self, sizes: tuple[int, int, int]) -> None:
        """Moves what is held into room for other `sizes`, as of the class."""
        state = self.state
        self.max_cache_len, self.capacity, self.num_raw = sizes
        self.raw_keys = self.raw_values = self.pool = self.reader = None
        self._num_blocks = 0
        self.state = state

    def equip(self, plan: StaticPlan) -> None:
        """Makes the layer ready for the steps of `plan`."""
        self.plan = plan
        for tensor in (self.raw_keys, self.raw_values):
            keep_address(tensor)
        held = self.pool, self.compressor, self.form, self.tables, self.selector
        if self._anchor is None or self._anchor.device != plan.device:
            self._anchor = torch.zeros(1, device=plan.device)
        self.reader = StaticReader(plan, *held, self._anchor)
        self.reader.warm_up(self.raw_keys, self.raw_keys.shape[1])

    def advance(self, num_steps: int) -> None:
        """Counts the tokens of steps that have run."""
        (sinks, tail, pending), packed, columns, num_flushes = self._held
        self._held = (sinks, tail, pending + num_steps), packed, columns + num_steps, num_flushes

    @property
    def table(self) -> BlockTable:
        """The blocks of each row."""
        return self._held[1].table

    @property
    def num_sinks(self) -> int:
        """Places at the beginning of the raw part that are kept for sinks."""
        return self._held[0][0]

    def reset(self) -> None:
        """Forgets everything but the room."""
        super().reset()
        self.reader = None

    def pretend(self, counts: list[int], columns: int) -> None:
        """Holds so many compressed tokens of each row, of random codes, for who measures the time of a step."""
        widths, packed, _, num_flushes = self._held
        packed = packed.fitted(counts)
        self._make_pool(packed.table)
        for part in vars(self.pool).values():
            # numbers of references and levels stay zero: no other are known to be in range
            part.random_(0, 256) if part.dtype == torch.uint8 else part.zero_()
        self._held = widths, packed, columns, num_flushes

    def packed(self) -> dict[str, torch.Tensor]:
        """See `DeltaKVLayer.packed`: the pool."""
        return vars(self.pool)

    def spare(self) -> list[torch.Tensor]:
        """Room that is held while nothing is stored."""
        return [] if self.pool is None else [self.raw_keys, self.raw_values, *vars(self.pool).values()]

    def get_max_length(self) -> int:
        """Columns that it has room for."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    @property
    def reads_choice(self) -> bool:
        """Whether a step reads chosen tokens of the layer's own."""
        return (self.chooses or self.is_told) and not isinstance(self.compressor, Int4Compressor)

    def can_choose(self, selector: Selector) -> bool:
        """Whether the layer's tokens tell which of them matter."""
        if isinstance(self.compressor, Int4Compressor):
            return True
        return isinstance(self.compressor, TransformCompressor) and selector.is_worth_it(
            self.capacity, self.compressor.code_bytes
        )

    # -- a decode step ---------------------------------------------------------------------------------------------

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[StaticStates, StaticStates]:
        """Writes one token of every row, `[batch, num_key_value_heads, 1, head_dim]`, behind the raw ones."""
        handed, self._handed = self._handed, None
        if self.writes_tables:
            self.tables.write(self.plan.columns, *handed)
        place = self.plan.place
        self.raw_keys.index_copy_(2, place, key_states)
        self.raw_values.index_copy_(2, place, value_states)
        return StaticStates(self, key_states), StaticStates(self, value_states)

    def attend_step(
        self, query: torch.Tensor, mask: torch.Tensor | None, scale: float | None, others: dict
    ) -> torch.Tensor:
        """What a step's queries `[batch, num_attention_heads, 1, head_dim]` see, `[batch, 1, num_attention_heads, ..]`.

        Args:
            mask: `[batch, 1, 1, 1]` bool, whether the newest column is no padding; None: it is not.
            scale: of scores; None: by the head's size.
            others: what else the model passes on.
        """
        check_step(query, others)
        plan = self.plan
        if self.is_first:
            plan.note(mask)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        told = plan.chosen if self.is_told else None
        output, chosen = attend_static(
            *(query, self.raw_keys, self.raw_values, plan.raw_bias, told, self.reader.anchor),
            *(scale, self.reader.budget if self.chooses else 0),
        )
        if self.chooses:
            plan.chosen = chosen
        if self.is_last:
            plan.move_on()
        return output


def check_step(query: torch.Tensor, others: dict) -> None:
    """Raises if a step of fixed size can't attend like that."""
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise UnsupportedModelError(
                f"`max_cache_len` must be left out for a model whose attention has `{name}`, got one that has."
            )
    if query.requires_grad and torch.is_grad_enabled():
        raise UnsupportedModelError("a step with `max_cache_len` must run under `torch.no_grad()`, got gradients.")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_there(place: torch.Tensor, new: torch.Tensor) -> bool:
    return new.data_ptr() == place.data_ptr() and new.stride() == place.stride()
