"""Reads what one layer holds: back into dense keys and values, or attended to without ever being dense.

With a calibrated compressor a decode step needs no dense values. Attention is a sum over tokens of weights times
values, a value is its components times a matrix, so the components are summed and multiplied once for each query. Keys
are projected tile by tile, because each is rotated by its own position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import dispatch
from .code_reading import CodeReader
from .compressor import Coder, Int4Compressor, TransformCompressor
from .compressor.blocks import BlockCoder
from .compressor.fused_blocks import FusedStore
from .hf_compat import without_autocast
from .layout import Layout, View
from .masks import mask_of_raw, mask_of_slots
from .rope import RopeForm, RopeTables
from .selection import Selector
from .state import LayerState, gather

# queries of a key-value head that four-bit tokens are read for in one go; more want them dense
FEW_QUERIES = 32
HALVES = (torch.float16, torch.bfloat16)
# a layer whose keys and values would be larger is attended to in parts
DENSE_BYTES = 2**28
# working memory of a read; a tile of tokens is what fits (a GPU pays for launches, a CPU for leaving its cache)
SCRATCH_BYTES = {"cpu": 2**24, "cuda": 2**25}


@dataclass(frozen=True)
class StateReader:
    """A layer's state and what it takes to read it.

    Attributes:
        layout: how the tokens of `state` stand.
        compressor: what coded them.
        form, tables: how keys are rotated; None if they are stored as received.
        num_sink_tokens: tokens that come before the first compressed one.
        device: where the state is.
        selector: chooses the compressed tokens that a decode step reads; None: all.
    """

    state: LayerState
    layout: Layout
    compressor: Coder
    form: RopeForm | None
    tables: RopeTables | None
    num_sink_tokens: int
    device: torch.device
    selector: Selector | None = None

    @without_autocast
    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values `[batch, heads, columns, head_dim]` of all columns."""
        state, compressed, view = self.state, self.layout.compressed, self.layout.view(self.device)
        raw_keys = state.sink_keys, state.tail_keys, state.pending_keys
        raw_values = state.sink_values, state.tail_values, state.pending_values
        batch, num_sinks = state.sink_keys.shape[0], state.sink_keys.shape[2]
        total = compressed + sum(part.shape[2] for part in raw_keys)
        dense = [part.new_empty(*part.shape[:2], total, part.shape[3]) for part in (raw_keys[0], raw_values[0])]
        behind = num_sinks + compressed
        self._decode_store(*(states[:, :, num_sinks:behind] for states in dense))
        for states, (sink, tail, pending) in zip(dense, (raw_keys, raw_values), strict=True):
            states[:, :, :num_sinks] = sink
            states[:, :, behind : behind + tail.shape[2]] = tail
            states[:, :, behind + tail.shape[2] :] = pending
        keys, values = dense
        if view is None:
            return keys, values
        if total == 0:
            # nothing but padding, which is read from any place
            return tuple(part.new_zeros(*part.shape[:2], state.columns, part.shape[3]) for part in dense)
        first_pending = total - state.pending_keys.shape[2]
        pending = torch.arange(first_pending, total, device=self.device).expand(batch, -1)
        slots = torch.cat([view.slots, pending], dim=1)
        return gather(keys, slots), gather(values, slots)

    def _decode_store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Decodes all packed tokens into `keys`, `values` `[batch, heads, n, head_dim]`, keys rotated."""
        references = self.compressor.references(self.state.store) if self.layout.compressed else None
        for start, stop, *work in self._tiles():
            self._decode_tile(references, start, stop, *work, keys[:, :, start:stop], values[:, :, start:stop])

    def _decode_tile(self, references, start, stop, angles, scratch, keys, values) -> None:
        """The same of packed tokens `start .. stop - 1`, of a tile of `_tiles`."""
        heads, key_width, store = keys.shape[1], keys.shape[1] * keys.shape[3], self.state.store
        # [batch, n, heads, head_dim], as tokens are coded
        place_keys, place_values = keys.transpose(1, 2), values.transpose(1, 2)
        for tokens, pick in self.compressor.decode(store, references, start, stop, scratch):
            x_keys, x_values = tokens.split([key_width, tokens.shape[-1] - key_width], dim=-1)
            x_keys, x_values = x_keys.unflatten(-1, (heads, -1)), x_values.unflatten(-1, (heads, -1))
            out_keys = pick(place_keys)
            if angles is not None:
                straight = keys.dtype == torch.float32
                rotated = out_keys if straight else scratch[1, : x_keys.numel()].view(x_keys.shape)
                self.form.apply(x_keys, *(pick(table).unsqueeze(-2) for table in angles), rotated)
                x_keys = rotated
            if x_keys is not out_keys:
                out_keys.copy_(x_keys)
            pick(place_values).copy_(x_values)

    @without_autocast
    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor | None:
        """What attention gives, without dense keys and values.

        Args:
            query: `[batch, num_attention_heads, q, head_dim]`, any floating dtype.
            mask: `[batch or 1, num_attention_heads or 1, q or 1, columns]`, bool (True is seen) or added to the
                scores; fewer leading axes are allowed. None: every column is seen.
            scale: factor of the scores.

        Returns:
            `[batch, num_attention_heads, q, head_dim of values]` in the dtype of `query`; None where decoding is
            the better way: nothing compressed, or few tokens and a compressor without components or many queries.
        """
        heads, value_dim = self.state.tail_values.shape[1], self.state.tail_values.shape[3]
        view = self.layout.view(self.device)
        if not self.layout.compressed:
            return None
        if view is not None and mask is None:
            # every column, but not the places that a shorter row leaves
            mask = query.new_ones(self.state.columns, dtype=torch.bool)
        is_few = query.shape[1] * query.shape[2] <= FEW_QUERIES * heads
        if is_few and isinstance(self.compressor, Int4Compressor):
            return self._attend_int4(query, mask, scale)
        if is_few and isinstance(self.compressor, BlockCoder) and self._has_kernels(query):
            return self._attend_blocks(query, mask, scale)
        # mixing components costs a query of a head as much as projecting one number of every token's values does
        pays = 2 * query.shape[1] * query.shape[2] <= heads * value_dim
        # keys are rotated as complex numbers, which stand in memory two by two
        if not (pays and query.shape[-1] % 2 == 0 and isinstance(self.compressor, TransformCompressor)):
            is_large = self.layout.compressed * self.compressor.width * len(query) * query.element_size() > DENSE_BYTES
            return self._attend_decoded(query, mask, scale) if is_large else None
        rows, bias, raw = self._prepared(query, mask, scale)
        fuses, selector = self._fuses(query), self.selector
        chooses = selector is not None and query.shape[2] == 1
        if chooses and selector.is_worth_it(self.layout.compressed, self.compressor.code_bytes):
            seen = selector.attend(self._codes(scale, fuses), rows, bias, raw)
        elif fuses:
            seen = self._codes(scale, fuses).attend(rows, bias, raw)
        else:
            seen = self._attend_store(rows.float() * scale, bias).merge(raw)
        return seen.output.to(query.dtype).reshape(*query.shape[:3], value_dim)

    def _prepared(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float):
        """Queries of heads that share keys as more rows, their mask of packed tokens, what they see in raw ones."""
        view, num_sinks, masks = self.layout.view(self.device), self.state.sink_keys.shape[2], (None, None)
        queries = query.unflatten(1, (self.state.tail_keys.shape[1], -1))
        rows = queries.flatten(2, 3)
        if mask is not None:
            span = slice(num_sinks, num_sinks + self.layout.compressed)
            masks = mask_of_slots(mask, queries, view, span), self._mask_of_raw(mask, queries, view)
        return rows, masks[0], dispatch.attend(rows, self._raw(), masks[1], scale)

    def _attend_blocks(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The same of whole blocks, read where they are."""
        rows, bias, raw = self._prepared(query, mask, scale)
        store, count, rotation, fusion = self.state.store, self.layout.compressed, None, None
        if isinstance(store, FusedStore):
            fusion = dispatch.Fusion(store.leader, store.scale, store.mean[store.row_groups])
        if self.form is not None:
            view, tables, positions = self.layout.view(self.device), (self.tables.cos, self.tables.sin), None
            span = slice(self.num_sink_tokens, self.num_sink_tokens + count)
            if view is None:
                tables = [table[:, span] for table in tables]
            else:
                positions = view.columns[:, span].int().contiguous()
            rotation = dispatch.Rotation(*tables, self.form.is_interleaved, positions)
        seen = dispatch.attend_blocks(
            *(rows, store.blocks, store.block_table, count, self.state.tail_values.shape[3], fusion, rotation, bias),
            *(None, raw, scale, query.dtype),
        )
        return seen.output.reshape(*query.shape[:3], -1)

    def _attend_int4(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The same of a filter layer, which may choose for those behind it."""
        rows, bias, raw = self._prepared(query, mask, scale)
        batch, count, scores, lengths = len(query), self.layout.compressed, None, None
        encoded = self.state.store.blocks(slice(0, -(-count // dispatch.INT4_GROUP)))
        num_tokens = encoded[0].shape[2]
        if count < num_tokens:
            # a crop has left a part of a block
            lengths = torch.full((batch,), count, dtype=torch.int32, device=self.device)
            bias = None if bias is None else F.pad(bias, (0, num_tokens - count))
        selector = self.selector if query.shape[2] == 1 else None
        if selector is not None and selector.budget(count) < count:
            scores = rows.new_empty(*rows.shape[:3], num_tokens, dtype=torch.float32)
        seen = dispatch.int4_decode(rows, *encoded, bias, None, lengths, scores, raw, scale, query.dtype)
        if scores is not None:
            selector.choose(scores[..., :count], raw, self.layout, self.state.columns)
        return seen.output.view(*query.shape[:3], -1)

    def _attend_decoded(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """The same for many queries: tile after tile is decoded and attended to, never all of them at once."""
        state, compressor, view = self.state, self.compressor, self.layout.view(self.device)
        batch, heads, _, head_dim = state.tail_keys.shape
        num_sinks, value_dim = state.sink_keys.shape[2], state.tail_values.shape[3]
        queries = query.unflatten(1, (heads, -1))
        rows, references = queries.flatten(2, 3), compressor.references(state.store)
        raw_mask = None if mask is None else self._mask_of_raw(mask, queries, view)
        raw = (torch.cat(kind, dim=2).to(query.dtype) for kind in zip(*self._raw(), strict=True))
        seen, tile_mask = dispatch.attend_many(rows, *raw, raw_mask, scale), None
        for start, stop, angles, scratch in self._tiles(0 if mask is None else rows.shape[2]):
            keys, values = (query.new_empty(batch, heads, stop - start, size) for size in (head_dim, value_dim))
            self._decode_tile(references, start, stop, angles, scratch, keys, values)
            if mask is not None:
                tile_mask = mask_of_slots(mask, queries, view, slice(num_sinks + start, num_sinks + stop))
            seen = seen.merge(dispatch.attend_many(rows, keys, values, tile_mask, scale))
        return seen.output.to(query.dtype).reshape(*query.shape[:3], value_dim)

    def _attend_store(self, query: torch.Tensor, mask: torch.Tensor | None) -> dispatch.Attended:
        """What `[batch, heads, queries, head_dim]` see in the packed tokens."""
        heads, head_dim, compressor, store = *query.shape[1::2], self.compressor, self.state.store
        key_width, seen = heads * head_dim, None
        references = compressor.references(store)
        key_map, value_map = torch.cat([compressor.transform.mean[None], references[1]]).tensor_split([key_width], -1)
        if self.form is not None:
            pairs = self.tables.cos.shape[-1]
            query = self.form.paired(query, pairs)
            key_map = self.form.paired(key_map.unflatten(-1, (heads, -1)), pairs).flatten(-2)
        for start, stop, angles, scratch in self._tiles():
            for components, pick in compressor.components(store, references, start, stop, scratch):
                turn = None if angles is None else tuple(pick(table).flatten(1, -2) for table in angles)
                bias = None
                if mask is not None:
                    bias = pick(mask[..., start:stop].movedim(-1, 1))
                    bias = bias.flatten(1, -3).movedim(1, -1)
                components = components.flatten(1, -2)
                scores = dispatch.score(query, components, key_map[0], key_map[1:], turn, scratch[0])
                part = dispatch.weigh(scores, components, bias)
                seen = part if seen is None else seen.merge(part)
        mean, decoder = value_map.unflatten(-1, (heads, -1)).transpose(0, 1).tensor_split([1], 1)
        # a query that sees nothing has no mean either
        output = torch.where(seen.log_total.isneginf(), 0.0, seen.output @ decoder + mean)
        return dispatch.Attended(output, seen.log_total)

    def _fuses(self, query: torch.Tensor) -> bool:
        """Whether one op is the faster way for `query`, as the model made it."""
        # how far the kernel's 32-bit offsets reach into a row
        row_bytes = self.state.store.reference_codes[0].numel(), self.state.store.residual_codes[0].numel()
        return max(row_bytes) < 2**31 and self._has_kernels(query)

    def _has_kernels(self, query: torch.Tensor) -> bool:
        """Whether kernels serve `query`, as the model made it."""
        # tensor cores round to 16 bits, which a model in float32 did not ask for; tiles hold heads of 256
        return query.dtype in HALVES and query.shape[-1] <= 256 and dispatch.has_kernels(self.device)

    def _codes(self, scale: float, fuses: bool) -> CodeReader:
        held = (self.state, self.layout, self.compressor, self.form, self.tables, self.num_sink_tokens, self.device)
        return CodeReader(*held, scale, None if fuses else "reference")

    def _raw(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of sinks, tail and pending tokens."""
        state = self.state
        return [
            (state.sink_keys, state.sink_values),
            (state.tail_keys, state.tail_values),
            (state.pending_keys, state.pending_values),
        ]

    def _mask_of_raw(self, mask: torch.Tensor, queries: torch.Tensor, view: View | None) -> torch.Tensor:
        """Of a host's mask one of sinks, tail and pending tokens, added to the scores."""
        state = self.state
        sizes = state.sink_keys.shape[2], self.layout.compressed, state.tail_keys.shape[2]
        return mask_of_raw(mask, queries, view, *sizes, state.pending_keys.shape[2])

    def _tiles(self, mask_rows: int | None = None) -> Iterator[tuple[int, int, tuple | None, torch.Tensor]]:
        """Ranges `start, stop` of packed tokens, their angles, and `[2, their numbers]` float32 to work in.

        Args:
            mask_rows: for many queries, numbers of a token in a mask of them; None: for a few.
        """
        compressor, view, count = self.compressor, self.layout.view(self.device), self.layout.compressed
        if count == 0:
            return
        batch, stride, width = self.state.tail_keys.shape[0], compressor.lattice.stride, compressor.width
        # the strides that are whole are read without copies; a crop may leave a part of one
        whole = count // stride * stride
        budget = SCRATCH_BYTES.get(self.device.type, SCRATCH_BYTES["cuda"])
        if mask_rows is not None:
            # beside what so many queries take themselves; a tile is read, decoded and masked
            budget, width = 4 * budget, max(compressor.width, mask_rows)
        tile = max(1, budget // (2 * batch * width * 4) // stride) * stride
        # one piece of memory for all tiles: asking for fresh pages costs a CPU more than the arithmetic
        size = batch * min(tile, count) * compressor.width
        scratch = torch.empty(2, size, dtype=torch.float32, device=self.device)
        first, angles = self.num_sink_tokens, None
        edges = sorted({*range(0, whole, tile), whole, count})
        for start, stop in zip(edges, edges[1:], strict=False):
            if self.form is not None and view is None:
                angles = self.tables.rows(slice(None), first + start, first + stop)
            elif self.form is not None:
                angles = self.tables.gather(view.columns[:, first + start : first + stop])
            yield start, stop, angles, scratch
