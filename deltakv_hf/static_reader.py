"""Attention of a decode step to a layer of fixed size: one op of torch, which graphs record and compilers leave alone.

The op finds its reader by the address of a tensor that belongs to the layer: what it reads of the layer's codes has a
fixed place, and a number in its stead would be compiled in.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from . import dispatch
from .code_reading import CodeReader, Kind
from .compressor import Coder, Int4Compressor, TokenStore, TransformCompressor
from .compressor.vectors import TokenVectors
from .layout import View
from .reading import StateReader
from .rope import RopeForm, RopeTables
from .selection import Selector
from .state import LayerState
from .static_plan import StaticPlan, keep_address

_READERS: weakref.WeakValueDictionary[int, StaticReader] = weakref.WeakValueDictionary()


class StaticReader:
    """What it takes to read one layer of fixed size.

    Args:
        plan, pool, compressor: of the layer.
        form, tables: how keys are rotated; None if they are stored as received.
        selector: chooses tokens; None: all are read.
        anchor: `[1]`, by its address an op finds this reader.

    Attributes:
        budget: tokens of a choice.
    """

    def __init__(
        self,
        plan: StaticPlan,
        pool: TokenStore,
        compressor: Coder,
        form: RopeForm | None,
        tables: RopeTables | None,
        selector: Selector | None,
        anchor: torch.Tensor,
    ):
        self.plan, self.pool, self.compressor = plan, pool, compressor
        self.form, self.tables = form, tables
        self.budget = 0 if selector is None else min(selector.budget(plan.capacity), plan.capacity)
        self.index_bytes = 0 if selector is None else selector.options.index_bytes
        # as readers of growing layers know it, with all its room
        none = torch.empty(plan.batch_size, 1, 0, 1, device=plan.device)
        self._state, self._layout = LayerState(*[none] * 6, pool), _FullLayout(plan)
        self.anchor = anchor
        keep_address(anchor)
        _READERS[anchor.data_ptr()] = self

    def __deepcopy__(self, memo: dict) -> None:
        # a copy of the layer makes its own
        return None

    def attend(
        self,
        query: torch.Tensor,
        raw_keys: torch.Tensor,
        raw_values: torch.Tensor,
        raw_bias: torch.Tensor,
        slots: torch.Tensor | None,
        scale: float,
        num_chosen: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `attend_static`."""
        rows = query.unflatten(1, (raw_keys.shape[1], -1)).flatten(2, 3)
        raw = dispatch.attend(rows, [(raw_keys, raw_values)], raw_bias[:, None, None], scale)
        if isinstance(self.compressor, Int4Compressor):
            seen, slots = self._attend_int4(rows, raw, scale, num_chosen)
        elif isinstance(self.compressor, TransformCompressor):
            seen, slots = self._attend_codes(rows, raw, slots, scale, num_chosen)
        else:
            seen = self._attend_decoded(rows, raw, scale)
        output = seen.output.to(query.dtype).reshape(*query.shape[:3], -1)
        return output.transpose(1, 2).contiguous(), slots

    def _attend_codes(
        self, rows: torch.Tensor, raw: dispatch.Attended, slots: torch.Tensor | None, scale: float, num_chosen: int
    ) -> tuple[dispatch.Attended, torch.Tensor | None]:
        codes = self._codes(rows, scale)
        if num_chosen:
            scores = codes.score(rows, None, self.index_bytes)
            slots = dispatch.choose(scores, raw.log_total, num_chosen, codes.backend)
        if slots is None and codes.backend is not None:
            # as a growing layer does where no kernel fuses it
            return self._state_reader(self._taken())._attend_store(rows.float() * scale, self._bias()).merge(raw), None
        return codes.attend(rows, None, raw, slots), slots

    def _codes(self, query: torch.Tensor, scale: float) -> StaticCodeReader:
        plan, fuses = self.plan, self._state_reader()._has_kernels(query)
        held = (self._state, self._layout, self.compressor, self.form, self.tables, plan.num_sink_tokens)
        return StaticCodeReader(*held, plan.device, scale, None if fuses else "reference", plan)

    def _taken(self) -> LayerState:
        """All tokens that there is room for as a growing layer holds them."""
        references, others = self.plan.kinds[self.compressor.lattice.stride]
        numbers = self.compressor.records(self.plan.capacity)
        slots = references.slot_map, (others or references).slot_map
        store = self.pool.take(*(part[:, :number] for part, number in zip(slots, numbers, strict=True)))
        return replace(self._state, store=store)

    def _state_reader(self, state: LayerState | None = None) -> StateReader:
        tables = None if self.tables is None else self.tables.whole()
        held = (self.compressor, self.form, tables, self.plan.num_sink_tokens, self.plan.device)
        return StateReader(self._state if state is None else state, self._layout, *held)

    def _bias(self) -> torch.Tensor:
        """Added to the scores of compressed tokens, `[batch, 1, 1, capacity]` float32: -inf behind a row's last."""
        tokens = torch.arange(self.plan.capacity, device=self.plan.device)
        is_behind = tokens >= self.plan.compressed[:, None]
        return torch.zeros(is_behind.shape, device=self.plan.device).masked_fill_(is_behind, -torch.inf)[:, None, None]

    def warm_up(self, like: torch.Tensor, heads: int) -> None:
        """Makes what codes are read by, which a recorded graph must find made.

        Args:
            like: `[.., head_dim]`, in the dtype of queries.
            heads: of keys.
        """
        if isinstance(self.compressor, TransformCompressor):
            codes, transform = self._codes(like, 1.0), self.compressor.transform
            made = [transform.reference_vectors]
            if not self.compressor.lattice.is_everywhere:
                made.append(transform.residual_vectors)
            if self.index_bytes:
                made += [vectors for vectors in transform.leading_vectors(self.index_bytes) if vectors is not None]
            for coded in made:
                codes._maps(coded, heads, like.shape[-1])

    def _attend_int4(
        self, rows: torch.Tensor, raw: dispatch.Attended, scale: float, num_chosen: int
    ) -> tuple[dispatch.Attended, torch.Tensor | None]:
        plan, scores, blocks = self.plan, None, self.plan.int4_blocks
        if plan.batch_size == 1:
            # a single row's blocks stand in order, and are read faster as they are
            encoded, blocks = self.pool.blocks(slice(blocks.shape[1])), None
        else:
            encoded = [part.expand(plan.batch_size, *part.shape[1:]) for part in self.pool.blocks()]
        if num_chosen:
            scores = rows.new_empty(*rows.shape[:3], plan.capacity, dtype=torch.float32)
        where = None, blocks, plan.compressed
        seen = dispatch.int4_decode(rows, *encoded, *where, scores, raw, scale, torch.float32)
        return seen, dispatch.choose(scores, raw.log_total, num_chosen) if num_chosen else None

    def _attend_decoded(self, rows: torch.Tensor, raw: dispatch.Attended, scale: float) -> dispatch.Attended:
        """Of a compressor without components: tile after tile is decoded and attended to."""
        reader, seen, bias = self._state_reader(self._taken()), raw, self._bias()
        references = self.compressor.references(reader.state.store)
        for start, stop, angles, scratch in reader._tiles():
            shape = *rows.shape[:2], stop - start
            keys, values = (rows.new_empty(*shape, size) for size in (rows.shape[-1], raw.output.shape[-1]))
            reader._decode_tile(references, start, stop, angles, scratch, keys, values)
            seen = seen.merge(dispatch.attend_many(rows, keys, values, bias[..., start:stop], scale))
        return seen


