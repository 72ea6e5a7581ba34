"""Which blocks share storage, and how well each is read: on blocks made for it, without a model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakv_hf.compressor.fused_blocks import FusedStore, FusingCoder
from deltakv_hf.fusion import GROUP, HISTORY, INDEX, REQUESTS, SCOPES, content_order, first_independent, may_share
from deltakv_hf.layout import Arrangement
from deltakv_hf.rate_distortion import GRID, predict

SIZE, KEY_WIDTH, WIDTH = 4, 6, 10


def make_coder(error: float = 0.3, scope: str = "all", target_ratio: float | None = None, groups: int = 2):
    return FusingCoder(SIZE, WIDTH, KEY_WIDTH, torch.float32, 0, scope, error, target_ratio, groups)


def make_blocks(count: int, num_topics: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[n, size, width]` around topics, and homes of some requests, places and groups."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(num_topics, SIZE, WIDTH, generator=generator)
    topic = torch.randint(0, num_topics, (count,), generator=generator)
    scale = torch.rand(count, 1, 1, generator=generator) + 0.5
    blocks = topics[topic] * scale + noise * torch.randn(count, SIZE, WIDTH, generator=generator) + 1.0
    homes = torch.zeros(count, REQUESTS + 1, dtype=torch.int64)
    homes[:, GROUP] = torch.randint(0, 2, (count,), generator=generator)
    homes[:, INDEX] = torch.randint(0, 3, (count,), generator=generator)
    homes[:, HISTORY] = torch.randperm(count, generator=generator)
    # a request is of one group; some blocks are of several requests
    requests = torch.randint(1, 8, (count,), generator=generator)
    homes[:, REQUESTS] = requests << (3 * homes[:, GROUP])
    return blocks, homes


def store_of(coder: FusingCoder, steps: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[FusedStore, dict]:
    """A store of one row per block, into which they come in several flushes."""
    total = sum(len(blocks) for blocks, _ in steps)
    store, plans, done = coder.empty(total, torch.device("cpu")), {}, 0
    for blocks, homes in steps:
        old, count = store.blocks.shape[0], len(blocks)
        rows = list(range(done, done + count))

        def read(start, stop, blocks=blocks):
            return blocks[:, start:stop]

        new = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.int64)], dim=1)
        store = coder.append(store, rows, 0, SIZE, read, new_blocks=new)
        store, plans = coder.fused(store, old, homes, plans)
        done += count
    return store, plans


def as_read(coder: FusingCoder, store: FusedStore, homes: torch.Tensor) -> torch.Tensor:
    """Every block as its row reads it."""
    table = torch.arange(len(homes))[:, None]
    store = store.arranged(Arrangement(None, table, homes[:, GROUP]))
    tokens, pick = next(coder.decode(store, None, 0, SIZE))
    assert pick(tokens) is tokens
    return tokens


def relative_errors(blocks: torch.Tensor, read: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`[n, 2]` of keys and values."""
    gone, apart = (read - blocks).double(), (blocks - mean[:, None]).double()
    parts = [(x[..., :KEY_WIDTH].flatten(1), x[..., KEY_WIDTH:].flatten(1)) for x in (gone, apart)]
    return torch.stack([a.norm(dim=1) / b.norm(dim=1) for a, b in zip(*parts, strict=True)], dim=1)


