"""Runs the decode steps of a cache of fixed size: what is decided before each, outside of what is compiled.

A step changes tensors only. How many have run is read from the device when somebody asks, and the counts of ledger and
layers follow; tokens that have left the window are compressed, as before any forward of a growing cache.
"""

from __future__ import annotations

import math

import torch

from .block_table import BlockPool
from .config import DeltaKVConfig, check_integer
from .errors import CacheStateError, InvalidOptionError
from .hf_compat import upload
from .ledger import TokenLedger
from .rope import RopeRegistry
from .static_layer import StaticLayer
from .static_plan import StaticPlan
from .static_window import StaticWindowLayer, live_places, new_live


class StaticRun:
    """The fixed-size part of a cache.

    Args:
        max_cache_len: columns that it has room for.
        ledger, registry: of the cache.
        layers, windows: those of fixed size.
    """

    def __init__(
        self,
        max_cache_len: int,
        ledger: TokenLedger,
        registry: RopeRegistry,
        layers: list[StaticLayer],
        windows: list[StaticWindowLayer],
    ):
        self.max_cache_len, self.ledger, self.registry = max_cache_len, ledger, registry
        self.layers, self.windows = layers, windows
        # by places of a ring
        self.live: dict[int, torch.Tensor] = {}
        self.plan: StaticPlan | None = None
        self.rooms: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def tensors(self) -> list[torch.Tensor]:
        """What is held beside the layers and the RoPE tables in use."""
        spare = self.rooms[len(self.registry.tables) :]
        rooms = [table for room in spare if room is not None for table in room]
        return rooms + ([] if self.plan is None else [*self.plan.tensors(), *self.live.values()])

    @property
    def is_ready(self) -> bool:
        """Whether a step may run."""
        return self.plan is not None and self.plan.is_ready

    def stop(self) -> None:
        """Has the next step prepared anew."""
        if self.plan is not None:
            self.plan.is_ready = False

    def check_length(self, query_length: int) -> None:
        """Raises if so many more columns do not fit."""
        columns = self.ledger.columns + query_length
        if columns > self.max_cache_len:
            raise CacheStateError(
                f"`max_cache_len` must be at least {columns} for {query_length} more tokens behind "
                f"{self.ledger.columns}, got {self.max_cache_len}: call `cache.resize({columns})` or more."
            )

    def resize(self, sizes: tuple[int, int, int], max_pool_tokens: int | None) -> None:
        """Moves what is held into room for other `sizes`, as of a layer; the next step is recorded anew."""
        pool = BlockPool(self.ledger.pool.block_size, max_pool_tokens)
        try:
            pool.check(self.ledger.compressed)
        except CacheStateError as error:
            raise InvalidOptionError(str(error)) from None
        self.ledger.pool = pool
        with self.ledger.changing("resize"):
            for layer in self.layers:
                layer.resize(sizes)
            for window in self.windows:
                window.resize(sizes[0])
        for tables in self.registry.tables:
            tables.leave_room()
        self.max_cache_len, self.plan, self.rooms = sizes[0], None, []

    def catch_up(self) -> None:
        """Counts the steps that have run."""
        if not self.is_ready:
            return
        columns, num_padding = self.plan.counts.tolist()
        if num_padding:
            raise CacheStateError(
                "`attention_mask` must be 1 at the token of a step with `max_cache_len`, got padding: what a step adds "
                "counts as real. Call `cache.reset()`."
            )
        num_steps = columns - self.ledger.columns
        if num_steps == 0:
            return
        self.ledger.take_steps(num_steps)
        most = max(self.ledger.compressed)
        for layer in self.layers:
            layer.advance(num_steps)
            if layer.reads_choice:
                layer.selector.count(num_steps, self.ledger.batch_size, most)
        for window in self._stepping():
            window.advance(num_steps)
        for tables in self.registry.tables:
            tables.take(self.ledger.columns)

    def prepare(self) -> bool:
        """Makes everything ready for a step of one token; False if the cache holds nothing, or a forward is running."""
        ledger = self.ledger
        if ledger.columns == 0 or ledger.step is not None or ledger.torn is not None:
            return False
        self.catch_up()
        ledger.settle()
        self.check_length(1)
        flush = ledger.make_flush()
        if flush is not None:
            with ledger.changing("flush"):
                for layer in self.layers:
                    layer.flush(flush)
        if not self.is_ready:
            self._write()
        return True

    def _write(self) -> None:
        first = self.layers[0]
        form = self.ledger.batch_size, first.num_raw, first.device
        if self.plan is None or (self.plan.batch_size, self.plan.num_raw, self.plan.device) != form:
            self._make_plan()
        columns = max(self.max_cache_len, self.plan.capacity + self.plan.num_sink_tokens)
        self.rooms += [None] * (len(self.registry.tables) - len(self.rooms))
        for number, tables in enumerate(self.registry.tables):
            self.rooms[number] = tables.reserve(columns, self.plan.batch_size, self.rooms[number])
        written, last = set(), max([*self.layers, *self._stepping()], key=lambda layer: layer.layer_idx)
        for layer in self.layers:
            layer.writes_tables = layer.tables is not None and id(layer.tables) not in written
            written.add(id(layer.tables))
            layer.is_first, layer.is_last = layer is first, layer is last
            if layer.reader is None or layer.plan is not self.plan:
                layer.equip(self.plan)
        self._assign_choices()
        self._write_windows(last)
        self.plan.write(self.ledger, first.table, first.num_sinks)
        self.plan.is_ready = True

    def _stepping(self) -> list[StaticWindowLayer]:
        """Windows whose steps are of fixed size, too."""
        return [window for window in self.windows if window.is_compileable]

    def _write_windows(self, last: object) -> None:
        ledger, written = self.ledger, set()
        for window in self._stepping():
            if window.size not in self.live:
                self.live[window.size] = new_live(ledger.batch_size, window.size, self.plan.device)
            live = self.live[window.size]
            window.is_first, window.is_last = window.size not in written, window is last
            window.equip(self.plan, live)
            if window.is_first:
                places = live_places(window.size, ledger.columns, ledger.row_columns, ledger.batch_size)
                live.copy_(upload(places, self.plan.device))
                written.add(window.size)

    def _make_plan(self) -> None:
        devices = {layer.device for layer in (*self.layers, *self._stepping())}
        if len(devices) > 1:
            raise InvalidOptionError(
                f"`max_cache_len` must be left out for a model on several devices, got {sorted(map(str, devices))}."
            )
        first, num_sinks = self.layers[0], self.ledger.config.num_sink_tokens
        strides = {layer.compressor.lattice.stride for layer in self.layers}
        self.live = {}
        sizes = self.ledger.batch_size, first.capacity, first.num_raw, num_sinks
        self.plan = StaticPlan(*sizes, strides, self.ledger.pool.block_size, devices.pop())

    def _assign_choices(self) -> None:
        """Which layers choose tokens, and which read what another has chosen."""
        chooser = None
        for layer in self.layers:
            layer.chooses = layer.is_told = False
            selector = layer.selector
            if selector is None or selector.budget(self.plan.capacity) >= self.plan.capacity:
                continue
            if selector.first == layer.layer_idx:
                chooser = None
            if selector.options.selection != "filter_layers" and not layer.can_choose(selector):
                continue
            if chooser is not None:
                layer.is_told = True
            elif layer.can_choose(selector):
                layer.chooses, chooser = True, layer


