"""`JointEncodedCache` where something is lost: similar blocks share storage, or a compressor codes them."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from compressors import TIGHT_WINDOW, compressor_of, learned_compressor, random_compressor
from helpers import cuts, feed, full_cache, left_padded, make_tokens, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import SMALL, build, tiny_model
from similar_rows import Rows
from test_saving import put, tampered
from transformers import PreTrainedModel

from deltakv_hf import (
    CacheStateError,
    DeltaKVCache,
    DeltaKVError,
    InvalidOptionError,
    JointEncodedCache,
    dispatch,
    reading,
)
from deltakv_hf.fusion import SCOPES
from deltakv_hf.rope import unrotated_tokens

# -- the bound ---------------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A cache whose similar blocks share storage, and all that can be done to it: no block is beyond the bound."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.fed = None

    def teardown(self):
        self.folder.cleanup()

    @initialize(data=st.data(), batch=st.integers(2, 4), noise=st.sampled_from([0.1, 0.3, 0.6, 3.0]))
    def begin(self, data, batch, noise):
        options = dict(
            block_size=data.draw(st.integers(1, 3)),
            max_relative_error=data.draw(st.sampled_from([0.2, 0.5, 0.8])),
            target_ratio=data.draw(st.sampled_from([None, None, 0.5])),
            scope=data.draw(st.sampled_from(SCOPES)),
            rope=data.draw(st.sampled_from(["stripped", "stripped", "rotated"])),
            num_sink_tokens=data.draw(st.sampled_from([0, 0, 2])),
            recent_window=data.draw(st.sampled_from([0, 3])),
            groups=data.draw(st.none() | st.lists(st.integers(0, 1), min_size=batch, max_size=batch)),
        )
        self.batch = batch
        self.fed = Rows(noise, **options)
        self.read(data, 40)

    def read(self, data, length):
        batch, seed = len(self.fed.rows) or self.batch, data.draw(st.integers(0, 99))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 4, (batch, length), generator=generator)
        if data.draw(st.booleans()):
            # rows that begin alike, and part
            ids[:, : length // 2] = ids[:1, : length // 2]
        mask = None
        if data.draw(st.sampled_from([False, False, True])):
            mask = (torch.rand(batch, length, generator=generator) < 0.8).long().tolist()
        self.fed.feed(ids.tolist(), mask)

    @rule(data=st.data(), length=st.sampled_from([1, 1, 2, 7, 20]))
    def feed(self, data, length):
        self.read(data, length)

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data(), beams=st.booleans())
    def choose(self, data, beams):
        self.fed.select(data.draw(st.lists(st.integers(0, len(self.fed.rows) - 1), min_size=1, max_size=4)), beams)

    @precondition(lambda self: 0 < len(self.fed.rows) < 3)
    @rule()
    def repeat(self):
        self.fed.repeat(2)

    @precondition(lambda self: self.fed.rows)
    @rule(data=st.data())
    def crop(self, data):
        """By a few columns, seldom by many or all."""
        most = data.draw(st.sampled_from([4, 4, self.fed.columns]))
        self.fed.crop(max(0, self.fed.columns - data.draw(st.integers(0, most))))

    @precondition(lambda self: self.fed.rows)
    @rule()
    def flush(self):
        self.fed.cache.flush()

    @precondition(lambda self: self.fed.columns > 80)
    @rule()
    def reset(self):
        self.fed.reset()

    @precondition(lambda self: self.fed.rows)
    @rule()
    def save_and_load(self):
        path = Path(self.folder.name) / "cache"
        self.fed.cache.save(path)
        self.fed.cache = JointEncodedCache.load(path, tiny_model("llama"))

    @invariant()
    def holds(self):
        if self.fed is not None:
            self.fed.check()


Life.TestCase.settings = settings(stateful_step_count=12)
TestLife = Life.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_a_block_that_a_crop_has_cut_gathers_no_error(seed):
    """Its beginning is read as a leader's: were the block made a member again, each crop would add an error."""
    generator = torch.Generator().manual_seed(seed)
    fed = Rows(0.0, block_size=4, max_relative_error=0.8)
    fed.feed(torch.randint(1, 7, (4, 121), generator=generator).tolist())
    fed.cache.flush()
    for _ in range(4):
        fed.crop(117)
        fed.check()
        fed.feed(torch.randint(1, 7, (4, 4), generator=generator).tolist())
        fed.cache.flush()
        fed.check()
    slots = fed.cache._ledger.block_table()[:, 29]
    assert all((layer.state.store.scale[slots] == 1).all() for layer in fed.cache.layers)


