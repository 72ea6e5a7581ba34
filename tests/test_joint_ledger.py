"""Whatever is done to a `JointEncodedCache`, each row reads what it was fed; no block is stored twice or in vain."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import NUM_LAYERS, cuts
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from joint_rows import HEADS, KEY_DIM, VALUE_DIM, WIDTH, Fed, calls
from models import tiny_model
from test_saving import tampered

from deltakv_hf import CacheStateError, JointEncodedCache

# -- anything in any order ---------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A cache, perhaps a copy that was made of it, and all that can be done to them."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.fed = self.other = None

    def teardown(self):
        self.folder.cleanup()

    @initialize(size=st.integers(1, 5), batch=st.integers(1, 4), grouped=st.booleans(), data=st.data())
    def begin(self, size, batch, grouped, data):
        self.batch = batch
        groups = data.draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch)) if grouped else None
        self.fed = Fed(block_size=size, groups=groups)
        self.feed(data)

    @rule(data=st.data())
    def feed(self, data):
        counts = [sum(held is not None for held in row) for row in self.fed.rows] or [0] * self.batch
        self.fed.feed(*data.draw(calls(len(counts), counts, self.fed.columns)))

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data(), count=st.integers(1, 4))
    def decode(self, data, count):
        """Real tokens one by one."""
        for _ in range(count):
            ids = data.draw(st.lists(st.integers(1, 2), min_size=len(self.fed.rows), max_size=len(self.fed.rows)))
            self.fed.feed([[token] for token in ids])

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data(), beams=st.booleans())
    def choose(self, data, beams):
        rows = data.draw(st.lists(st.integers(0, len(self.fed.rows) - 1), min_size=1, max_size=5))
        (self.fed.cache.reorder_cache if beams else self.fed.cache.batch_select_indices)(torch.tensor(rows))
        self.fed.select(rows)

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data())
    def keep_some(self, data):
        """Chosen by a mask."""
        kept = data.draw(st.lists(st.booleans(), min_size=len(self.fed.rows), max_size=len(self.fed.rows)).filter(any))
        self.fed.cache.batch_select_indices(torch.tensor(kept))
        self.fed.select([row for row, stays in enumerate(kept) if stays])

    @precondition(lambda self: 0 < len(self.fed.rows) < 4)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.fed.cache.batch_repeat_interleave(repeats)
        self.fed.select([row for row in range(len(self.fed.rows)) for _ in range(repeats)])

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data())
    def crop(self, data):
        """By a few columns or many, seldom by all."""
        most = data.draw(st.sampled_from([4, self.fed.columns - 1]))
        self.fed.crop(max(0, self.fed.columns - data.draw(st.integers(0, most))))

    @precondition(lambda self: self.fed.rows)
    @rule()
    def flush(self):
        self.fed.flush()

    @precondition(lambda self: self.fed.columns > 20)
    @rule()
    def reset(self):
        self.fed.cache.reset()
        self.fed.rows = []

    @precondition(lambda self: self.fed.rows)
    @rule()
    def copy(self):
        self.other = copy.deepcopy(self.fed)

    @precondition(lambda self: self.other is not None)
    @rule()
    def change_places(self):
        """From now on the copy is the one that lives."""
        self.fed, self.other = self.other, self.fed

    @precondition(lambda self: self.fed.rows)
    @rule()
    def save_and_load(self):
        self.fed.again(Path(self.folder.name) / "cache")

    @invariant()
    def holds(self):
        for fed in (self.fed, self.other):
            if fed is not None:
                fed.check()


Life.TestCase.settings = settings(stateful_step_count=40, max_examples=3 * settings.default.max_examples)
TestLife = Life.TestCase


@given(st.data(), st.permutations(range(4)))
def test_order_of_rows_does_not_matter(data, order):
    """Each row reads the same bits wherever it stands, and as many blocks are stored."""
    groups = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=4, max_size=4))
    feds = Fed(block_size=3, groups=groups), Fed(block_size=3, groups=groups and [groups[row] for row in order])
    for _ in range(data.draw(st.integers(1, 4))):
        counts = [sum(held is not None for held in row) for row in feds[0].rows] or [0] * 4
        ids, mask, positions, _ = data.draw(calls(4, counts, feds[0].columns))
        feds[0].feed(ids, mask, positions)
        if positions is not None and len(positions) > 1:
            positions = [positions[row] for row in order]
        feds[1].feed([ids[row] for row in order], mask and [mask[row] for row in order], positions)
    for idx in range(NUM_LAYERS):
        first, second = (fed.cache.dequantize(idx) for fed in feds)
        assert all(torch.equal(a[list(order)], b) for a, b in zip(first, second, strict=True))
    for fed in feds:
        fed.flush()
        fed.check()
    assert feds[0].cache.num_blocks == feds[1].cache.num_blocks


@given(cuts(23), cuts(23))
def test_calls_of_any_length_store_the_same_blocks(chunks, others):
    """Rows part in the middle of a block; the slots come in another order, the table says the same."""
    ids, tables = torch.randint(1, 3, (23,), generator=torch.Generator().manual_seed(0)).tolist(), []
    rows = [ids, [*ids[:14], *(3 - token for token in ids[14:])], ids]
    for lengths in (chunks, others):
        fed, past = Fed(block_size=4), 0
        for length in lengths:
            fed.feed([row[past : past + length] for row in rows])
            past += length
        fed.flush()
        fed.check()
        tables.append(fed.cache._ledger.block_table())
    for table in tables:
        assert torch.equal(table[0], table[2]) and torch.equal(table[0, :3], table[1, :3])
        assert fed.cache.num_blocks == 7 and not set(table[0, 3:].tolist()) & set(table[1, 3:].tolist())


# -- a crop into blocks that rows share --------------------------------------------------------------------------------


def shared(block_size=4, batch=2, length=16, **options) -> Fed:
    """Rows of the same ids, flushed."""
    fed = Fed(block_size=block_size, **options)
    fed.feed([list(range(1, length + 1))] * batch)
    fed.flush()
    return fed


@pytest.mark.parametrize("keep", range(1, 16))
def test_rows_go_apart_in_the_middle_of_a_block(keep):
    fed = shared()
    assert fed.cache.num_blocks == 4
    fed.crop(keep)
    fed.check()
    assert fed.cache.num_blocks == -(-keep // 4), "the rest of the last block stays, later ones go"
    for place in range(8):
        fed.feed([[50 + place], [70 + place]])
        fed.check()
    fed.flush()
    fed.check()
    whole = keep // 4
    table = fed.cache._ledger.block_table()
    assert torch.equal(table[0, :whole], table[1, :whole]) and (table[0, whole:] != table[1, whole:]).all()
    assert fed.cache.num_blocks == whole + 2 * ((keep + 8) // 4 - whole)


def test_the_same_tokens_again_take_no_new_block():
    fed = shared()
    pool = fed.cache.layers[0].state.store.blocks[:1].clone()
    fed.crop(2)
    fed.feed([list(range(3, 17))] * 2)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 4 and torch.equal(fed.cache.layers[0].state.store.blocks[:1], pool)


def test_a_row_that_leaves_a_block_does_not_change_it_for_another():
    """Only one of the rows writes into the block again; the other still stands in its middle."""
    fed = shared(length=8)
    fed.crop(6)
    fed.feed([[50, 51], [0, 0]], mask=[[1, 1], [0, 0]])
    fed.flush()
    fed.check()
    assert fed.cache._ledger.block_table().tolist() == [[0, 2], [0, 1]]
    assert fed.cache._ledger.compressed == [8, 6]
    fed.feed([[52], [60]])
    fed.feed([[53], [61]])
    fed.flush()
    fed.check()
    assert fed.cache._ledger.ref_counts() == {0: 2, 1: 1, 2: 1}


def test_slots_that_no_row_holds_are_given_up():
    fed = Fed(block_size=4)
    fed.feed([[1] * 16, [1] * 8 + [2] * 8, [3] * 16])
    fed.flush()
    assert fed.cache.num_blocks == 4 + 2 + 4
    before = fed.cache.memory_report().stored_bytes
    fed.cache.batch_select_indices(torch.tensor([1]))
    fed.select([1])
    fed.check()
    assert fed.cache._ledger.ref_counts() == dict.fromkeys(range(4), 1)
    assert fed.cache.memory_report().stored_bytes < before / 2
    fed.crop(5)
    fed.check()
    assert fed.cache.num_blocks == 2


# -- what is not shared ------------------------------------------------------------------------------------------------


def test_rows_of_different_groups_never_share():
    fed = Fed(block_size=4, groups=[7, 0, 7])
    fed.feed([[1] * 12] * 3)
    fed.flush()
    fed.check()
    assert fed.cache._ledger.block_table().tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    fed.cache.reorder_cache(torch.tensor([1, 0, 1]))
    fed.select([1, 0, 1])
    fed.feed([[2] * 4] * 3)
    fed.flush()
    fed.check()
    assert fed.cache._ledger.ref_counts() == dict.fromkeys(range(3), 1) | dict.fromkeys(range(3, 6), 2) | {6: 2, 7: 1}


def test_the_number_of_groups_is_that_of_the_rows():
    fed = Fed(block_size=4, groups=[0, 1, 0])
    with pytest.raises(CacheStateError, match="`groups`.*2 rows.*got 3"):
        fed.feed([[1] * 6] * 2)
    fed.rows = []
    fed.feed([[1] * 6] * 3)
    fed.flush()
    fed.check()
    fed.crop(0)
    fed.feed([[1] * 6] * 3)
    fed.check()


@pytest.mark.parametrize("positions", [[[0, 1, 2, 3], [10, 11, 12, 13]], [[0, 1, 2, 3], [0, 1, 2, 4]]], ids=str)
def test_tokens_at_other_positions_are_others(positions):
    fed = Fed(block_size=4)
    fed.feed([[1, 2, 3, 4]] * 2, positions=positions)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 2


def test_pads_do_not_count_but_positions_do():
    ids, mask = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [1, 2, 3, 4, 0]], [[0, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 1, 1, 1, 0]]
    counted = [[0, 0, 1, 2, 3], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    for positions, expected in ((counted, 1), (None, 3)):
        fed = Fed(block_size=4)
        fed.feed(ids, mask, positions)
        fed.flush()
        fed.check()
        assert fed.cache.num_blocks == expected


def test_what_is_not_text_is_shared_by_copies_alone():
    fed = Fed(block_size=4)
    fed.feed([[1, 2, 3, 4]] * 2, is_text=False)
    fed.feed([[5, 6, 7, 8]] * 2)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 4, "text behind it is not alike either"
    fed.cache.batch_repeat_interleave(2)
    fed.select([0, 0, 1, 1])
    fed.feed([[9, 9, 9, 9]] * 4)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 6


def test_what_is_not_text_is_not_taken_for_what_stood_there_before():
    fed = Fed(block_size=2)
    for _ in range(3):
        fed.feed([[1]], is_text=False)
    fed.feed([[1]], is_text=False)
    fed.flush()
    fed.crop(3)
    fed.feed([[1]], is_text=False)
    fed.flush()
    fed.check()


def test_not_text_goes_on_unlike_after_a_way_through_a_file(tmp_path):
    fed = Fed(block_size=4)
    fed.feed([[1] * 6] * 2, is_text=False)
    fed.flush()
    fed.again(tmp_path / "cache")
    fed.feed([[1] * 2] * 2, is_text=False)
    fed.feed([[1] * 4] * 2)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 6


def test_positions_that_nobody_gives_are_columns():
    fed = Fed(block_size=2)
    fed.feed([[1, 1]] * 2)
    fed.feed([[1, 1]] * 2, mask=[[1, 1], [0, 0]])
    fed.feed([[1, 1]] * 2, mask=[[0, 0], [1, 1]], positions=[[2, 3]])
    fed.feed([[1, 1]] * 2, positions=[[4, 5], [6, 7]])
    fed.flush()
    fed.check()
    assert fed.cache._ledger.block_table().tolist() == [[0, 1, 2], [0, 1, 3]]


def test_what_is_given_up_is_not_found_again():
    """A block that no row held for a while is stored anew, in a slot that was another's."""
    fed = shared(batch=1, length=8)
    fed.crop(4)
    for token in (50, 5, 50, 5):
        fed.feed([[token, 6, 7, 8]])
        fed.flush()
        fed.check()
        assert fed.cache.num_blocks == 2
        fed.crop(4)