def check_max_cache_len(max_cache_len: object, config: DeltaKVConfig, offloading: bool) -> None:
    """Raises unless a cache with these options can be of this size."""
    check_integer("max_cache_len", max_cache_len, low=1)
    refused = {
        "reference_growth": config.reference_growth,
        "sample_every": config.sample_every,
        "offloading": offloading,
    }
    for name, value in refused.items():
        if value:
            raise InvalidOptionError(f"`{name}` must be {type(value)(0)} with `max_cache_len`, got {value!r}.")


def check_max_pool_tokens(max_pool_tokens: object, max_cache_len: int | None) -> None:
    """Raises unless a cache of so many columns, or of none, can have a pool of so many tokens."""
    if max_pool_tokens is None:
        return
    check_integer("max_pool_tokens", max_pool_tokens, low=1)
    if max_cache_len is None:
        raise InvalidOptionError(
            f"`max_pool_tokens` must be None without `max_cache_len`, got {max_pool_tokens}: a cache that grows takes "
            "memory as tokens come."
        )


def pool_block_size(strides: set[int]) -> int:
    """Tokens of a block of a pool: whole strides of every lattice; four-bit tokens stand in blocks of 32."""
    return math.lcm(32, *strides)


def static_sizes(config: DeltaKVConfig, max_cache_len: int, whole: int) -> tuple[int, int, int]:
    """Columns, compressed and raw tokens of a row that a cache of `max_cache_len` columns has room for.

    Args:
        whole: compressed tokens of a block.
    """
    block, behind = config.block_size, max_cache_len - config.num_sink_tokens - config.recent_window
    capacity = max(whole, -(-behind // whole) * whole)
    # sinks may stand in the tail; a short call may come on top of tokens that wait for a flush
    return max_cache_len, capacity, 2 * config.num_sink_tokens + config.recent_window + 4 * block