class _FullLayout:
    """What `StateReader` asks of a layout, of a store with all its room."""

    def __init__(self, plan: StaticPlan):
        self.compressed, self._plan = plan.capacity, plan

    def view(self, device: torch.device) -> View:
        columns = self._plan.token_columns.long()
        return View(columns, torch.nn.functional.pad(columns, (self._plan.num_sink_tokens, 0)), columns)


@dataclass(frozen=True)
class StaticCodeReader(CodeReader):
    """The compressed tokens of a layer of fixed size, as far as they go.

    Attributes:
        plan: of the cache.
    """

    plan: StaticPlan

    def _kinds(self, reference: TokenVectors, residual: TokenVectors | None) -> Iterator[Kind]:
        """See `CodeReader`; they stand in slots of a pool, as far as lengths say."""
        pool, (own, others) = self.state.store, self.plan.kinds[self.compressor.lattice.stride]
        codes = pool.reference_codes.expand(self.plan.batch_size, -1, -1)
        yield Kind(True, codes, reference, None, own.offsets, own.lengths, own.slot_map)
        if others is not None:
            idx = pool.reference_idx[..., 0].expand(self.plan.batch_size, -1)
            references = dispatch.References(codes, idx, *residual.added, own.slot_map)
            codes = pool.residual_codes.expand(self.plan.batch_size, -1, -1)
            yield Kind(False, codes, residual, references, others.offsets, others.lengths, others.slot_map)

    def _offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CodeReader`."""
        references, others = self.plan.kinds[self.compressor.lattice.stride]
        return references.offsets, others.offsets

    def _listed(self, kind: Kind, slots: torch.Tensor):
        """See `CodeReader`; slots beyond a row's length come last, and are no tokens."""
        lengths = self.plan.compressed
        if kind.offsets is None:
            return slots, slots, lengths.clamp(max=slots.shape[1])
        return self._sorted_out(kind, slots, slots < lengths[:, None])

    def _rotation(self, tokens: torch.Tensor | None) -> dispatch.Rotation | None:
        """See `CodeReader`; `tokens` `[n]` are those of a kind."""
        if self.form is None:
            return None
        plan = self.plan
        if tokens is None:
            columns = plan.token_columns
        elif tokens.ndim == 1:
            kinds = plan.kinds[self.compressor.lattice.stride]
            columns = next(kind.columns for kind in kinds if kind.offsets is tokens)
        else:
            columns = plan.token_columns.gather(1, tokens.long())
        return dispatch.Rotation(*self.tables.room, self.form.is_interleaved, columns)


@torch.library.custom_op("deltakv_hf::attend", mutates_args=())
def attend_static(
    query: torch.Tensor,
    raw_keys: torch.Tensor,
    raw_values: torch.Tensor,
    raw_bias: torch.Tensor,
    slots: torch.Tensor | None,
    anchor: torch.Tensor,
    scale: float,
    num_chosen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a step sees in raw and compressed tokens of one layer.

    Args:
        query: `[batch, num_attention_heads, 1, head_dim]`.
        raw_keys, raw_values: `[batch, num_key_value_heads, num_raw, head_dim]`.
        raw_bias: `[batch, num_raw]` float32, added to the scores of raw tokens.
        slots: `[batch, n]` int32, the compressed tokens to read, ascending; None: all, or those that it chooses.
        anchor: of the layer's reader.
        scale: of scores.
        num_chosen: how many tokens the layer chooses; 0: it doesn't.

    Returns:
        `[batch, 1, num_attention_heads, value_dim]` in the dtype of `query`; what was chosen, `[batch, num_chosen]`
        int32, ascending.
    """
    reader = _READERS[anchor.data_ptr()]
    output, chosen = reader.attend(query, raw_keys, raw_values, raw_bias, slots, scale, num_chosen)
    return output, chosen if num_chosen else torch.empty(0, dtype=torch.int32, device=query.device)


@attend_static.register_fake
def _(query, raw_keys, raw_values, raw_bias, slots, anchor, scale, num_chosen):
    batch, heads, num_queries, _ = query.shape
    output = query.new_empty(batch, num_queries, heads, raw_values.shape[-1])
    shape = (batch, num_chosen) if num_chosen else (0,)
    return output, torch.empty(shape, dtype=torch.int32, device=query.device)