# -- who shares --------------------------------------------------------------------------------------------------------


def text(seed: int, length: int = 80) -> list[int]:
    """Ids of blocks of 4 that are all different."""
    return torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:length].add(1).tolist()


def read(rows: list[list[int]], noise: float = 0.05, **options) -> Rows:
    fed = Rows(noise, **{"block_size": 4, "max_relative_error": 0.4} | options)
    fed.feed(rows)
    fed.cache.flush()
    fed.check()
    return fed


def leaders(fed: Rows) -> list[int]:
    return [len(layer.state.store.blocks) for layer in fed.cache.layers]


OTHER = [[401, 402, 403, 404], [405, 406, 407, 408], [409, 410, 411, 412]]


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        # of two requests, at the same place and at another
        ([OTHER[0] + text(0), OTHER[1] + text(0)], ("all", "batch", "same_index")),
        ([OTHER[0] + text(0) + OTHER[1], OTHER[2] + OTHER[1] + text(0)], ("all", "batch")),
        # twice of one
        ([text(0) + text(0)], ("all", "intra")),
    ],
    ids=["same place", "other place", "one request"],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_who_shares_in_each_scope(rows, shares, scope):
    fed = read(rows, scope=scope)
    assert fed.cache.num_blocks == sum(len(row) for row in rows) // 4
    # blocks of the text, and at other places the block that both have
    for count in leaders(fed):
        assert (fed.cache.num_blocks - count in (20, 21)) if scope in shares else count == fed.cache.num_blocks
    assert bool(fed.cache.rate_distortion()) == (scope != "none")


def test_more_requests_than_a_number_has_bits(tmp_path):
    """The 70 rows of two texts in turn; a copy of a row is no other request."""
    rows = [[500 + row] * 4 + text(row % 2, 16) for row in range(70)]
    counts = {}
    for scope in ("all", "batch", "intra"):
        fed = read(rows, scope=scope)
        counts[scope] = leaders(fed)
        fed.repeat(2)
        fed.check()
        fed.feed([[1, 2, 3, 4]] * 140)
        fed.cache.flush()
        fed.check()
        fed.cache.save(tmp_path / "cache")
        JointEncodedCache.load(tmp_path / "cache", tiny_model("llama"))
    assert counts == {"all": [70 + 8] * 2, "batch": [70 + 8] * 2, "intra": [70 * 5] * 2}
    # a file of tokens that no block holds yet
    few = Rows(block_size=4, max_relative_error=0.4)
    few.feed([[1, 2]] * 70)
    few.cache.save(tmp_path / "cache")
    few.cache = JointEncodedCache.load(tmp_path / "cache", tiny_model("llama"))
    few.feed([[3, 4, 5]] * 70)
    few.cache.flush()
    few.check()


