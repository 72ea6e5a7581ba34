"""Keys and values for a `JointEncodedCache` without a model, and what it must hold then.

Those of a token are drawn from a hash of the ids and positions up to it: rows that begin alike have equal ones, and a
block that was shared wrongly is seen.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from pathlib import Path

import torch
from helpers import NUM_LAYERS, dense
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import JointEncodedCache

HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5
WIDTH = HEADS * (KEY_DIM + VALUE_DIM)


def history(past: bytes, token: object) -> bytes:
    """Stands for `token` behind what `past` stands for: 64 bytes."""
    return hashlib.blake2b(past + repr(token).encode()).digest()


def states_of(columns: list[bytes | None], pad: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[layers, heads, columns, dim]` of histories; `pad` where there is none."""
    numbers = torch.full((len(columns), NUM_LAYERS * WIDTH), float(pad))
    for place, held in enumerate(columns):
        if held is not None:
            numbers[place] = torch.frombuffer(bytearray(held), dtype=torch.int16).float() / 4096
    return numbers.view(len(columns), NUM_LAYERS, HEADS, -1).permute(1, 2, 0, 3).split([KEY_DIM, VALUE_DIM], -1)


class Fed:
    """A cache, and rows of plain lists that say what it must hold.

    Attributes:
        rows: the history of each column of each row, None at padding.
        starts: of each row, its history before the first token: rows of two groups have nothing in common.
    """

    def __init__(self, **options):
        self.cache = JointEncodedCache(tiny_model("llama"), **options)
        self.rows: list[list[bytes | None]] = []
        self.starts: list[bytes] = []
        self.num_unknown = 0

    def __deepcopy__(self, memo):
        new = Fed.__new__(Fed)
        vars(new).update(vars(self), cache=copy.deepcopy(self.cache), rows=[list(row) for row in self.rows])
        return new

    @property
    def size(self) -> int:
        return self.cache.options.block_size

    @property
    def columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    def feed(self, ids, mask=None, positions=None, is_text=True) -> None:
        """One forward of lists by row: `ids`; `mask` of the new columns, None if all are real; `positions` of 1 or all
        rows, None for the columns."""
        if not self.rows:
            groups = self.cache.options.groups or [0] * len(ids)
            self.rows, self.starts = [[] for _ in ids], [history(b"", group) for group in groups]
        past, length = self.columns, len(ids[0])
        for row, own in enumerate(self.rows):
            for place in range(length):
                position = past + place if positions is None else positions[row % len(positions)][place]
                own.append(
                    self._history(row, ids[row][place], position, is_text) if self._real(mask, row, place) else None
                )
        whole = None if mask is None else torch.tensor([[held is not None for held in row] for row in self.rows]).long()
        tensor = None if positions is None else torch.tensor(positions)
        self.cache._ledger.note_mask(whole, outermost=True)
        self.cache._ledger.note_text(torch.tensor(ids), tensor, is_text)
        keys, values = self._states(slice(past, None), torch.nan)
        for idx, layer in enumerate(self.cache.layers):
            layer.receive_tables()
            view = dense(self.cache.update(keys[idx].clone(), values[idx].clone(), idx))
            self._check(idx, [states.nan_to_num(0) for states in view], masked=True)

    @staticmethod
    def _real(mask, row, place) -> bool:
        return mask is None or bool(mask[row][place])

    def _history(self, row: int, token: int, position: int, is_text: bool) -> bytes:
        if not is_text:
            self.num_unknown += 1
            token = f"unknown {self.num_unknown}"
        past = next((held for held in reversed(self.rows[row]) if held is not None), self.starts[row])
        return history(past, (token, position))

    def _states(self, columns: slice, pad: float) -> list[torch.Tensor]:
        """Keys and values `[layers, batch, heads, columns, dim]`."""
        pairs = [states_of(row[columns], pad) for row in self.rows]
        return [torch.stack(part, 1) for part in zip(*pairs, strict=True)]

    def select(self, rows: list[int]) -> None:
        """The batch has become `rows`."""
        self.rows, self.starts = [list(self.rows[row]) for row in rows], [self.starts[row] for row in rows]

    def crop(self, keep: int) -> None:
        self.cache.crop(keep - self.columns)
        self.rows = [row[:keep] for row in self.rows] if keep else []

    def flush(self) -> None:
        """Afterwards every whole block is stored, and what a crop has left of one stays where it was."""
        self.cache._ledger.settle()
        before = list(self.cache._ledger.compressed)
        self.cache.flush()
        reals = [sum(held is not None for held in row) for row in self.rows]
        expected = [max(held, real // self.size * self.size) for held, real in zip(before, reals, strict=True)]
        assert self.cache._ledger.compressed == expected

    def again(self, path: Path) -> None:
        """On through a file."""
        self.cache.save(path)
        self.cache = JointEncodedCache.load(path, tiny_model("llama"))

    def check(self) -> None:
        """Everything that must hold at any time between forwards."""
        ledger = self.cache._ledger
        assert ledger.columns == self.columns and self.cache.get_seq_length() == self.columns
        if not self.rows:
            assert ledger.num_blocks == 0 and ledger.ref_counts() == {}
            return
        for idx in range(NUM_LAYERS):
            self._check(idx, self.cache.dequantize(idx), masked=False)
        table, numbers = ledger.block_table(), [-(-count // self.size) for count in ledger.compressed]
        assert table.shape == (len(self.rows), max(numbers))
        held = Counter(slot for row, number in zip(table.tolist(), numbers, strict=True) for slot in row[:number])
        assert ledger.ref_counts() == held and sorted(held) == list(range(self.cache.num_blocks))
        for layer in self.cache.layers:
            assert layer.state.store.blocks.shape == (self.cache.num_blocks, self.size, WIDTH)
            assert torch.equal(layer.state.store.block_table, table)
        blocks = self.cache.memory_report().parts["blocks"]
        assert blocks == self.cache.num_blocks * NUM_LAYERS * self.size * WIDTH * 4
        self._check_sharing(table.tolist())

    def _check(self, idx: int, got, masked: bool) -> None:
        expected = [part[idx] for part in self._states(slice(None), 0)]
        real = torch.tensor([[held is not None for held in row] for row in self.rows])[:, None, :, None]
        for states, fed in zip(got, expected, strict=True):
            assert torch.equal(states.where(real, 0) if masked else states, fed)

    def _check_sharing(self, table: list[list[int]]) -> None:
        """Rows have a whole block in the same slot if they are alike to its end, and only then."""
        pairs = set()
        for row, slots, count in zip(self.rows, table, self.cache._ledger.compressed, strict=True):
            real = [held for held in row if held is not None]
            pairs |= {(slots[block], real[(block + 1) * self.size - 1]) for block in range(count // self.size)}
        for kind in zip(*pairs, strict=True):
            assert len(set(kind)) == len(pairs)


@st.composite
def calls(draw, batch: int, counts: list[int], past: int):
    """Arguments of `Fed.feed`: rows go alike up to a column, often to the end; `counts` real tokens were before."""
    length = draw(st.integers(1, 10))
    text = draw(st.lists(st.integers(1, 2), min_size=length, max_size=length))
    turns = [draw(st.integers(0, 2 * length)) for _ in range(batch)]
    ids = [[3 - token if place >= turn else token for place, token in enumerate(text)] for turn in turns]
    mask, kind = None, draw(st.sampled_from(["none", "none", "left", "holes"]))
    if kind == "left":
        pads = [draw(st.integers(0, length)) for _ in range(batch)]
        mask = [[place >= count for place in range(length)] for count in pads]
    elif kind == "holes":
        mask = [draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(batch)]
    positions, kind = None, draw(st.sampled_from(["columns", "counted", "counted", "one"]))
    if kind == "one":
        first = draw(st.sampled_from([past, 100]))
        positions = [list(range(first, first + length))]
    elif kind == "counted":
        real = torch.tensor(mask) if mask else torch.ones(batch, length)
        positions = (real.cumsum(1).long() + torch.tensor(counts)[:, None] - 1).clamp(min=0).tolist()
    return ids, mask, positions, draw(st.sampled_from([True, True, True, True, False]))