def test_rows_that_go_different_ways_in_the_middle_of_different_blocks():
    """What a crop has left of each row's block is read from its own."""
    fed = Fed(block_size=4)
    fed.feed([[1, 2, 3, 4], [5, 6, 7, 8]])
    fed.flush()
    fed.crop(2)
    fed.feed([[9, 9], [9, 9]])
    fed.flush()
    fed.check()
    assert fed.cache._ledger.block_table().tolist() == [[0], [1]]


def test_groups_follow_their_rows():
    fed = Fed(block_size=2, groups=[0, 1, 1])
    fed.feed([[1]] * 3)
    fed.cache.batch_select_indices(torch.tensor([2, 0, 1]))
    fed.select([2, 0, 1])
    fed.feed([[1]] * 3)
    fed.flush()
    fed.check()
    assert fed.cache._ledger.block_table().tolist() == [[0], [1], [0]]


def test_what_was_fed_follows_its_rows():
    """Its block is not yet whole when the rows are chosen."""
    fed = Fed(block_size=2)
    fed.feed([[1], [2]])
    fed.cache.reorder_cache(torch.tensor([1, 0]))
    fed.select([1, 0])
    fed.cache.batch_repeat_interleave(2)
    fed.select([0, 0, 1, 1])
    fed.feed([[3]] * 4)
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 2