@pytest.mark.parametrize("rope", ["stripped", "rotated"])
@pytest.mark.parametrize("scope", SCOPES)
def test_order_of_rows_does_not_matter(scope, rope):
    """Each row reads the same bits wherever it stands."""
    generator, order = torch.Generator().manual_seed(0), [3, 0, 4, 2, 1]
    # rows of five blocks, in any order
    ids = torch.arange(1, 16).view(5, 3)[torch.randint(0, 5, (5, 20), generator=generator)].flatten(1)
    ids[1, :30], ids[4, :30] = ids[0, :30], ids[0, :30]
    options = dict(scope=scope, rope=rope, block_size=3, max_relative_error=0.6)
    made = []
    for rows, groups in ((list(range(5)), [0, 0, 1, 1, 0]), (order, [1, 0, 0, 1, 0])):
        fed = Rows(0.3, groups=groups, **options)
        for part in (slice(0, 41), slice(41, 60)):
            fed.feed(ids[rows, part].tolist())
            fed.cache.flush()
        fed.check()
        made.append(fed)
    # blocks that turn with their places are alike at equal ones
    assert (rope, scope) in (("rotated", "intra"), (rope, "none")) or leaders(made[0])[0] < made[0].cache.num_blocks
    assert leaders(made[0]) == leaders(made[1])
    for idx in range(2):
        first, second = (fed.cache.dequantize(idx) for fed in made)
        assert all(torch.equal(a[order], b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_group_does_not_depend_on_another(scope):
    """Not a bit of it, nor what is said about it, whatever the rows of the other one hold and whatever happens."""
    generator, results = torch.Generator().manual_seed(0), []
    own = torch.randint(1, 4, (2, 62), generator=generator)
    other = torch.randint(1, 4, (2, 62), generator=generator)
    for theirs in (own, other, other.flip(1) + 100):
        ids = torch.stack([theirs[0], own[0], own[1], theirs[1]])
        fed = Rows(0.3, groups=[5, 2, 2, 5], scope=scope, block_size=3, max_relative_error=0.6)
        fed.feed(ids[:, :40].tolist())
        fed.feed(ids[:, 40:].tolist())
        fed.crop(55)
        fed.feed(ids[:, 2:9].tolist())
        fed.select([2, 1, 3, 1])
        fed.cache.flush()
        fed.check()
        plans = [plan for plan in fed.cache.rate_distortion() if plan.group == 0]
        results.append([plans, *(part[[0, 1, 3]] for idx in range(2) for part in fed.cache.dequantize(idx))])
    for plans, *states in results[1:]:
        assert plans == results[0][0] and all(map(torch.equal, states, results[0][1:]))


# -- what was predicted ------------------------------------------------------------------------------------------------


def planted(noise: float, copies: int = 4, **options) -> list:
    """Plans for 60 texts of 4 tokens in as many orders as there are rows, with noise of a known size."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.arange(1, 241).view(60, 4)
    rows = [blocks[torch.randperm(60, generator=generator)].flatten().tolist() for _ in range(copies)]
    fed = read(rows, noise, **options)
    plans, counts = fed.cache.rate_distortion(), leaders(fed)
    assert [plan.layer_idx for plan in plans] == [0, 1] and {plan.num_blocks for plan in plans} == {60 * copies}
    for plan, count in zip(plans, counts, strict=True):
        assert plan.achieved_kept == pytest.approx(count / plan.num_blocks)
    return plans


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.2])
@pytest.mark.parametrize("copies", [2, 4])
def test_copies_with_noise_are_found_as_predicted(noise, copies):
    """Of two copies with the noise e each, one is read as the other with an error of sqrt(2) e."""
    for plan in planted(noise, copies, max_relative_error=0.5):
        assert plan.predicted_kept == pytest.approx(1 / copies, abs=0.02)
        assert plan.achieved_kept == pytest.approx(1 / copies, abs=0.02)
        # the larger of keys and values
        assert 2**0.5 * noise * 0.9 < plan.achieved_error < 2**0.5 * noise * 1.4 and not plan.is_left_alone


def test_matches_that_are_only_some_are_predicted_too():
    """At the error that about half the copies have."""
    for plan in planted(0.2, max_relative_error=0.29):
        assert 0.3 < plan.predicted_kept < 0.9
        assert plan.achieved_kept == pytest.approx(plan.predicted_kept, abs=0.06)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_a_ratio_is_reached_by_the_least_error(ratio):
    plans = planted(0.2, max_relative_error=0.0, target_ratio=ratio)
    for plan in plans:
        assert plan.predicted_kept <= ratio and plan.achieved_kept <= ratio + 0.06
        assert 0.1 < plan.max_relative_error < 0.5
    # what cannot be reached is left at the largest error, one that may not be allowed too
    for plan in planted(0.2, max_relative_error=0.25, target_ratio=0.01):
        assert plan.max_relative_error == 0.25 and plan.achieved_kept > 0.25


@pytest.mark.parametrize("options", [{"max_relative_error": 0.5}, {"max_relative_error": 0.0, "target_ratio": 0.3}])
def test_blocks_without_relation_are_left_alone(options):
    fed = read(torch.arange(1, 2561).view(4, 640).tolist(), 0.0, block_size=16, **options)
    fed_states = fed.states()
    for idx, (count, plan) in enumerate(zip(leaders(fed), fed.cache.rate_distortion(), strict=True)):
        assert count == 160 and plan.achieved_kept == 1
        for got, expected in zip(fed.cache.dequantize(idx), fed_states, strict=True):
            torch.testing.assert_close(got, expected[idx], rtol=0, atol=1e-5)


# -- in models ---------------------------------------------------------------------------------------------------------

UNUSUAL = {
    "heads of 12": lambda: tf.LlamaConfig(**SMALL | {"head_dim": 12}),
    "one head of 6": lambda: tf.LlamaConfig(**SMALL | {"num_key_value_heads": 1, "head_dim": 6}),
}
FAMILIES = ["llama", "llama-yarn", "phi3-partial", "smollm3", "cohere", "gemma3", "gpt2", *UNUSUAL]
# deeper layers of random models are not very alike
ERROR = 0.85
# how a cache loses something; and what loses nothing
WAYS = {
    "fused": dict(max_relative_error=ERROR),
    "rotated": dict(max_relative_error=ERROR, rope="rotated"),
    "sinks": dict(max_relative_error=ERROR, num_sink_tokens=3, recent_window=5),
    "exact": dict(num_sink_tokens=3, recent_window=5),
}


def model_of(family: str) -> PreTrainedModel:
    return build(UNUSUAL[family]()) if family in UNUSUAL else tiny_model(family)


def inputs_of(padded: bool) -> dict[str, torch.Tensor]:
    """Rows of five passages of eight tokens behind beginnings of their own, two of them in another order."""
    passages, order = prompt(5, 8), torch.tensor([[0, 1, 2, 3, 4]] * 2 + [[4, 3, 1, 0, 2], [0, 2, 4, 1, 3]])
    ids = torch.cat([prompt(4, 8, seed=1), passages[order].flatten(1)], 1)
    mask = torch.ones_like(ids)
    if padded:
        mask[2, :13], mask[3, :4] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def filled(model: PreTrainedModel, padded: bool = False, **options) -> tuple[JointEncodedCache, torch.Tensor]:
    """A cache that has seen `inputs_of`, flushed, and their mask."""
    cache, inputs = JointEncodedCache(model, **{"block_size": 4} | options), inputs_of(padded)
    model(**inputs, position_ids=positions_of(inputs["attention_mask"]), past_key_values=cache)
    cache.flush()
    return cache, inputs["attention_mask"]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def steps(model: PreTrainedModel, cache, mask: torch.Tensor, lengths=(1, 2, 6), seed: int = 0) -> torch.Tensor:
    """Logits of further calls; the rows are told different things."""
    logits = []
    for i, length in enumerate(lengths):
        mask = F.pad(mask, (0, length), value=1)
        now = {"attention_mask": mask, "position_ids": positions_of(mask)[:, -length:]}
        logits.append(model(prompt(len(mask), length, seed + i), past_key_values=cache, **now).logits)
    return torch.cat(logits, 1)


def num_members(cache: JointEncodedCache) -> int:
    return sum(len(layer.state.store.leader) - len(layer.state.store.blocks) for layer in cache.own_layers)


@pytest.mark.parametrize("way", ["fused", "rotated", "sinks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_all_kinds(family, way):
    """Blocks are within the bound of what the model made; a `DynamicCache` of what is held says the same."""
    model, options = model_of(family), WAYS[way]
    cache, mask = filled(model, True, **options)
    inputs, full = inputs_of(True), full_cache(model)
    model(**inputs, position_ids=positions_of(mask), past_key_values=full)
    assert num_members(cache) > 0
    for layer in cache.own_layers:
        store, host = layer.state.store, full.layers[layer.layer_idx]
        got, made = (
            unrotated_tokens(layer.form, *states, layer.form and layer.tables.rows(slice(None), 0, 48))
            for states in (layer.dequantize(), (host.keys, host.values))
        )
        width = layer.compressor.key_width
        for row, count in enumerate(cache._ledger.compressed):
            own = mask[row].nonzero().flatten()[cache.options.num_sink_tokens :][:count].view(-1, 4)
            for part in (slice(0, width), slice(width, None)):
                gone = (got - made)[row, own][..., part].flatten(1).norm(dim=1)
                apart = (made[row, own] - store.mean[0])[..., part].flatten(1).norm(dim=1)
                assert (gone <= apart * (ERROR + 1e-5) + 1e-4).all()
    dynamic = cache.to_dynamic_cache()
    for idx, layer in enumerate(dynamic.layers):
        assert all(torch.equal(*pair) for pair in zip((layer.keys, layer.values), cache.dequantize(idx), strict=True))
    # in one call: between two of them similar blocks would share anew
    got, expected = (steps(model, held, mask, [6]) for held in (cache, dynamic))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def assert_kernel_reads_the_same(model, cache, mask, length: int = 1) -> None:
    """A call that a GPU would serve by the kernel, here in Triton's interpreter, and by dense keys and values."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are on the GPU, these models are not: see test_gpu.py")
    expected, calls, original = steps(model, copy.deepcopy(cache), mask, [length]), [], dispatch.attend_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "has_kernels", lambda device: True)
        patch.setattr(reading, "HALVES", (torch.float32,))
        patch.setattr(dispatch, "attend_blocks", lambda *a, **k: calls.append(1) or original(*a, **k))
        got = steps(model, cache, mask, [length])
    assert len(calls) == len(cache.own_layers)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "way", "padded"),
    [("llama", way, padded) for way in WAYS for padded in (False, True)]
    + [(name, "sinks", True) for name in FAMILIES[1:]],
)
def test_the_kernel_reads_what_is_held(family, way, padded):
    model = model_of(family)
    assert_kernel_reads_the_same(model, *filled(model, padded, **WAYS[way]))


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_reads_what_crops_and_choices_have_left(way):
    """Of the last block a part."""
    model = tiny_model("llama", "deltakv")
    cache, mask = filled(model, True, **WAYS[way])
    cache.crop(-18)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert any(count % 4 for count in cache._ledger.compressed)
    assert_kernel_reads_the_same(model, cache, mask[[2, 2, 0, 0], :30], 2)


