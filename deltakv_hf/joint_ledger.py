"""Who stands where in a `JointEncodedCache`: what its rows have been fed, and which blocks they hold together.

Keys and values of a token are a function of the ids and positions up to it. Blocks of the same ids and positions behind
the same blocks are therefore the same, in every layer: they are one node of a tree, and take one slot of each layer's
pool. What stands in a slot is never changed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import torch

from .errors import CacheStateError
from .fusion import REQUEST_BITS, REQUESTS
from .hf_compat import HostCopy
from .layout import Arrangement, Crop, Flush
from .ledger import TokenLedger
from .references import Lattice
from .stats import CacheStats


@dataclass(frozen=True)
class Fed:
    """What a forward has fed: ids and positions `[batch or 1, columns]` on their way to the host; None if not known."""

    past: int
    columns: int
    ids: HostCopy | None
    positions: HostCopy | None


@dataclass
class JointLedger(TokenLedger):
    """Counts of one cache, and its blocks.

    Attributes:
        arrangement: where blocks stand since the last crop or choice of rows.
        num_requests: rows of the first call; every row since is one of them, or a copy.
        coding: which tokens are references of others.
        has_windows: whether layers of the host attend to a window of columns.
    """

    arrangement: Arrangement | None = None
    num_requests: int = 0
    has_windows: bool = False
    coding: Lattice = Lattice(1)
    # id and position of every settled column, `[batch, columns, 2]` int64
    _fed: torch.Tensor | None = None
    _feeds: list[Fed] = field(default_factory=list)
    _noted_text: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    # of each row its group (numbered from 0), the request that it comes from, and the nodes of its blocks
    _groups: list[int] = field(default_factory=list)
    _requests: list[int] = field(default_factory=list)
    _nodes: list[list[int]] = field(default_factory=list)
    # node behind a node (a root is minus a group, less one) by what it holds; slot of each node; nodes made so far
    _tree: dict[tuple[int, bytes], int] = field(default_factory=dict)
    _slots: dict[int, int] = field(default_factory=dict)
    # of each node a number that says what was fed up to it
    _histories: dict[int, int] = field(default_factory=dict)
    _num_nodes: int = 0
    _num_unknown: int = 0
    # rows whose newest mask hides a token that was shown before; None: no mask has come
    _is_hiding: torch.Tensor | None = None

    @property
    def needs_rows(self) -> bool:
        """Always: rows hold blocks of their own."""
        return True

    @property
    def num_blocks(self) -> int:
        """Blocks stored in each layer."""
        return len(self._slots)

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return len(set(self.config.groups or [0]))

    @property
    def num_home_columns(self) -> int:
        """Numbers that say where a block comes from (see `fusion`)."""
        return REQUESTS + -(-self.num_requests // REQUEST_BITS)

    def ref_counts(self) -> dict[int, int]:
        """How many rows hold each slot."""
        counts = dict.fromkeys(self._slots.values(), 0)
        for row in self._nodes:
            for node in row:
                counts[self._slots[node]] += 1
        return counts

    def note_text(self, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None, is_text: bool) -> None:
        """Takes what the coming forward feeds; what is not known is shared with nobody."""
        is_known = is_text and torch.is_tensor(input_ids) and input_ids.ndim == 2
        if position_ids is not None:
            is_known = is_known and torch.is_tensor(position_ids) and position_ids.ndim == 2
        self._noted_text = (input_ids, position_ids) if is_known else (None, None)

    def _begin(self, batch_size: int, query_length: int, attention_mask: object):
        (ids, positions), self._noted_text = self._noted_text, (None, None)
        fits = ids is not None and tuple(ids.shape) == (batch_size, query_length)
        if fits and positions is not None:
            fits = positions.shape[0] in (1, batch_size) and positions.shape[1] == query_length
        if not fits:
            ids = positions = None
        if self.batch_size == 0:
            self._first_rows(batch_size)
        copies = (None if part is None else HostCopy(part) for part in (ids, positions))
        self._feeds = [*self._feeds, Fed(self.columns, query_length, *copies)]
        return super()._begin(batch_size, query_length, attention_mask)

    def _first_rows(self, batch_size: int) -> None:
        groups = self.config.groups
        if groups is not None and len(groups) != batch_size:
            raise CacheStateError(
                f"`groups` must have one number for each of the {batch_size} rows of the first call, got {len(groups)}."
            )
        self._requests, self.num_requests = list(range(batch_size)), batch_size
        self._groups = self._groups_of(self._requests)
        self._nodes = [[] for _ in range(batch_size)]
        self._fed = torch.empty(batch_size, 0, 2, dtype=torch.int64)

    def _groups_of(self, requests: list[int]) -> list[int]:
        """Their groups, numbered from 0."""
        groups = self.config.groups
        if groups is None:
            return [0] * len(requests)
        numbers = {group: number for number, group in enumerate(sorted(set(groups)))}
        return [numbers[groups[request]] for request in requests]

    def reset(self, stats: CacheStats | None = None) -> None:
        """See `TokenLedger.reset`."""
        kept = self.has_windows, self.coding
        super().reset(stats)
        self.has_windows, self.coding = kept

    @property
    def _lattice(self) -> Lattice:
        return self.coding

    def settle(self) -> None:
        """See `TokenLedger.settle`; takes what these columns were fed."""
        super().settle()
        if self.columns == 0:
            return
        due = [fed for fed in self._feeds if fed.past + fed.columns <= self.columns]
        if due:
            self._fed = torch.cat([self._fed, *(self._numbers(fed) for fed in due)], dim=1)
            self._feeds = self._feeds[len(due) :]

    def _count_masked(self, mask: torch.Tensor) -> None:
        super()._count_masked(mask)
        padding = self.padding()
        hidden = ~mask[:, : self._settled] if padding is None else ~(mask | padding)[:, : self._settled]
        self._is_hiding = hidden.any(1)

    def _numbers(self, fed: Fed) -> torch.Tensor:
        """Ids and positions `[batch, columns, 2]`."""
        shape = self.batch_size, fed.columns
        # numbers that no id and no other token has
        ids = -1 - torch.arange(self._num_unknown, self._num_unknown + shape[0] * shape[1]).view(shape)
        if fed.ids is None or self._is_hiding is not None:
            self._num_unknown += ids.numel()
        if fed.ids is not None:
            # tokens that are not shown what others have seen are unlike any
            known = fed.ids.get().long()
            ids = known if self._is_hiding is None else torch.where(self._is_hiding[:, None], ids, known)
        self._is_hiding = None
        positions = torch.arange(fed.past, fed.past + fed.columns)[None]
        if fed.positions is not None:
            positions = fed.positions.get().long()
        return torch.stack([ids, positions.expand(shape)], dim=-1)

    def make_flush(self, merge: bool = False) -> Flush | None:
        """See `TokenLedger.make_flush`; says which blocks are new."""
        flush = super().make_flush(merge)
        if flush is None:
            return None
        self._tree, self._slots, self._histories = dict(self._tree), dict(self._slots), dict(self._histories)
        self._nodes = [list(row) for row in self._nodes]
        groups, nodes = [], []
        for group in flush.groups:
            rows = range(self.batch_size) if group.rows is None else group.rows
            new = [
                (place, block) for place, row in enumerate(rows) for block in self._extend(row, group.start, group.stop)
            ]
            groups.append(replace(group, new_blocks=torch.tensor(new, dtype=torch.int64).view(-1, 2)))
            nodes += [(rows[place], block, block * self.config.block_size < group.start) for place, block in new]
        homes = self._homes(nodes) if self.config.fuses else None
        flush.groups, flush.arrangement = groups, replace(self._collect(), homes=homes)
        return flush

    def _homes(self, new: list[tuple[int, int, bool]]) -> torch.Tensor:
        """Where the new blocks (row, number of its block, was cut) come from, `[new, columns]` (see `fusion`)."""
        nodes = [self._nodes[row][block] for row, block, _ in new]
        holders = {node: set() for node in nodes}
        for row, held in enumerate(self._nodes):
            for node in holders.keys() & set(held):
                holders[node].add(self._requests[row])
        homes, num_columns = [], self.num_home_columns
        for (row, block, is_cut), node in zip(new, nodes, strict=True):
            number = ~block if is_cut else block
            home = [self._groups[row], number, self._histories[node], *[0] * (num_columns - REQUESTS)]
            for request in holders[node]:
                home[REQUESTS + request // REQUEST_BITS] |= 1 << request % REQUEST_BITS
            homes.append(home)
        return torch.tensor(homes, dtype=torch.int64).view(-1, num_columns)

    def _extend(self, row: int, start: int, stop: int, slots: list[int] | None = None) -> list[int]:
        """A row takes the blocks of its tokens `start .. stop - 1`; those of them that are to be stored.

        Args:
            slots: what to give to new ones; None: the next.
        """
        size, nodes, new = self.config.block_size, self._nodes[row], []
        columns = torch.arange(self.columns) if self.row_columns is None else self.row_columns[row]
        sinks = self.config.num_sink_tokens
        numbers = self._fed[row, columns]
        if self.has_windows:
            # they reach over columns, padding between tokens included
            numbers = torch.cat([numbers, (columns - columns[:1])[:, None]], dim=1)
        del nodes[start // size :]
        data, step = numbers.numpy().tobytes(), numbers.shape[1] * numbers.itemsize
        for block in range(start // size, stop // size):
            # sinks stand before the first block, which is what they are fed with
            first = sinks + block * size if block else 0
            held = data[first * step : (sinks + (block + 1) * size) * step]
            key = (nodes[-1] if nodes else -1 - self._groups[row], held)
            if key not in self._tree:
                self._tree[key] = self._num_nodes
                before = self._histories[nodes[-1]] if nodes else 0
                self._histories[self._num_nodes] = _history(before, held)
                self._num_nodes += 1
            node = self._tree[key]
            if node not in self._slots:
                self._slots[node] = len(self._slots) if slots is None else slots[block - start // size]
                new.append(block)
            nodes.append(node)
        return new

    def _collect(self) -> Arrangement:
        """Gives up slots that no row holds any more."""
        used, kept = {node for row in self._nodes for node in row}, None
        if len(used) < len(self._slots):
            staying = sorted((slot, node) for node, slot in self._slots.items() if node in used)
            kept = torch.tensor([slot for slot, _ in staying], dtype=torch.int64)
            self._slots = {node: place for place, (_, node) in enumerate(staying)}
            self._tree = {key: node for key, node in self._tree.items() if node in used}
            self._histories = {node: number for node, number in self._histories.items() if node in used}
        return Arrangement(kept, self.block_table(), self.row_groups())

    def row_groups(self) -> torch.Tensor:
        """`[batch]` int64."""
        return torch.tensor(self._groups, dtype=torch.int64)

    def block_table(self) -> torch.Tensor:
        """Slot of each block of each row, `[batch, most blocks of a row]` int64; 0 behind a row's last."""
        width = max((len(row) for row in self._nodes), default=0)
        table = torch.zeros(len(self._nodes), width, dtype=torch.int64)
        for row, nodes in enumerate(self._nodes):
            table[row, : len(nodes)] = torch.tensor([self._slots[node] for node in nodes], dtype=torch.int64)
        return table

    def select_rows(self, rows: list[int], batch_size: int) -> None:
        """See `TokenLedger.select_rows`; a block is held by more rows or fewer."""
        super().select_rows(rows, batch_size)
        for name in ("_nodes", "_groups", "_requests"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        self._fed = self._fed[rows]
        self.arrangement = self._collect()

    def crop(self, keep: int) -> Crop:
        """See `TokenLedger.crop`; the last block of a row may be held in part."""
        crop = super().crop(keep)
        size = self.config.block_size
        self._nodes = [row[: -(-count // size)] for row, count in zip(self._nodes, crop.compressed, strict=True)]
        self._fed = self._fed[:, :keep]
        self.arrangement = self._collect()
        return crop

    def held(self) -> dict[str, torch.Tensor]:
        """See `TokenLedger.held`: what each column was fed, group and request of each row, slots of its blocks."""
        fed = torch.empty(0, 0, 2, dtype=torch.int64) if self._fed is None else self._fed
        groups, requests = (torch.tensor(part, dtype=torch.int64) for part in (self._groups, self._requests))
        return {"fed": fed, "groups": groups, "requests": requests, "block_table": self.block_table()}

    def restore(
        self,
        counts: dict[str, int | list[int]],
        row_columns: list[torch.Tensor] | None,
        held: dict[str, torch.Tensor],
    ) -> None:
        """See `TokenLedger.restore`; the tree grows anew.

        Raises:
            CacheStateError: the parts do not fit together.
        """
        super().restore(counts, row_columns, held)
        self._fed, table = held["fed"], held["block_table"]
        self._groups, self._requests = held["groups"].tolist(), held["requests"].tolist()
        self._nodes = [[] for _ in range(self.batch_size)]
        size = self.config.block_size
        numbers = [-(-count // size) for count in self.compressed]
        rows = [self.batch_size]
        shapes = [*rows, self.columns, 2], rows, rows, [*rows, max(numbers, default=0)]
        fits = all(list(part.shape) == shape for part, shape in zip(held.values(), shapes, strict=True))
        if not fits or any(part.dtype != torch.int64 for part in held.values()):
            raise _damaged()
        groups, is_known = self.config.groups, all(0 <= request < self.num_requests for request in self._requests)
        is_known = is_known and (groups is None or not rows[0] or len(groups) == self.num_requests)
        if not is_known or self._groups != self._groups_of(self._requests):
            raise CacheStateError(
                f"the rows of the saved cache must be of the {self.num_requests} requests of its first call and of "
                f"their groups, got requests {self._requests} in groups {self._groups}: it was written by another "
                "version. Save the cache again."
            )
        self._num_unknown = max(0, -int(self._fed[..., 0].min())) if self._fed.numel() else 0
        for row, count in enumerate(self.compressed):
            self._extend(row, 0, count // size * size, table[row].tolist())
        # a crop may have left the beginning of a block that another row holds whole
        nodes = {slot: node for node, slot in self._slots.items()}
        for row, number in enumerate(numbers):
            if number == len(self._nodes[row]):
                continue
            slot = int(table[row, number - 1])
            if slot not in nodes:
                # what follows in it is not known: no row to come can ask for it
                nodes[slot], self._histories[self._num_nodes] = self._num_nodes, 0
                self._slots[self._num_nodes] = slot
                self._num_nodes += 1
            self._nodes[row].append(nodes[slot])
        if sorted(self._slots.values()) != list(range(len(self._slots))) or not torch.equal(self.block_table(), table):
            raise _damaged()

    def tensors(self) -> list[torch.Tensor]:
        """Tensors held for bookkeeping, on any device."""
        return super().tensors() + ([] if self._fed is None else [self._fed])


def _history(before: int, held: bytes) -> int:
    """Of what was fed up to a block, out of that up to the one before and its own."""
    digest = hashlib.blake2b(before.to_bytes(8, "little", signed=True) + held, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _damaged() -> CacheStateError:
    return CacheStateError(
        "the blocks of the saved cache must be those of the ids that it was fed, got others: it was written by another "
        "version. Save the cache again."
    )