def test_ids_may_be_overwritten_after_the_call():
    """As by a loop that reuses its buffers."""
    cache, ids = JointEncodedCache(tiny_model("llama"), block_size=4), torch.ones(2, 4, dtype=torch.long)
    cache._ledger.note_mask(None, outermost=True)
    cache._ledger.note_text(ids, None, True)
    for idx, layer in enumerate(cache.layers):
        layer.receive_tables()
        cache.update(torch.ones(2, HEADS, 4, KEY_DIM), torch.ones(2, HEADS, 4, VALUE_DIM), idx)
    ids[1] = 2
    cache.flush()
    assert cache.num_blocks == 1


# -- copies and files --------------------------------------------------------------------------------------------------


def test_a_repeated_row_takes_no_new_block():
    fed = shared(length=70, batch=1, block_size=4)
    stores = [layer.state.store for layer in fed.cache.layers]
    before = fed.cache.memory_report()
    fed.cache.batch_repeat_interleave(8)
    fed.select([0] * 8)
    after = fed.cache.memory_report()
    for layer, store in zip(fed.cache.layers, stores, strict=True):
        assert layer.state.store.blocks is store.blocks
    rows = "recent window", "block tables", "bookkeeping"
    for name in after.parts:
        assert after.parts[name] == before.parts[name] * (8 if name in rows else 1), name
    assert after.stored_bytes - before.stored_bytes == 7 * sum(before.parts[name] for name in rows)
    fed.check()
    fed.feed([[row] * 4 for row in range(8)])
    fed.flush()
    fed.check()
    assert fed.cache.num_blocks == 17 + 8