# -- a compressor ------------------------------------------------------------------------------------------------------

MAKERS = {"transform": (random_compressor, 4), "learned": (learned_compressor, 6)}


def both(made: str = "transform") -> tuple[JointEncodedCache, DeltaKVCache]:
    """Caches of blocks and of rows, with one compressor."""
    model, (make, size) = tiny_model("llama"), MAKERS[made]
    compressor, options = compressor_of(model, make), TIGHT_WINDOW | {"block_size": size}
    return JointEncodedCache(model, residual=compressor, **options), DeltaKVCache(
        model, compressor=compressor, **options
    )


def assert_read_alike(coded: JointEncodedCache, plain: DeltaKVCache) -> None:
    """The same tokens are compressed, and held by the same bytes."""
    assert coded._ledger.compressed == plain._ledger.compressed
    for idx, (layer, other) in enumerate(zip(coded.own_layers, plain.own_layers, strict=True)):
        for states, expected in zip(coded.dequantize(idx), plain.dequantize(idx), strict=True):
            assert torch.equal(states, expected)
        store, lattice = layer.compressor.gathered(layer.state.store), layer.compressor.lattice
        for row, count in enumerate(plain._ledger.compressed):
            counts = store.counts(lattice.count(count), count - lattice.count(count))
            for name, number in counts.items():
                assert torch.equal(getattr(store, name)[row, :number], getattr(other.state.store, name)[row, :number])


