"""One growing layer of a `DeltaKVCache`: sinks raw | compressed store | tail raw | pending raw.

The stored parts are one immutable `LayerState`; an update makes the next state and hands out a lazy view of the tokens.
The shared `TokenLedger` has decided, once per forward, what is to be sorted and compressed; the layer only does it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import torch

from .compressor import Coder, TokenStore
from .errors import CacheStateError
from .hf_compat import CacheLayerMixin, upload, without_autocast
from .layout import Crop, Flush, FlushGroup, Layout, Step
from .lazy import lazy_pair
from .ledger import TokenLedger
from .reading import StateReader
from .rope import RopeForm, RopeTables
from .selection import Selector
from .state import LayerState, append, gather, pick_tokens, write_rows


class DeltaKVLayer(CacheLayerMixin):
    """A cache layer for full attention; a transformers `CacheLayerMixin` that grows as tokens come.

    Args:
        layer_idx: number of the decoder layer.
        ledger: counts shared with the other layers of the cache.
        make_compressor: function `(heads, key_dim, value_dim, dtype, device) -> compressor`.
        form: how the layer's keys are rotated, or None if they are stored as received.
        registry: the RoPE tables of the cache, which layers share.
        selector: chooses what decode steps read; None: everything.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        layer_idx: int,
        ledger: TokenLedger,
        make_compressor,
        form: RopeForm | None,
        registry,
        selector: Selector | None = None,
    ):
        # the host's constructor sets `keys` and `values`, which are computed here
        self.is_initialized = False
        self.layer_idx = layer_idx
        self.ledger = ledger
        self.form = form
        self.tables: RopeTables | None = None
        self.compressor: Coder | None = None
        self.state: LayerState | None = None
        self.selector = selector
        self._make_compressor = make_compressor
        self._registry = registry
        self._handed: tuple[torch.Tensor, ...] | None = None

    @property
    def held(self) -> LayerState | None:
        """The state, for who does not look into its store."""
        return self.state

    @property
    def columns(self) -> int:
        """Columns seen."""
        return 0 if self.state is None else self.state.columns

    # -- what a forward does -------------------------------------------------------------------------------------

    def receive_tables(self, *tables: torch.Tensor) -> None:
        """Announces an `update` and takes its RoPE tables cos, sin `[1 or batch, q, width]`, if the layer rotates."""
        self._handed = tables

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the empty state with the heads, dtype and device of the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        dims = key_states.shape[-1], value_states.shape[-1]
        self.compressor = self._make_compressor(heads, *dims, self.dtype, self.device)
        raw = [states[:, :, :0].clone() for _ in range(3) for states in (key_states, value_states)]
        self.state = LayerState(*raw, store=self._empty(batch))
        self.is_initialized = True

    def _empty(self, batch: int) -> TokenStore:
        """A store of rows that hold nothing."""
        return self.compressor.empty(batch, self.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Stores new tokens and returns keys and values of all columns seen.

        Args:
            key_states, value_states: `[batch, num_key_value_heads, q, head_dim]`, keys after rotation.

        Returns:
            The arguments themselves if nothing was held before, else a pair of lazy tensors
            `[batch, num_key_value_heads, columns, head_dim]`.
        """
        if key_states.requires_grad or value_states.requires_grad:
            raise CacheStateError(
                "`key_states` must not require grad: stored bytes carry no gradient. Run the model under "
                "`torch.no_grad()`."
            )
        # the layer before is coded while this one has computed what it stores
        self.ledger.side.join()
        self._check_handed()
        step = self.ledger.arrive(self.columns, key_states.shape[0], key_states.shape[2])
        if step.past == 0 and not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._take_tables(step)
        view = self._store(step, key_states, value_states)
        self.ledger.depart()
        return view

    def _store(self, step: Step, key_states: torch.Tensor, value_states: torch.Tensor):
        """Does `step`. The state is replaced whole: an interrupt leaves the one before or the one after."""
        self.prefetch()
        if step.before is not None and self.held.num_flushes < step.before.number:
            self.state = self._flushed(self.held, step.before)
        held = self.held
        state = replace(
            held,
            pending_keys=append(held.pending_keys, key_states),
            pending_values=append(held.pending_values, value_states),
            columns=step.past + step.query_length,
        )
        view = self._lazy_view(state, step.layout) if step.past else (key_states, value_states)
        if step.after is not None:
            self._code(state, step)
            return view
        if state.pending_keys is key_states:
            # a view of the model's buffer would keep all of it alive
            state = replace(state, pending_keys=key_states.clone(), pending_values=value_states.clone())
        self.state = state
        return view

    def _code(self, state: LayerState, step: Step) -> None:
        """Does the flush behind a long call."""

        def work() -> None:
            self.state = self._flushed(state, step.after)

        if step.past or self.ledger.is_last:
            # the attention of the call reads the store, or nothing is left to compute beside
            work()
        else:
            self.ledger.side.run(self.device, work, state.pending_keys, state.pending_values)

    def has_begun(self, step: Step) -> bool:
        """Whether the layer has changed in a forward that was broken off."""
        flushed = step.before is not None and self.is_initialized and self.held.num_flushes >= step.before.number
        return flushed or self.columns > step.past

    def complete(self, step: Step) -> None:
        """Takes zeros for the tokens of a forward that was broken off before this layer; `crop` removes them."""
        if self.tables is not None:
            self.tables.pad(step.past + step.query_length)
        raw = self.held.tail_keys, self.held.tail_values
        self._store(step, *(part.new_zeros(*part.shape[:2], step.query_length, part.shape[3]) for part in raw))
        self.ledger.side.join()

    def _check_handed(self) -> None:
        if self._handed is None or (self.form is not None and len(self._handed) != 2):
            raise CacheStateError(
                f"layer {self.layer_idx} must be handed the RoPE tables of every forward before `update`, got none: "
                "the cache is used with a model that it was not made for. Make it with `DeltaKVCache(model)`."
            )

    def _take_tables(self, step: Step) -> None:
        handed, self._handed = self._handed, None
        if self.form is None:
            return
        cos, sin = handed
        if cos.ndim != 3 or cos.shape[1] != step.query_length or cos.shape[0] not in (1, self.ledger.batch_size):
            raise CacheStateError(
                f"the RoPE tables of layer {self.layer_idx} must be [1 or {self.ledger.batch_size}, "
                f"{step.query_length}, width], got {tuple(cos.shape)}."
            )
        if self.tables is None:
            self.tables = self._registry.find(self.form, cos, sin)
        self.tables.extend(cos, sin, step.past)

    def _lazy_view(self, state: LayerState, layout: Layout):
        raw = state.pending_keys, state.pending_values
        shapes = [(*part.shape[:2], state.columns, part.shape[-1]) for part in raw]
        return lazy_pair(self._reader(state, layout), *shapes, *raw)

    def _reader(self, state: LayerState, layout: Layout) -> StateReader:
        num_sinks = self.ledger.config.num_sink_tokens
        held = (state, layout, self.compressor, self.form, self.tables, num_sinks, self.device)
        return StateReader(*held, self.selector)

    # -- flush: raw tokens into the store ------------------------------------------------------------------------

    def flush(self, flush: Flush) -> None:
        """Does a flush that the ledger has decided between forwards."""
        if self.is_initialized:
            away = self._is_away()
            self.prefetch()
            self.state = self._flushed(self.held, flush)
            if away:
                self.offload()

    @without_autocast
    def _flushed(self, state: LayerState, flush: Flush) -> LayerState:
        if flush.number != state.num_flushes + 1:
            raise CacheStateError(f"layer {self.layer_idx} missed a flush; call `cache.reset()`.")
        keys, values = append(state.tail_keys, state.pending_keys), append(state.tail_values, state.pending_values)
        idx = None if flush.source_idx is None else upload(flush.source_idx, self.device)
        sinks, store = (state.sink_keys, state.sink_values), state.store
        for group in flush.groups:
            rows = slice(None) if group.rows is None else upload(torch.tensor(group.rows), self.device)
            if group.start == 0 and group.offset:
                sinks = tuple(
                    write_rows(held, pick_tokens(source, rows, idx, 0, group.offset), rows)
                    for held, source in zip(sinks, (keys, values), strict=True)
                )

            def read(start: int, stop: int, group=group, rows=rows) -> torch.Tensor:
                offset = group.offset - group.start
                pieces = [pick_tokens(source, rows, idx, start + offset, stop + offset) for source in (keys, values)]
                return self._join(*pieces, group, rows, start, stop)

            store = self._coded(store, group, read)
        if flush.tail_idx is None:
            tail = [source[:, :, flush.tail_start :].clone() for source in (keys, values)]
        else:
            tail_idx = upload(flush.tail_idx, self.device)
            tail = [gather(source, tail_idx) for source in (keys, values)]
        empty = [part[:, :, :0].clone() for part in tail]
        return LayerState(*sinks, *tail, *empty, store, state.columns, flush.number)

    def _coded(self, store: TokenStore, group: FlushGroup, read) -> TokenStore:
        """`store` with the tokens of `group` that `read` gives."""
        return self.compressor.append(store, group.rows, group.start, group.stop, read)

    def _join(self, keys, values, group: FlushGroup, rows, start: int, stop: int) -> torch.Tensor:
        """Raw `[rows, heads, n, head_dim]` of compressed tokens `start .. stop - 1`, as they are coded."""
        angles = None
        if self.form is not None:
            first = self.ledger.config.num_sink_tokens
            columns = group.columns(first + start, first + stop)
            if columns is None:
                angles = self.tables.rows(rows, first + start, first + stop)
            else:
                angles = self.tables.gather(upload(columns, self.device), rows)
        return self.compressor.prepare(keys, values, angles, self.form is not None and self.form.is_interleaved)

    # -- what else the host asks of a layer ----------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first token."""
        return self.ledger.batch_size or -1

    def get_seq_length(self) -> int:
        """Columns seen (not tokens stored)."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next forward's mask must cover."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every stored tensor by `change(tensor)`."""
        if self.is_initialized:
            self.state = self.state.map(change)

    def select(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor `[batch, ..]` by `change(tensor)`, which picks rows."""
        self.map(change)

    def drop_sinks(self) -> None:
        """Lets go of the room for sinks: no row has a compressed token any more."""
        if self.is_initialized:
            self.state = self.held.without_sinks()

    def crop_to(self, crop: Crop) -> None:
        """Forgets the newest columns, those in the store included: what stays of it keeps its codes."""
        self._handed = None
        if self.is_initialized:
            self.state = self.held.crop(crop, self._cut)

    def _cut(self, store: TokenStore, counts: list[int]) -> TokenStore:
        """`store` with so many tokens of each row; what stays keeps its codes."""
        return self.compressor.cut(store, max(counts))

    def expected_store(self, store: TokenStore) -> TokenStore:
        """A store on the meta device as `store`, out of a file, must look: it may have room for more than is held."""
        meta, batch_size, least = torch.device("meta"), self.ledger.batch_size, max(self.ledger.compressed, default=0)

        def size(held) -> int:
            return sum(part[:1].numel() for part in vars(held).values() if torch.is_tensor(part) and part.ndim > 1)

        def size_of(count: int) -> int:
            return size(self.compressor.empty(batch_size, meta, count))

        count = bisect_left(range(self.ledger.columns), size(store), lo=least, key=size_of)
        return self.compressor.empty(batch_size, meta, count)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys (rotated) and values `[batch, num_key_value_heads, columns, head_dim]`, padding zero."""
        self.ledger.check_whole()
        if not self.is_initialized:
            raise CacheStateError(f"layer {self.layer_idx} must hold tokens, got none. Feed the model a prompt first.")
        self.ledger.settle()
        state = self.state.map(lambda part: part.to(self.device))
        keys, values = self._reader(state, self.ledger.layout).decode()
        padding = self.ledger.padding()
        if padding is not None:
            padding = upload(padding, self.device)[:, None, :, None]
            keys, values = keys.masked_fill_(padding, 0), values.masked_fill_(padding, 0)
        return keys, values

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, decoded anew each time; None before the first token."""
        return self.dequantize()[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:
        """All values, decoded anew each time; None before the first token."""
        return self.dequantize()[1] if self.is_initialized else None

    # -- offloading ----------------------------------------------------------------------------------------------

    def _is_away(self) -> bool:
        return self.is_initialized and self.held.tail_keys.device != self.device

    def offload(self) -> None:
        """Moves what is stored to the CPU."""
        self.ledger.side.join()
        self.map(lambda part: part.to("cpu"))

    def prefetch(self) -> None:
        """Moves what is stored back to the layer's device."""
        if self._is_away():
            self.map(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets everything."""
        self.state = self.compressor = self.tables = self._handed = None
        self.is_initialized = False
        if self.selector is not None:
            self.selector.reset()

    def packed(self) -> dict[str, torch.Tensor]:
        """What packed tokens stand in, by the names of a store's fields."""
        return vars(self.state.store)

    def spare(self) -> list[torch.Tensor]:
        """Room that is held while nothing is stored."""
        return []

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer_idx={self.layer_idx}, columns={self.columns})"
