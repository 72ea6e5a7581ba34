"""Who stands where: per-row counts of real tokens, shared by all layers of a cache.

A *column* is a position of the model's 2-D attention mask, padding included. A *token* is a real one, counted in its
own row. Tokens of a row stand, in order, in the sinks, the compressed store and the raw tail; the columns of the last
short calls are *pending* behind the tail, pads and all, until the next flush sorts them in. All decisions are made on
the host from the masks of the calls; nothing here waits for the device except a prefill's own mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch

from .block_table import BlockPool
from .config import DeltaKVConfig
from .errors import CacheStateError
from .hf_compat import HostCopy
from .layout import Crop, Flush, FlushGroup, Layout, Step, stack
from .references import Lattice, check_num_references
from .side_stream import SideStream
from .stats import CacheStats


@dataclass
class TokenLedger:
    """Counts of one cache.

    Attributes:
        columns: columns seen, those of the running forward included.
        merged: columns whose tokens are sorted into sinks, store and tail; the others are pending.
        seen: real tokens of each row among the columns whose mask is known.
        compressed: compressed tokens of each row.
        tail_lengths, tail_width: real tokens in each row's tail, and the width of the tail tensors.
        row_columns: column of each real token by row (CPU int64), or None while no padding was seen.
        released: how many columns of each row were given up, whatever masks say of them; empty while none were.
        layout: where tokens stand now.
        step: the running forward, until it has reached every layer.
        num_layers, num_arrived: layers that share the ledger, and those that the running forward has been through.
        stats: what the cache has done so far.
        side: where layers code a long prompt.
        pool: of a cache of fixed size, what has to have room for compressed tokens.
        serial, closed_serial: number of the newest forward that a module has begun, and of the newest that has been
            through every layer of ours.
        torn: the operation between forwards that is changing the layers one by one, or was broken off.
    """

    config: DeltaKVConfig
    batch_size: int = 0
    columns: int = 0
    merged: int = 0
    seen: list[int] = field(default_factory=list)
    compressed: list[int] = field(default_factory=list)
    tail_lengths: list[int] = field(default_factory=list)
    tail_width: int = 0
    released: list[int] = field(default_factory=list)
    row_columns: list[torch.Tensor] | None = None
    num_flushes: int = 0
    step: Step | None = None
    layout: Layout | None = None
    num_layers: int = 0
    num_arrived: int = 0
    stats: CacheStats = field(default_factory=CacheStats)
    side: SideStream = field(default_factory=SideStream)
    pool: BlockPool | None = None
    serial: int = 0
    closed_serial: int = 0
    torn: str | None = None
    _noted: list[torch.Tensor | None] = field(default_factory=list)
    _noting: tuple[int, ...] = ()
    _noted_at: int | None = None
    _thread: int | None = None
    _before_step: dict | None = None
    _settled: int = 0
    _arriving: HostCopy | None = None

    def begins(self, outermost: bool, module: object) -> bool:
        """Whether `module` begins a forward; if not, it stands inside the one that does."""
        # a module that comes again before any layer does begins anew: its first try has failed
        return outermost or not self._noted or id(module) in self._noting

    @property
    def needs_rows(self) -> bool:
        """Whether `select_rows` must be told which rows, not only how many."""
        return self.row_columns is not None

    def note_mask(self, attention_mask: object, outermost: bool, module: object = None) -> None:
        """Takes the mask argument of the coming forward; modules inside the one that began it do not override it."""
        if self.begins(outermost, module):
            self._noted, self._noting = [attention_mask], ()
            self._thread, self._noted_at = threading.get_ident(), self.columns
            self.serial += 1
        # a tuple: compilers trace this
        self._noting += (id(module),)

    def arrive(self, columns: int, batch_size: int, query_length: int) -> Step:
        """A layer that holds `columns` columns comes with new tokens; the first one opens the forward for all.

        Args:
            columns: held by the layer.
            batch_size, query_length: of the new key states.

        Returns:
            What every layer does in this forward.
        """
        self.check_untorn()
        overtaken = self.step is None and self._noted_at not in (None, self.columns)
        if overtaken or self._thread not in (None, threading.get_ident()):
            raise CacheStateError(
                "one cache must serve one forward at a time, but another one has begun: make a cache for each, "
                "`copy.deepcopy(cache)` if they share a prompt."
            )
        if self.step is None:
            self._open(batch_size, query_length)
        step = self.step
        if columns != step.past or query_length != step.query_length:
            raise CacheStateError(
                f"a layer holds {columns} columns and got {query_length} new ones, but the running forward adds "
                f"{step.query_length} to {step.past} in every layer: an earlier forward was broken off, or "
                f"two forwards share the cache. {self._way_out()}"
            )
        return step

    @property
    def is_last(self) -> bool:
        """Whether the layer that has arrived is the last one of the forward."""
        return self.num_arrived == self.num_layers - 1

    def depart(self) -> None:
        """A layer has stored its new tokens; the last one closes the forward."""
        self.num_arrived += 1
        if self.num_arrived == self.num_layers:
            self.close()
            self.closed_serial = self.serial
            self.stats = self.stats.plus(forwards=1)

    def close(self) -> None:
        """Ends the running forward."""
        self.step = self._thread = self._before_step = None

    def _open(self, batch_size: int, query_length: int) -> None:
        before = dict(vars(self))
        try:
            mask = self._noted.pop() if self._noted else None
            self.step, self.num_arrived = self._begin(batch_size, query_length, mask), 0
            self._before_step = before
        except BaseException:
            # refused or interrupted: nothing has happened (no count is changed in place)
            vars(self).update(before)
            raise

    def undo(self) -> None:
        """Takes back the running forward, of which no layer has done anything."""
        vars(self).update(self._before_step)
        self.close()

    def _way_out(self) -> str:
        past = self.columns if self.step is None else self.step.past
        return f"Go back to {past} columns with `cache.crop(...)`, or call `cache.reset()` and feed the tokens again."

    def check_length(self, layer_idx: int, length: int) -> None:
        """Raises if a layer of the host holds another number of columns than ours."""
        if length != self.columns:
            raise CacheStateError(
                f"every layer must hold the same {self.columns} columns, but layer {layer_idx} holds {length}: a "
                f"forward was broken off. {self._way_out()}"
            )

    def tensors(self) -> list[torch.Tensor]:
        """Tensors held for bookkeeping, on any device."""
        return (self.row_columns or []) + (self.layout.tensors() if self.layout else [])

    def counts(self) -> dict[str, int | list[int]]:
        """Every public count by name; with `row_columns` all that `restore` needs. Settle the ledger first."""
        names = [f.name for f in fields(self) if not f.name.startswith("_") and f.name != "row_columns"]
        held = {name: getattr(self, name) for name in names if name != "released" or self.released}
        return {name: value for name, value in held.items() if type(value) in (int, list)}

    def held(self) -> dict[str, torch.Tensor]:
        """What else a saved cache must hold, by name, on the CPU."""
        return {}

    def restore(
        self,
        counts: dict[str, int | list[int]],
        row_columns: list[torch.Tensor] | None,
        held: dict[str, torch.Tensor],
    ) -> None:
        """Takes over what another ledger's `counts` and `held` gave, and its `row_columns`."""
        for name, value in counts.items():
            setattr(self, name, value)
        self.row_columns, self._settled = row_columns, self.columns
        self._relayout()

    def reset(self, stats: CacheStats | None = None) -> None:
        """Forgets all counts, those of `stats` only if none are given."""
        self.__init__(self.config, num_layers=self.num_layers, pool=self.pool, stats=stats or CacheStats())

    def check_touched(self, touched: dict[int, int]) -> None:
        """Raises if the newest forward of a linear layer (by `layer_idx`) is not the newest of ours."""
        for layer_idx, serial in touched.items():
            if serial != self.closed_serial:
                raise CacheStateError(
                    f"every layer must have been through the same forwards, but linear layer {layer_idx} has not: one "
                    "was broken off. Call `cache.reset()` and feed the tokens again."
                )

    @contextmanager
    def changing(self, operation: str) -> Iterator[None]:
        """While layers are changed one by one; if that is broken off, only `reset` helps."""
        self.check_untorn()
        self.torn = operation
        yield
        self.torn = None

    def check_untorn(self) -> None:
        """Raises if an operation between forwards was broken off."""
        if self.torn is not None:
            raise CacheStateError(
                f"every layer must hold the same tokens, but `{self.torn}` was broken off half-way. Call "
                "`cache.reset()` and feed the tokens again."
            )

    def check_whole(self) -> None:
        """Raises if the last forward did not reach every layer."""
        self.check_untorn()
        if self.step is not None:
            raise CacheStateError(
                f"the last forward must have reached all {self.num_layers} layers, but it stopped after "
                f"{self.num_arrived} (or is still running). {self._way_out()}"
            )

    def _begin(self, batch_size: int, query_length: int, attention_mask: object) -> Step:
        if attention_mask is not None and not (torch.is_tensor(attention_mask) and attention_mask.ndim == 2):
            raise CacheStateError(
                "`attention_mask` must be a 2-D tensor [batch, tokens] or None, so that the cache can see the padding, "
                f"got {_describe(attention_mask)}."
            )
        past = self.columns
        if self.batch_size not in (0, batch_size):
            raise CacheStateError(
                f"the batch of `key_states` must be {self.batch_size}, the batch of the tokens already held, got "
                f"{batch_size}: widen the cache with `batch_repeat_interleave` or start with `reset()`."
            )
        if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, past + query_length):
            raise CacheStateError(
                f"`attention_mask` must have shape {(batch_size, past + query_length)}: one column for each of the "
                f"{past} tokens held and {query_length} new, got {tuple(attention_mask.shape)}. Pass the mask of the "
                "whole sequence."
            )
        if self.batch_size == 0:
            self.batch_size = batch_size
            self.seen, self.compressed, self.tail_lengths = ([0] * batch_size for _ in range(3))
            self._relayout()
        self.settle()
        before = self.make_flush()
        layout = self.layout
        self.columns += query_length
        if attention_mask is not None:
            self._arriving = HostCopy(attention_mask != 0)
            if attention_mask.device.type == "cpu":
                self.settle()
        after = None
        if query_length > self.config.block_size:
            self.settle()
            after = self.make_flush(merge=True)
        return Step(past, query_length, before, layout, after)

    def settle(self) -> None:
        """Counts the columns of the last call, whose mask may have been on its way to the host until now."""
        new = self.columns - self._settled
        if new == 0:
            return
        if self._arriving is not None:
            # a mask that is refused stays, so that every later call is refused too
            self._count_masked(self._arriving.get()[:, : self.columns])
            self._arriving = None
        elif self.row_columns is not None:
            fresh = torch.arange(self._settled, self.columns)
            self.row_columns = [torch.cat([c, fresh]) for c in self.row_columns]
        self.seen = [n + new for n in self.seen] if self.row_columns is None else [len(c) for c in self.row_columns]
        self._settled = self.columns

    def take_steps(self, num_steps: int) -> None:
        """Counts forwards of one token without padding that ran by themselves."""
        self.settle()
        self.columns += num_steps
        self.settle()
        self.stats = self.stats.plus(forwards=num_steps)

    def pretend(self, added: list[int]) -> None:
        """Counts so many more compressed tokens of each row, none of which came, as if shorter ones were padded."""
        most = max(added)
        self.columns, self.merged, self._settled = (n + most for n in (self.columns, self.merged, self._settled))
        self.seen = [count + more for count, more in zip(self.seen, added, strict=True)]
        self.compressed = [count + more for count, more in zip(self.compressed, added, strict=True)]
        if min(added) < most:
            self.row_columns = [torch.arange(most - more, self.columns) for more in added]
        self._relayout()

    def _count_masked(self, mask: torch.Tensor) -> None:
        for row, count in enumerate(self.released):
            mask[row, :count] = False
        fresh, old = mask[:, self._settled :], mask[:, : self._settled]
        if self.row_columns is None:
            if fresh.all():
                return
            self.row_columns = [torch.arange(self._settled) for _ in range(self.batch_size)]
        if (old & self.padding()[:, : self._settled]).any():
            raise CacheStateError(
                "`attention_mask` must not turn a column to 1 that was 0 when it was fed: padding is not stored. Feed "
                "these tokens again after `reset()`."
            )
        self.row_columns = [
            torch.cat([c, fresh[row].nonzero().flatten() + self._settled]) for row, c in enumerate(self.row_columns)
        ]

    def padding(self) -> torch.Tensor | None:
        """Bool `[batch, columns]` on the CPU, True where a row has padding; None while none was seen."""
        if self.row_columns is None:
            return None
        padding = torch.ones(self.batch_size, self.columns, dtype=torch.bool)
        for row, columns in enumerate(self.row_columns):
            padding[row, columns] = False
        return padding

    def num_padding(self) -> list[int]:
        """Of each row, padding among the columns whose mask is known."""
        return [self._settled - seen for seen in self.seen]

    def canonical(self, num_tokens: int) -> int:
        """Compressed tokens of a row that has seen `num_tokens`: whole blocks beyond sinks and window."""
        beyond = num_tokens - self.config.num_sink_tokens - self.config.recent_window
        return max(0, beyond // self.config.block_size) * self.config.block_size

    def make_flush(self, merge: bool = False) -> Flush | None:
        """The flush that brings every row to its canonical count, or None if there is nothing to do.

        Args:
            merge: sort pending columns into the tail even where nothing is to be compressed.
        """
        targets = [max(self.canonical(n), c) for n, c in zip(self.seen, self.compressed, strict=True)]
        if targets == self.compressed and not (merge and self.columns > self.merged):
            return None
        check_num_references(self._lattice, max(targets))
        if self.pool is not None:
            self.pool.check(targets)
        flush = self._even_flush(targets[0]) if self.row_columns is None else self._ragged_flush(targets)
        self.num_flushes += 1
        self.stats = self.stats.plus(encoded_tokens=sum(targets) - sum(self.compressed))
        self.compressed, self.merged = targets, self.columns
        self._relayout()
        return flush

    @property
    def _lattice(self) -> Lattice:
        return Lattice(self.config.reference_stride, self.config.reference_growth)

    def _relayout(self) -> None:
        self.layout = Layout(self.config.num_sink_tokens, self.compressed, self.merged, self.row_columns)

    def _first_offset(self, compressed: int) -> int:
        # a row's tail begins with its sinks until something is compressed
        return self.config.num_sink_tokens if compressed == 0 else 0

    def _even_flush(self, target: int) -> Flush:
        start = self.compressed[0]
        tail_start = self._first_offset(start) + target - start if target > start else 0
        groups = [FlushGroup(None, self._first_offset(start), start, target)] if target > start else []
        self.tail_width += self.columns - self.merged - tail_start
        self.tail_lengths = [self.tail_width] * self.batch_size
        return Flush(self.num_flushes + 1, None, groups, None, tail_start)

    def _ragged_flush(self, targets: list[int]) -> Flush:
        sources, tails, groups = [], [], {}
        for row, columns in enumerate(self.row_columns):
            pending = columns[columns >= self.merged] - self.merged + self.tail_width
            source = torch.cat([torch.arange(self.tail_lengths[row]), pending])
            start, stop, drop = self.compressed[row], targets[row], 0
            if stop > start:
                groups.setdefault((start, stop), []).append(row)
                drop = self._first_offset(start) + stop - start
            sources.append(source)
            tails.append(source[drop:])
        self.tail_lengths = [len(tail) for tail in tails]
        self.tail_width = max(self.tail_lengths)
        members = [
            FlushGroup(rows, self._first_offset(start), start, stop, [self.row_columns[row] for row in rows])
            for (start, stop), rows in groups.items()
        ]
        return Flush(self.num_flushes + 1, stack(sources), members, stack(tails))

    def release(self, rows: list[int]) -> Crop:
        """Forgets the tokens of `rows`, whose columns count as padding from now on; returns what every layer does."""
        self.settle()
        given_up = set(rows)
        held = self.row_columns or [torch.arange(self.columns)] * self.batch_size
        self.row_columns = [columns[:0] if row in given_up else columns for row, columns in enumerate(held)]
        before = self.released or [0] * self.batch_size
        self.released = [self.columns if row in given_up else count for row, count in enumerate(before)]
        num_compressed = sum(self.compressed)
        for name in ("seen", "compressed", "tail_lengths"):
            setattr(self, name, [0 if row in given_up else n for row, n in enumerate(getattr(self, name))])
        self.tail_width = max(self.tail_lengths)
        self._relayout()
        stays, num_dropped = (self.compressed, self.tail_lengths), num_compressed - sum(self.compressed)
        return Crop(self.columns, self.columns - self.merged, *stays, [False] * self.batch_size, num_dropped)

    def select_rows(self, rows: list[int] | None, batch_size: int) -> None:
        """The batch becomes `rows` of the settled old one, in that order; None where all rows are alike."""
        rows = [0] * batch_size if rows is None else rows
        for name in ("seen", "compressed", "tail_lengths", "released"):
            setattr(self, name, [getattr(self, name)[row] for row in rows if getattr(self, name)])
        if self.row_columns is not None:
            self.row_columns = [self.row_columns[row] for row in rows]
        self.batch_size = batch_size
        self._relayout()

    def stats_of_empty(self) -> CacheStats:
        """The counts if a crop left nothing."""
        return self._count_crop(self.columns, sum(self.compressed))

    def _count_crop(self, cropped: int, dropped: int) -> CacheStats:
        return self.stats.plus(
            crops=cropped > 0, cropped_columns=cropped, deep_crops=dropped > 0, dropped_tokens=dropped
        )

    def crop(self, keep: int) -> Crop:
        """Forgets columns `keep ..`, compressed tokens included; returns what every layer does."""
        self.settle()
        kept = [keep] * self.batch_size
        if self.row_columns is not None:
            self.row_columns = [c[c < keep] for c in self.row_columns]
            kept = [len(c) for c in self.row_columns]
        merged = min(self.merged, keep)
        crop = self._plan_crop(keep, merged, kept)
        self.stats = self._count_crop(self.columns - keep, crop.num_dropped)
        self.seen, self.compressed, self.tail_lengths = kept, crop.compressed, crop.tail_lengths
        self.released = [min(count, keep) for count in self.released]
        self.tail_width = max(crop.tail_lengths, default=0)
        self.columns = self._settled = keep
        self.merged = merged
        self._relayout()
        return crop

    def _plan_crop(self, keep: int, merged: int, kept: list[int]) -> Crop:
        sinks = self.config.num_sink_tokens
        compressed, tail_lengths, returned = [], [], []
        for row, num_tokens in enumerate(kept):
            in_tail = num_tokens - self._num_pending(row, merged, keep)
            before = self.compressed[row]
            after = min(before, max(0, in_tail - sinks))
            compressed.append(after)
            # a row without compressed tokens keeps its sinks in the tail
            tail_lengths.append(in_tail - after - (sinks if after else 0))
            returned.append(before > 0 and after == 0)
        num_dropped = sum(self.compressed) - sum(compressed)
        return Crop(keep, keep - merged, compressed, tail_lengths, returned, num_dropped)

    def _num_pending(self, row: int, merged: int, keep: int) -> int:
        if self.row_columns is None:
            return keep - merged
        return int((self.row_columns[row] >= merged).sum())


def _describe(value: object) -> str:
    return f"a {value.ndim}-D tensor" if torch.is_tensor(value) else f"a {type(value).__name__}"