TAKEN = {"reorder": [2, 0, 0], "select": [2, 1]}
CHANGES = {
    "crop": lambda cache: cache.crop(-5),
    "deep crop": lambda cache: cache.crop(-23),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor(TAKEN["reorder"])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor(TAKEN["select"])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "flush": lambda cache: cache.flush(),
}


@given(
    made=st.sampled_from(list(MAKERS)),
    chunks=cuts(40),
    changes=st.lists(st.sampled_from(list(CHANGES)), max_size=3),
    pads=st.none() | st.lists(st.integers(0, 30), min_size=3, max_size=3),
    shared=st.booleans(),
)
def test_codes_are_those_of_a_cache_of_rows(made, chunks, changes, pads, shared):
    """Bit for bit, whatever happens, whether blocks are shared or not."""
    mask = None if pads is None else torch.stack([torch.arange(60) >= count for count in pads]).long()
    tokens, caches = make_tokens(60, batch=3, mask=mask), both(made)
    if shared:
        # rows that begin alike
        tokens.keys[:, 1, :, :24], tokens.values[:, 1, :, :24] = tokens.keys[:, 0, :, :24], tokens.values[:, 0, :, :24]
    ids = torch.arange(180).view(3, 60)
    ids[1, :24] = ids[0, :24]

    def go_on(tokens, chunks, past=0):
        for cache in caches:
            at = past
            for length in chunks:
                if shared and mask is None and cache is caches[0] and past == 0:
                    cache._ledger.note_text(ids[:, at : at + length], None, True)
                views = feed(cache, tokens.columns(slice(0, at + length)), [length], at)
                at += length
            found.append([torch.clone(part) for pair in views for part in pair])

    found = []
    go_on(tokens.columns(slice(0, 40)), chunks)
    rows, keep = [0, 1, 2], 40
    for change in changes:
        if change in ("reorder", "select") and len(rows) < 3:
            continue
        for cache in caches:
            CHANGES[change](cache)
        rows = [rows[row] for row in TAKEN.get(change, range(len(rows)))]
        rows = [row for row in rows for _ in range(2)] if change == "repeat" else rows
        keep = max(1, keep - {"crop": 5, "deep crop": 23}.get(change, 0))
        if caches[0].get_seq_length() == 0:
            return
        assert_read_alike(*caches)
    assert caches[0].get_seq_length() == keep
    more = make_tokens(
        keep + 15, batch=len(rows), mask=None if mask is None else F.pad(mask[rows, :keep], (0, 15), value=1), seed=1
    )
    go_on(more, [1, 12, 2], keep)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert all(map(torch.equal, first, second))
    for cache in caches:
        cache.flush()
    assert_read_alike(*caches)


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_model_says_what_it_says_with_codes_of_its_rows(family, made):
    """Bit for bit, padded rows that share nothing."""
    model, (make, size) = tiny_model(family), MAKERS[made]
    inputs, options, found = left_padded([48, 31, 40]), TIGHT_WINDOW | {"block_size": size}, []
    for kind, name in ((JointEncodedCache, "residual"), (DeltaKVCache, "compressor")):
        cache = kind(model, **{name: compressor_of(model, make)}, **options)
        model(**inputs, position_ids=positions_of(inputs["attention_mask"]), past_key_values=cache)
        logits = [steps(model, cache, inputs["attention_mask"], [1, 2, 7])]
        mask = F.pad(inputs["attention_mask"], (0, 10), value=1)
        if family != "gemma3":
            # a window does not go back
            cache.crop(-12)
            mask = mask[:, :-12]
        cache.reorder_cache(torch.tensor([2, 0, 2]))
        logits.append(steps(model, cache, mask[[2, 0, 2]], [1, 2, 7], 5))
        assert cache.memory_report().compressed_tokens > 0
        found.append(torch.cat(logits, 1))
    assert torch.equal(*found)


