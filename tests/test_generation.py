"""Free generation: what each cache writes, and what the full cache thinks of it."""

import pytest
import torch
from helpers import LOSSLESS, TIGHT, full_cache, prompt
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import DeltaKVCache, JointEncodedCache
from deltakv_hf.evaluation.generation import agreement, judge_generation, nll_under_full_cache, repetition, write

MODEL = tiny_model("llama")
PROMPTS = prompt(3, 60)


def measured(make_cache, seed=None):
    own, full = (write(MODEL, PROMPTS, cache, 24, seed) for cache in (make_cache(), full_cache(MODEL)))
    return judge_generation(MODEL, PROMPTS, own, full)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(
    "make", [lambda: full_cache(MODEL), lambda: DeltaKVCache(MODEL, **LOSSLESS), lambda: JointEncodedCache(MODEL)]
)
def test_what_loses_nothing_writes_what_the_full_cache_writes(make, seed):
    found = measured(make, seed=seed)
    assert [one.agreement for one in found.continuations] == [24] * 3
    assert found.mean("nll") == found.mean("full_nll")


def test_a_compressed_cache_parts_from_the_full_cache_and_is_read_by_it():
    found = measured(lambda: DeltaKVCache(MODEL, **TIGHT | {"nbits": 2}))
    assert found.mean("agreement") < 24 and found.mean("nll") != found.mean("full_nll")
    one = found.continuations[0]
    assert one.nll == pytest.approx(nll_under_full_cache(MODEL, PROMPTS[0], torch.tensor(one.ids)).mean().item())
    summary = found.summary()
    assert summary["prompts"] == len(summary["per_prompt"]) == 3
    assert summary["agreement"] == pytest.approx(sum(p["agreement"] for p in summary["per_prompt"]) / 3)


def test_bins_are_means_of_their_tokens():
    one = measured(lambda: DeltaKVCache(MODEL, **TIGHT)).continuations[0]
    assert [(part["first"], part["last"]) for part in one.by_distance] == [(1, 16), (17, 24)]
    first, last = (part["nll"] for part in one.by_distance)
    assert (16 * first + 8 * last) / 24 == pytest.approx(one.nll)


def test_likelihoods_are_those_that_the_model_has_of_the_text():
    ids = torch.cat([PROMPTS[0], prompt(1, 9, seed=3)[0]])
    expected = torch.log_softmax(MODEL(ids[None]).logits[0, 59:-1].double(), -1).gather(1, ids[60:, None])[:, 0]
    assert torch.allclose(nll_under_full_cache(MODEL, ids[:60], ids[60:]), -expected, atol=1e-5)


def test_draws_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (write(MODEL, PROMPTS, full_cache(MODEL), 12, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 30))
def test_agreement_is_the_length_of_the_common_beginning(ids, place):
    others = [*ids]
    if place < len(ids):
        others[place] += 1
    assert agreement(ids, others) == min(place, len(ids))


def test_repetition_counts_runs_of_four_that_came_before():
    assert repetition([1, 2, 3]) == 0
    assert repetition(list(range(20))) == 0
    # seven runs, four of them different
    assert repetition([1, 2, 3, 4] * 2 + [1, 2]) == pytest.approx(3 / 7)
    assert repetition([7] * 13) == pytest.approx(0.9)
