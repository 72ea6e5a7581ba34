"""A layer of a cache of fixed size: the tokens of a `DeltaKVLayer` in tensors that keep their addresses.

Between decode steps it is a `DeltaKVLayer`: its state is read as views of the buffers, and a new state is written into
them. A decode step of one token goes another way, which a compiler can trace and a graph can repeat: the token is
written behind the raw ones, and attention reads the buffers up to lengths that are tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .compressor import Int4Compressor, TokenStore, TransformCompressor
from .errors import CacheStateError, UnsupportedModelError
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


class StaticLayer(DeltaKVLayer):
    """A cache layer for full attention with room for so many tokens.

    Args:
        *args: as for `DeltaKVLayer`.
        sizes: columns, compressed and raw tokens that a row has room for.

    Attributes:
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
        self.room: TokenStore | None = None
        self.plan: StaticPlan | None = None
        self.reader: StaticReader | None = None
        self.max_cache_len, self.capacity, self.num_raw = sizes
        self.is_first = self.is_last = self.writes_tables = self.chooses = self.is_told = False
        self._held: tuple | None = None
        self._anchor: torch.Tensor | None = None
        super().__init__(*args)

    # -- between steps: the state is views of the buffers ----------------------------------------------------------

    @property
    def state(self) -> LayerState | None:
        if self._held is None:
            return None
        widths, shapes, columns, num_flushes = self._held
        raw, at = [], 0
        for width in widths:
            raw += [self.raw_keys[:, :, at : at + width], self.raw_values[:, :, at : at + width]]
            at += width
        store = type(self.room)(*(_corner(getattr(self.room, name), shape) for name, shape in shapes.items()))
        return LayerState(*raw, store, columns, num_flushes)

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
        self._make_room(state)
        widths = tuple(getattr(state, f"{part}_keys").shape[2] for part in RAW)
        shapes = {name: getattr(state.store, name).shape for name in state.store.names()}
        places = [
            (_corner(getattr(self.room, name), shape), getattr(state.store, name)) for name, shape in shapes.items()
        ]
        for room, kind in ((self.raw_keys, "keys"), (self.raw_values, "values")):
            parts = [getattr(state, f"{part}_{kind}") for part in RAW]
            places += zip(room[:, :, : sum(widths)].split(widths, dim=2), parts, strict=True)
        places = [(place, new) for place, new in places if not _is_there(place, new)]
        # a part that moves within the buffers may be overwritten before it is read
        places = [(place, new.clone() if _storage(new) == _storage(place) else new) for place, new in places]
        for place, new in places:
            place.copy_(new)
        self._held = widths, shapes, state.columns, state.num_flushes

    def _make_room(self, state: LayerState) -> None:
        """Buffers for the rows of `state`, the old ones if they are of the same form."""
        tail, batch = state.tail_keys, state.tail_keys.shape[0]
        num_raw = sum(getattr(state, f"{part}_keys").shape[2] for part in RAW)
        if num_raw > self.num_raw:
            # padding in many short calls
            self.num_raw = 2 * num_raw
        form, room = ((batch, tail.shape[1], self.num_raw, tail.shape[3]), tail.dtype, tail.device), self.raw_keys
        if room is not None and (room.shape, room.dtype, room.device) == form:
            return
        # zeros: what is never read is multiplied by zero
        self.raw_keys, self.raw_values = (
            part.new_zeros(*part.shape[:2], self.num_raw, part.shape[3]) for part in (tail, state.tail_values)
        )
        self.room = self.compressor.empty(batch, tail.device, self.capacity).map(torch.Tensor.zero_)
        self.reader = None

    def resize(self, sizes: tuple[int, int, int]) -> None:
        """Moves what is held into room for other `sizes`, as of the class."""
        state = self.state
        self.max_cache_len, self.capacity, self.num_raw = sizes
        self.raw_keys = self.raw_values = self.room = self.reader = None
        self.state = state

    def equip(self, plan: StaticPlan) -> None:
        """Makes the layer ready for the steps of `plan`."""
        self.plan = plan
        for tensor in (self.raw_keys, self.raw_values):
            keep_address(tensor)
        held = self.room, self.compressor, self.form, self.tables, self.selector
        if self._anchor is None or self._anchor.device != plan.device:
            self._anchor = torch.zeros(1, device=plan.device)
        self.reader = StaticReader(plan, *held, self._anchor)
        self.reader.warm_up(self.raw_keys, self.raw_keys.shape[1])

    def _lazy_view(self, state: LayerState, layout: Layout):
        # it is read later, when the flush of a long call has written over the raw part, and over a part of a block
        kept = {name: part.clone() for name, part in state.raw().items()}
        if isinstance(self.compressor, Int4Compressor):
            kept["store"] = state.store.map(torch.clone)
        return super()._lazy_view(replace(state, **kept), layout)

    def _coded(self, store: TokenStore, group: FlushGroup, read) -> TokenStore:
        # in place: a long store is not copied for a block
        return self.compressor.append(store, group.rows, group.start, group.stop, read, self.room)

    def advance(self, num_steps: int) -> None:
        """Counts the tokens of steps that have run."""
        (sinks, tail, pending), shapes, columns, num_flushes = self._held
        self._held = (sinks, tail, pending + num_steps), shapes, columns + num_steps, num_flushes

    @property
    def num_sinks(self) -> int:
        """Places at the beginning of the raw part that are kept for sinks."""
        return self._held[0][0]

    def reset(self) -> None:
        """Forgets everything but the room."""
        super().reset()
        self.reader = None

    def pretend(self, num_tokens: int, columns: int) -> None:
        """Holds `num_tokens` compressed tokens of random codes, for who measures the time of a step."""
        widths, _, _, num_flushes = self._held
        like = self.compressor.empty(self.raw_keys.shape[0], torch.device("meta"), num_tokens)
        for room in vars(self.room).values():
            # numbers of references and levels stay zero: no other are known to be in range
            room.random_(0, 256) if room.dtype == torch.uint8 else room.zero_()
        self._held = widths, {name: getattr(like, name).shape for name in like.names()}, columns, num_flushes

    def spare(self) -> list[torch.Tensor]:
        """Room that is held while nothing is stored."""
        return [] if self.room is None else [self.raw_keys, self.raw_values, *vars(self.room).values()]

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


def _corner(room: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return room[tuple(slice(size) for size in shape)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_there(place: torch.Tensor, new: torch.Tensor) -> bool:
    return new.data_ptr() == place.data_ptr() and new.stride() == place.stride()