@pytest.mark.parametrize("keep", [13, 14, 16, 18])
def test_a_file_of_blocks_that_are_held_whole_and_in_part(tmp_path, keep):
    """One row was fed less, so that a crop leaves it a part of what the other holds whole."""
    fed = Fed(block_size=4)
    fed.feed([[1] * 18, [1] * 12 + [0] * 6], [[1] * 18, [1] * 12 + [0] * 6])
    fed.feed([[2], [1]])
    fed.feed([[2], [1]])
    fed.flush()
    fed.crop(keep)
    fed.again(tmp_path / "cache")
    fed.check()
    fed.feed([[1, 1, 1], [3, 3, 3]])
    fed.flush()
    fed.check()


@pytest.mark.parametrize("keep", range(1, 16))
def test_a_file_of_a_part_of_a_block_goes_on(tmp_path, keep):
    fed = shared(batch=3)
    fed.crop(keep)
    fed.again(tmp_path / "cache")
    fed.check()
    assert fed.cache.num_blocks == -(-keep // 4)
    fed.feed([[2] * 5, [3] * 5, [2] * 5])
    fed.flush()
    fed.check()
    fed.again(tmp_path / "cache")
    fed.check()


def test_a_file_holds_a_shared_block_once(tmp_path):
    sizes = []
    for groups in (None, list(range(8))):
        fed = shared(length=402, batch=8, groups=groups)
        fed.crop(399)
        fed.cache.save(tmp_path / "cache")
        sizes.append((tmp_path / "cache").stat().st_size)
        assert fed.cache.num_blocks == 100 * len(set(groups or [0]))
    blocks = 100 * NUM_LAYERS * 4 * WIDTH * 4
    assert sizes[1] - sizes[0] == pytest.approx(7 * blocks, rel=0.01)


def put(name: str, change):
    """Changes the tensor `name` of a file, a copy of it by `change(tensor)`, which may return another."""

    def apply(content, tensors):
        tensor = tensors[name].clone()
        changed = change(tensor)
        tensors[name] = tensor if changed is None else changed.clone()

    return apply


TABLE = "ledger.block_table"
CHANGES = {
    "shared": put(TABLE, lambda table: table[1].copy_(table[0])),
    "not shared": put(TABLE, lambda table: table[1, :2].fill_(4)),
    "beyond the pool": put(TABLE, lambda table: table[1, 3:].fill_(99)),
    "negative": put(TABLE, lambda table: table[1, 3:].fill_(-1)),
    "order": put(TABLE, lambda table: table.flip(1)),
    "dtype": put(TABLE, lambda table: table.int()),
    "width": put(TABLE, lambda table: table[:, :-1]),
    "ids": put("ledger.fed", lambda fed: fed[1, 5].fill_(7)),
    "groups": put("ledger.groups", lambda groups: groups[1:].fill_(1)),
    "pool": put("layers.1.state.store.blocks", lambda blocks: blocks[:-1]),
    "table of a layer": put("layers.1.state.store.block_table", lambda table: table[1, 2:].fill_(0)),
    "no ids": lambda content, tensors: tensors.pop("ledger.fed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_whose_blocks_are_not_those_of_its_ids(tmp_path, change):
    fed = Fed(block_size=4)
    fed.feed([[1] * 18, [1] * 8 + [2] * 10])
    fed.flush()
    fed.cache.save(tmp_path / "cache")
    tampered(tmp_path / "cache", lambda content, tensors: None)
    JointEncodedCache.load(tmp_path / "cache", tiny_model("llama"))
    tampered(tmp_path / "cache", CHANGES[change])
    with pytest.raises(CacheStateError, match="saved cache"):
        JointEncodedCache.load(tmp_path / "cache", tiny_model("llama"))


def test_a_loaded_part_of_a_block_is_not_what_comes_behind_it(tmp_path):
    fed = shared(batch=1, length=2, block_size=2)
    fed.crop(1)
    fed.feed([[9]])
    fed.again(tmp_path / "cache")
    fed.flush()
    fed.check()


def test_a_file_of_two_blocks_that_a_crop_made_alike(tmp_path):
    fed = Fed(block_size=4)
    fed.feed([[1, 2, 3, 4], [1, 2, 5, 6]])
    fed.flush()
    fed.crop(2)
    fed.again(tmp_path / "cache")
    fed.check()
