"""Keys and values for a `JointEncodedCache` without a model, of which blocks of the same ids are similar; and what the
cache must hold then.

Those of a token are its id's own, wherever it stands, and a little that its whole history decides. Keys turn with the
position.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from helpers import NUM_LAYERS, rope_tables
from joint_rows import HEADS, KEY_DIM, VALUE_DIM, WIDTH, history, states_of
from models import tiny_model

from deltakv_hf import JointEncodedCache

KEY_WIDTH = HEADS * KEY_DIM
# of a key, the channels that turn
TURNED = 2


@cache
def token_states(token: int, held: bytes, noise: float) -> torch.Tensor:
    """`[layers, heads, key_dim + value_dim]`, keys before they are turned."""
    numbers = torch.randn(NUM_LAYERS, HEADS, KEY_DIM + VALUE_DIM, generator=torch.Generator().manual_seed(token))
    # uniform, of variance 1
    own = torch.cat(states_of([held], 0), -1)[:, :, 0] * 3**0.5 / 8
    return numbers + noise * own + 0.5


class Rows:
    """A cache and what it was fed.

    Attributes:
        noise: how unlike tokens of the same id are.
        rows: of each row its columns: history, position and `token_states`; None at padding.
        groups: of each row.
        spoilt: by the history at a block's end, how far off it may be, `[layers, 2]`: a crop had left its beginning, of
            a block that was read as its leader.
        cut: of each row a block that a crop has left a part of, its number and the same of it, or None.
    """

    def __init__(self, noise: float = 0.1, **options):
        self.cache = JointEncodedCache(tiny_model("llama"), **options)
        self.noise = noise
        self.rows: list[list[tuple[bytes, int, torch.Tensor] | None]] = []
        self.groups: list[int] = []
        self.cut: list[tuple[int, torch.Tensor] | None] = []
        self.spoilt: dict[bytes, torch.Tensor] = {}

    def __deepcopy__(self, memo):
        new = Rows.__new__(Rows)
        vars(new).update(vars(self), cache=copy.deepcopy(self.cache), rows=[list(row) for row in self.rows])
        new.cut, new.spoilt = list(self.cut), dict(self.spoilt)
        return new

    @property
    def size(self) -> int:
        return self.cache.options.block_size

    @property
    def columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def feed(self, ids: list[list[int]], mask: list[list[int]] | None = None) -> list[tuple]:
        """One forward; positions count the real tokens of a row. What `update` returned of each layer."""
        if not self.rows:
            groups = self.cache.options.groups or [0] * len(ids)
            # those of two groups may be alike
            self.rows, self.cut, self.groups = [[] for _ in ids], [None] * len(ids), list(groups)
        past = self.columns
        for row, own in enumerate(self.rows):
            real = [held for held in own if held is not None]
            for place, token in enumerate(ids[row]):
                if mask is not None and not mask[row][place]:
                    own.append(None)
                    continue
                held = history(real[-1][0] if real else b"", (token, len(real)))
                real.append((held, len(real), token_states(token, held, self.noise)))
                own.append(real[-1])
        whole = None if all(None not in row for row in self.rows) else self.real().long()
        positions = torch.tensor([[0 if held is None else held[1] for held in row[past:]] for row in self.rows])
        self.cache._ledger.note_mask(whole, outermost=True)
        self.cache._ledger.note_text(torch.tensor(ids), positions, True)
        keys, values = (part[..., past:, :] for part in self.states())
        cos, sin = rope_tables(positions, TURNED)
        views = []
        for idx, layer in enumerate(self.cache.layers):
            layer.receive_tables(*() if layer.form is None else (cos, sin))
            views.append(self.cache.update(keys[idx].clone(), values[idx].clone(), idx))
        return views

    def real(self) -> torch.Tensor:
        """`[batch, columns]` bool."""
        return torch.tensor([[held is not None for held in row] for row in self.rows])

    def states(self, turned: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[layers, batch, heads, columns, dim]`, 0 at padding."""
        none = torch.zeros(NUM_LAYERS, HEADS, KEY_DIM + VALUE_DIM)
        held = torch.stack([torch.stack([none if c is None else c[2] for c in row], 2) for row in self.rows], 1)
        keys, values = held.split([KEY_DIM, VALUE_DIM], -1)
        if turned:
            positions = torch.tensor([[0 if c is None else c[1] for c in row] for row in self.rows])
            cos, sin = (part[:, None, :, :1] for part in rope_tables(positions, TURNED))
            first, second, rest = keys[..., :1], keys[..., 1:2], keys[..., TURNED:]
            keys = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
        return keys, values

    def select(self, rows: list[int], beams: bool = False) -> None:
        """The batch becomes `rows`."""
        (self.cache.reorder_cache if beams else self.cache.batch_select_indices)(torch.tensor(rows))
        self._take(rows)

    def repeat(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self._take([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _take(self, rows: list[int]) -> None:
        self.rows, self.cut = [list(self.rows[row]) for row in rows], [self.cut[row] for row in rows]
        self.groups = [self.groups[row] for row in rows]

    def crop(self, keep: int) -> None:
        self.cache._ledger.settle()
        bounds, before = self.bounds(), list(self.cache._ledger.compressed)
        self.cache.crop(keep - self.columns)
        self.rows = [row[:keep] for row in self.rows] if keep else []
        for row, count in enumerate(self.cache._ledger.compressed if keep else ()):
            block, part = divmod(count, self.size)
            if count < before[row]:
                self.cut[row] = (block, bounds[row][block]) if part else None

    def reset(self) -> None:
        self.cache.reset()
        self.rows = []

    def blocks(self) -> list[list[slice]]:
        """Of each row its stored blocks as ranges of its real tokens; the last may be a part."""
        sinks, size = self.cache.options.num_sink_tokens, self.size
        return [
            [slice(sinks + at, sinks + min(at + size, count)) for at in range(0, count, size)]
            for count in self.cache._ledger.compressed
        ]

    def bounds(self) -> list[list[torch.Tensor]]:
        """How far off each stored block may be, keys and values, `[layers, 2]`."""
        apart, blocks, found = self._apart(), self.blocks(), []
        for row, own in enumerate(blocks):
            found.append([self._bound(row, block, apart) for block in own])
        return found

    def _bound(self, row: int, block: slice, apart: list[torch.Tensor]) -> torch.Tensor:
        if block.stop - block.start < self.size:
            return self.cut[row][1]
        columns = [place for place, held in enumerate(self.rows[row]) if held is not None][block]
        group, most = sorted(set(self.groups_of_all)).index(self.groups[row]), []
        for idx, layer in enumerate(self.cache.layers):
            store = layer.state.store
            means = store.mean[group].split([KEY_WIDTH, WIDTH - KEY_WIDTH])
            distances = [(part[idx, row, columns] - mean).norm() for part, mean in zip(apart, means, strict=True)]
            # beyond 1: nothing is close enough; not a number: too few blocks to tell
            shares = bool(store.least[group] < 1)
            most.append([shares * self.cache.options.largest_error * distance for distance in distances])
        spoilt = self.spoilt.get(self.rows[row][columns[-1]][0], torch.zeros(NUM_LAYERS, 2))
        return torch.maximum(torch.tensor(most), spoilt)

    def _apart(self) -> list[torch.Tensor]:
        """Keys, as blocks are compared, and values: `[layers, batch, columns, width]`."""
        return [part.transpose(2, 3).flatten(3) for part in self.states(not self.cache.options.strips_rope)]

    @property
    def groups_of_all(self) -> list[int]:
        """Of the rows of the first call."""
        return list(self.cache.options.groups or [0])

    def check(self) -> None:
        """What must hold at any time between forwards."""
        ledger = self.cache._ledger
        ledger.settle()
        assert ledger.columns == self.columns == self.cache.get_seq_length()
        if not self.rows:
            return
        blocks = self.blocks()
        for row, cut in enumerate(self.cut):
            whole = ledger.compressed[row] // self.size
            if cut is not None and len(blocks[row]) == whole:
                # what was cut is whole again, or gone
                self.cut[row] = None
            if cut is not None and cut[0] < whole:
                real = [held for held in self.rows[row] if held is not None]
                self.spoilt[real[blocks[row][cut[0]].stop - 1][0]] = cut[1]
        bounds, given = self.bounds(), self.states()
        stored = torch.zeros(self.real().shape, dtype=torch.bool)
        for idx in range(NUM_LAYERS):
            gone = [a - b[idx] for a, b in zip(self.cache.dequantize(idx), given, strict=True)]
            for row, own in enumerate(blocks):
                places = self.real()[row].nonzero().flatten()
                for block, bound in zip(own, bounds[row], strict=True):
                    stored[row, places[block]] = True
                    errors = torch.stack([part[row, :, places[block]].norm() for part in gone])
                    assert (errors <= bound[idx] * (1 + 1e-5) + 1e-4).all(), (errors, bound[idx])
            for part in gone:
                assert not part.transpose(1, 2)[~stored].any(), "raw tokens and padding are not as they were fed"
        self._check_sharing()

    def _check_sharing(self) -> None:
        """Every leader is read by a row, and by rows of one group alone."""
        table, counts = self.cache._ledger.block_table(), [len(own) for own in self.blocks()]
        for layer in self.cache.layers:
            store, readers = layer.state.store, {}
            assert torch.equal(store.block_table, table) and len(store.leader) == self.cache.num_blocks
            for slots, count, group in zip(table.tolist(), counts, self.groups, strict=True):
                for leader in store.leader[slots[:count]].tolist():
                    readers.setdefault(leader, set()).add(group)
            assert sorted(readers) == list(range(len(store.blocks)))
            assert all(len(groups) == 1 for groups in readers.values())