@given(
    st.integers(0, 120),
    st.integers(0, 40),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    st.sampled_from([0.05, 0.3, 0.8]),
    st.sampled_from(SCOPES),
    st.integers(0, 99),
)
@settings(max_examples=80)
def test_no_block_is_beyond_the_bound(count, later, num_topics, noise, error, scope, seed):
    """Keys and values each, those of later flushes too; leaders are read bit for bit, and are nobody's members."""
    coder = make_coder(error, scope)
    blocks, homes = make_blocks(count + later, num_topics, noise, seed)
    store, plans = store_of(coder, [(blocks[:count], homes[:count]), (blocks[count:], homes[count:])])
    read = as_read(coder, store, homes)
    errors = relative_errors(blocks, read, store.mean[homes[:, GROUP]])
    assert (errors[errors.isfinite()] <= error + 1e-6).all()
    assert sorted(set(store.leader.tolist())) == list(range(store.blocks.shape[0]))
    # each leader is read by itself
    is_leader = (store.scale == 1).all(1) & (blocks == store.blocks[store.leader]).flatten(1).all(1)
    assert set(store.leader[is_leader].tolist()) == set(range(store.blocks.shape[0]))
    assert torch.equal(read[is_leader], blocks[is_leader])
    # and who reads it may
    home_of = store.homes[store.leader]
    may = may_share(homes, home_of, scope if scope != "none" else "all").diagonal()
    assert may[~is_leader].all()
    if scope == "none":
        assert store.blocks.shape[0] == len(blocks)


@given(st.integers(20, 80), st.sampled_from(SCOPES), st.sampled_from([0.0, 0.1]), st.integers(0, 99))
@settings(max_examples=40)
def test_the_order_in_which_blocks_come_changes_nothing(count, scope, noise, seed):
    coder = make_coder(0.4, scope)
    blocks, homes = make_blocks(count, 5, noise, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    store, _ = store_of(coder, [(blocks, homes)])
    other, _ = store_of(coder, [(blocks[order], homes[order])])
    assert torch.equal(as_read(coder, store, homes)[order], as_read(coder, other, homes[order]))
    assert store.blocks.shape == other.blocks.shape and torch.equal(store.least.nan_to_num(), other.least.nan_to_num())


@given(st.integers(20, 80), st.integers(0, 99))
@settings(max_examples=20)
def test_a_group_does_not_see_another(count, seed):
    coder = make_coder(0.4)
    blocks, homes = make_blocks(count, 5, 0.1, seed)
    own = homes[:, GROUP] == 0
    changed = torch.where(own[:, None, None], blocks, blocks.flip(0) * 3)
    reads = [as_read(coder, store_of(coder, [(some, homes)])[0], homes)[own] for some in (blocks, changed)]
    assert torch.equal(*reads)


def test_equal_blocks_are_stored_once_and_read_bit_for_bit():
    coder = make_coder(0.02)
    blocks, homes = make_blocks(30, 30, 1.0, 0)
    homes[:, GROUP] = 0
    store, plans = store_of(coder, [(blocks.repeat(4, 1, 1), homes.repeat(4, 1))])
    assert store.blocks.shape[0] == 30 and plans[0].achieved_error == pytest.approx(0, abs=1e-6)
    assert plans[0].predicted_kept == pytest.approx(0.25) and plans[0].achieved_kept == 0.25
    torch.testing.assert_close(as_read(coder, store, homes.repeat(4, 1)), blocks.repeat(4, 1, 1))


def test_matches_no_better_than_chance_are_left_alone():
    """Unrelated blocks match at a loose bound, and only by chance."""
    coder = make_coder(0.94, groups=1)
    blocks, homes = make_blocks(400, 400, 1.0, 0)
    homes[:, GROUP] = 0
    store, plans = store_of(coder, [(blocks, homes)])
    assert plans[0].is_left_alone and store.blocks.shape[0] == 400 and plans[0].achieved_kept == 1
    # and so are those that come later
    store, _ = store_of(coder, [(blocks, homes), (blocks[:50], homes[:50])])
    assert store.blocks.shape[0] == 450


def test_what_is_no_number_spoils_no_other_block():
    coder = make_coder(0.4, groups=1)
    blocks, homes = make_blocks(60, 5, 0.1, 0)
    homes[:, GROUP] = 0
    blocks[7, 0, 0], blocks[9, 1, 8] = torch.nan, torch.inf
    store, _ = store_of(coder, [(blocks, homes)])
    read = as_read(coder, store, homes)
    assert read[7].isnan().any() and torch.equal(read[7].isnan(), blocks[7].isnan())
    fine = [place for place in range(60) if place not in (7, 9)]
    assert read[fine].isfinite().all()


def test_few_blocks_wait_for_more():
    coder = make_coder(0.4, groups=1)
    blocks, homes = make_blocks(8, 1, 0.0, 0)
    homes[:, GROUP] = 0
    few, plans = store_of(coder, [(blocks, homes)])
    assert few.blocks.shape[0] == 8 and not plans
    more, plans = store_of(coder, [(blocks, homes), (blocks, homes)])
    # the first ones share too, once there are enough
    assert more.blocks.shape[0] < 8 and set(plans) == {0}


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 99))
def test_rounds_choose_whom_turns_would(count, density, seed):
    generator = torch.Generator().manual_seed(seed)
    adjacent = torch.rand(count, count, generator=generator).tril(-1) > 1 - density
    adjacent = adjacent | adjacent.mT
    chosen = []
    for place in range(count):
        if not any(adjacent[place, other] for other in chosen):
            chosen.append(place)
    assert first_independent(adjacent).nonzero().flatten().tolist() == chosen