def test_equal_rows_are_coded_once():
    model = tiny_model("llama")
    reports, counts = [], []
    for rows in (prompt(1).expand(4, -1), prompt(1), prompt(4)):
        cache = JointEncodedCache(model, residual=compressor_of(model), **TIGHT_WINDOW)
        model(rows, past_key_values=cache)
        reports.append(cache.memory_report().parts)
        counts.append(cache.num_blocks)
    # all but sinks and window
    assert counts == [9, 9, 36]
    for name in ("references", "residual codes", "residual levels", "reference ids"):
        assert reports[0][name] == reports[1][name] == reports[2][name] / 4, name
    assert reports[0]["references"] > 0 and reports[0]["residual codes"] > 0


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fused", "rotated", "sinks", "grouped", "coded"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_loaded_cache_goes_on_bit_for_bit(tmp_path, family, way):
    """New blocks join old ones, a crop goes into them and rows are chosen."""
    model = tiny_model(family)
    residual = compressor_of(model) if way == "coded" else None
    options = (
        WAYS.get(way) or {"grouped": dict(max_relative_error=ERROR, groups=[3, 1, 3, 1]), "coded": TIGHT_WINDOW}[way]
    )
    cache, mask = filled(model, True, **options, **({"residual": residual} if residual else {}))
    before = steps(model, cache, mask, [2])
    cache.save(tmp_path / "cache")
    loaded = JointEncodedCache.load(tmp_path / "cache", model, residual=residual)
    assert before.isfinite().all() and loaded.options == cache.options and loaded.num_blocks == cache.num_blocks
    mask = F.pad(mask, (0, 2), value=1)
    said = []
    for held in (cache, loaded):
        logits = [steps(model, held, mask, [1, 24, 3])]
        longer = F.pad(mask, (0, 28), value=1)
        if family == "llama":
            held.crop(-21)
            longer = longer[:, :-21]
        held.batch_select_indices(torch.tensor([3, 1, 1, 0]))
        logits.append(steps(model, held, longer[[3, 1, 1, 0]], [24, 1, 3], 9))
        held.flush()
        said.append([*logits, *(part for layer in held.own_layers for part in layer.dequantize())])
        if way != "coded":
            assert num_members(held) > 0
    assert all(map(torch.equal, *said)) and loaded._ledger.ref_counts() == cache._ledger.ref_counts()