@given(st.integers(1, 60), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_order_of_contents_is_one_of_contents(count, seed, dtype):
    blocks, homes = make_blocks(count, 3, 0.0, seed)
    blocks, shuffled = blocks.to(dtype), torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order, other = content_order(blocks, homes), content_order(blocks[shuffled], homes[shuffled])
    assert torch.equal(order, shuffled[other])


def test_prediction_of_groups_of_equal_blocks_is_exact():
    """Four of each: one in four stays at any bound that other blocks do not reach."""
    cosines = torch.full((40, 40), 0.1)
    for first in range(0, 40, 4):
        cosines[first : first + 4, first : first + 4] = 0.999
    plan = predict(cosines.fill_diagonal_(-torch.inf), 0, 0, 0.5, None)
    assert plan.predicted_kept == pytest.approx(0.25) and plan.max_relative_error == 0.5
    assert all(a >= b for a, b in zip(plan.kept, plan.kept[1:], strict=False))
    assert all(a >= b for a, b in zip(plan.kept_poisson, plan.kept_poisson[1:], strict=False))
    assert plan.mean_cosine == pytest.approx(0.1)


def test_prediction_for_a_ratio_takes_the_least_error():
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(300, 300, generator=generator)
    cosines = torch.minimum(cosines, cosines.mT).fill_diagonal_(-torch.inf)
    plan = predict(cosines, 0, 0, 0.95, 0.1)
    place = GRID.index(plan.max_relative_error)
    assert plan.kept[place] <= 0.1 < plan.kept[place - 1]
    # an error that may not be allowed is not
    assert predict(cosines, 0, 0, 0.05, 0.001).max_relative_error == 0.05


def test_poisson_model_holds_for_independent_matches():
    """Pairs that match independently, as the model has it: within a tenth of what greedy leaders keep."""
    generator = torch.Generator().manual_seed(0)
    cosines = torch.randn(600, 600, generator=generator) * 0.2
    cosines = (cosines.tril(-1) + cosines.tril(-1).mT).clamp(-1, 1).fill_diagonal_(-torch.inf)
    plan = predict(cosines, 0, 0, 0.9, None)
    for error in (0.86, 0.9, 0.94):
        kept = first_independent(cosines >= (1 - error * error) ** 0.5).float().mean().item()
        assert plan.kept_poisson[GRID.index(error)] == pytest.approx(kept, rel=0.1)


def test_leaders_that_nobody_reads_go():
    coder = make_coder(0.4, groups=1)
    blocks, homes = make_blocks(40, 5, 0.05, 0)
    homes[:, GROUP] = 0
    store, _ = store_of(coder, [(blocks, homes)])
    read = as_read(coder, store, homes)
    kept = torch.arange(0, 40, 3)
    fewer = store.arranged(Arrangement(kept, torch.arange(len(kept))[:, None], torch.zeros(len(kept)).long()))
    assert fewer.blocks.shape[0] == len(set(store.leader[kept].tolist()))
    fewer = replace(fewer, block_table=torch.arange(len(kept))[:, None])
    tokens, _ = next(coder.decode(fewer, None, 0, SIZE))
    assert torch.equal(tokens, read[kept])