def test_a_file_of_codes_wants_their_compressor(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    cache, _ = filled(model, residual=compressor_of(model), **TIGHT_WINDOW)
    cache.save(path)
    for other in (None, learned_compressor(model)):
        with pytest.raises(CacheStateError, match="`residual` must be the one of the saved cache"):
            JointEncodedCache.load(path, model, residual=other)
    filled(model)[0].save(path)
    with pytest.raises(CacheStateError, match="`residual` must be the one .* used no compressor"):
        JointEncodedCache.load(path, model, residual=compressor_of(model))


def changed(name: str, change):
    """Changes the tensor `name` of a file."""

    def apply(content, tensors):
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def placed(value, at=-1):
    """A tensor whose number at `at` is `value`."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[at] = value
        return tensor

    return change


STORE = "layers.1.state.store."
TAMPERED = {
    "leader beyond": changed(STORE + "leader", placed(10**6)),
    "leader negative": changed(STORE + "leader", placed(-1)),
    "leader dtype": changed(STORE + "leader", lambda tensor: tensor.long()),
    "leaders of fewer": changed(STORE + "leader", lambda tensor: tensor[:-1]),
    "a leader nobody reads": changed(STORE + "blocks", lambda tensor: torch.cat([tensor, tensor[:1]])),
    "block size": changed(STORE + "blocks", lambda tensor: tensor[:, :-1]),
    "scale": changed(STORE + "scale", lambda tensor: tensor[:, :1]),
    "scale dtype": changed(STORE + "scale", lambda tensor: tensor.double()),
    "homes": changed(STORE + "homes", lambda tensor: tensor[:, :-1]),
    "homes of fewer": changed(STORE + "homes", lambda tensor: tensor[:-1]),
    "mean": changed(STORE + "mean", lambda tensor: tensor[:1]),
    "least": changed(STORE + "least", lambda tensor: tensor.float()),
    "group of a row beyond": changed(STORE + "row_groups", placed(2)),
    "group of a row negative": changed(STORE + "row_groups", placed(-1)),
    "another group of a row": changed(STORE + "row_groups", placed(0)),
    "row groups": changed(STORE + "row_groups", lambda tensor: tensor[:-1]),
    "table": changed(STORE + "block_table", lambda tensor: tensor.int()),
    "groups beyond": changed("ledger.groups", placed(2, slice(None))),
    "groups negative": changed("ledger.groups", lambda tensor: tensor - 2),
    "groups all negative": changed("ledger.groups", placed(-1, slice(None))),
    "groups swapped": changed("ledger.groups", lambda tensor: 1 - tensor),
    "request beyond": changed("ledger.requests", placed(4)),
    "request far beyond": changed("ledger.requests", placed(10**6)),
    "request negative": changed("ledger.requests", placed(-1)),
    "request of another group": changed("ledger.requests", placed(1)),
    "number of requests": lambda content, tensors: put(content, "ledger", "num_requests", 3),
    "more requests than rows": lambda content, tensors: put(content, "ledger", "num_requests", 5),
    "other groups": lambda content, tensors: put(content, "options", "groups", [0, 0, 1, 1]),
    "no groups": lambda content, tensors: put(content, "options", "groups", None),
    "nothing fused": lambda content, tensors: put(content, "options", "max_relative_error", 0.0),
    "rotation": lambda content, tensors: put(content, "options", "rope", "rotated"),
}


@pytest.fixture(scope="module")
def grouped_file(tmp_path_factory) -> Path:
    with torch.no_grad():
        cache, _ = filled(tiny_model("llama"), max_relative_error=ERROR, groups=[3, 1, 1, 3])
    assert num_members(cache) > 0
    path = tmp_path_factory.mktemp("grouped") / "cache"
    cache.save(path)
    return path


@pytest.mark.parametrize("change", TAMPERED)
def test_a_file_that_does_not_fit_is_refused(tmp_path, grouped_file, change):
    path = tmp_path / "cache"
    path.write_bytes(grouped_file.read_bytes())
    tampered(path, lambda content, tensors: None)
    JointEncodedCache.load(path, tiny_model("llama"))
    tampered(path, TAMPERED[change])
    with pytest.raises(CacheStateError, match="saved cache"):
        JointEncodedCache.load(path, tiny_model("llama"))


CODED = {
    "codes of fewer": changed(STORE + "reference_codes", lambda tensor: tensor[:-1]),
    "a block's codes": changed("layers.0.state.store.residual_codes", lambda tensor: tensor[:, :-1]),
    "dtype": changed("layers.0.state.store.reference_idx", lambda tensor: tensor.double()),
    "table": changed(STORE + "block_table", placed(0, (1, 2))),
    "missing": lambda content, tensors: tensors.pop(STORE + "reference_codes"),
}


@pytest.mark.parametrize("change", CODED)
def test_a_file_of_codes_that_does_not_fit_is_refused(tmp_path, change):
    model, path = tiny_model("llama"), tmp_path / "cache"
    cache, _ = filled(model, residual=compressor_of(model), **TIGHT_WINDOW)
    cache.save(path)
    tampered(path, CODED[change])
    with pytest.raises(CacheStateError, match="saved cache"):
        JointEncodedCache.load(path, model, residual=cache.compressor)


# -- options -----------------------------------------------------------------------------------------------------------

NOT_NUMBERS = [math.nan, math.inf, -math.inf, -0.1, 1.0, 1, 7, True, "0.3", [0.3], torch.tensor(0.3)]


@pytest.mark.parametrize(
    ("name", "rule", "value"),
    [("max_relative_error", "a number from 0 to below 1", value) for value in [*NOT_NUMBERS, None]]
    + [("target_ratio", "a number between 0 and 1.* or None", value) for value in [*NOT_NUMBERS, 0, 0.0]]
    + [("scope", f"one of {', '.join(SCOPES)}", value) for value in ("any", "", "ALL", None, 3, ["all"])]
    + [("rope", "one of stripped, rotated", value) for value in ("", "strip", None, True)]
    + [("num_sink_tokens", "an integer >= 0", value) for value in (-1, 1.0, True, None)]
    + [("recent_window", "an integer >= 0", value) for value in (-1, 0.5, "4")]
    + [("residual", "a KVCompressor or None", value) for value in ("compressor", 3, True)],
    ids=str,
)
def test_options_out_of_range_are_refused(name, rule, value):
    with pytest.raises(InvalidOptionError, match=f"`{name}` must be {rule}") as caught:
        JointEncodedCache(tiny_model("llama"), **{name: value})
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("options", [{"max_relative_error": 0.3}, {"target_ratio": 0.5}], ids=str)
def test_a_compressor_and_shared_storage_are_refused_together(options):
    model, ((name, value),) = tiny_model("llama"), options.items()
    with pytest.raises(InvalidOptionError, match=f"`residual` must be None where.*`{name}` {value}"):
        JointEncodedCache(model, residual=compressor_of(model), **options)


def test_a_compressor_wants_whole_strides_in_a_block():
    model = tiny_model("llama")
    with pytest.raises(InvalidOptionError, match="`block_size` must be a multiple of .* stride .*got 6 .* stride 4"):
        JointEncodedCache(model, residual=compressor_of(model), block_size=6)
    with pytest.raises(DeltaKVError, match="must be built like the model that the compressor was made for"):
        JointEncodedCache(model, residual=compressor_of(tiny_model("llama-mha")))
