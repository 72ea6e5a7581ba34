"""How answers are scored and caches compared: a model whose next token is known, shares that are known."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import LOSSLESS, TIGHT
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, build, byte_llama, byte_tokenizer
from transformers import DynamicCache, Gemma3TextConfig

from deltakv_hf import DeltaKVCache, InvalidOptionError
from deltakv_hf.evaluation.intervals import paired_difference, wilson
from deltakv_hf.evaluation.items import Item
from deltakv_hf.evaluation.prefill import Shares
from deltakv_hf.evaluation.runner import FULL, run_tasks
from deltakv_hf.evaluation.scores import ItemScore, TaskScores, score_item
from deltakv_hf.evaluation.tasks import pick_tasks

VOCAB = 20
LEAD = 3.0


class Counting:
    """A model that expects the next number; it notes what it was fed in its cache."""

    device = torch.device("cpu")

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        past_key_values.append(input_ids[0].tolist())
        logits = torch.nn.functional.one_hot((input_ids + 1) % VOCAB, VOCAB) * LEAD
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


@pytest.mark.parametrize(
    "answer, right", [([4, 5, 6], 3), ([4], 1), ([4, 9, 10], 2), ([9], 0), ([9, 10, 11], 2), ([5, 7, 9], 0)]
)
def test_an_item_is_right_if_every_answer_token_is_the_most_likely(answer, right):
    cache = []
    score = score_item(Counting(), cache, Item([1, 2, 3], answer))
    assert score.correct == (right == len(answer))
    assert score.token_accuracy == pytest.approx(right / len(answer))
    total = math.log(math.exp(LEAD) + VOCAB - 1)
    assert score.nll == pytest.approx(total - LEAD * right / len(answer), abs=1e-5)
    # the cache that was asked is a copy
    assert cache == []


def scores(own, full, nll=1.0):
    """Contexts of two items each, given which are right."""
    made = [
        [[ItemScore(right, float(right), nll if which else 0.5) for right in right_ones[i : i + 2]] for i in (0, 2)]
        for which, right_ones in ((1, own), (0, full))
    ]
    return TaskScores("niah4", 64, "it", [0, 1], *made, [Shares(0.5, 0.25), Shares(0.7, 0.25)])


def test_a_summary_compares_the_same_items():
    summary = scores([True, False, True, True], [True, True, True, False]).summary()
    assert (summary["items"], summary["contexts"], summary["lost"], summary["gained"]) == (4, 2, 1, 1)
    assert (summary["em"], summary["em_change"], summary["nll"], summary["nll_change"]) == (0.75, 0, 1, 0.5)
    assert summary["stored_share"] == pytest.approx(0.6) and summary["compressed_share"] == 0.25
    low, high = summary["em_change_interval"]
    assert low < 0 < high and low == pytest.approx(-high)
    assert [(row["seed"], row["item"], row["correct"]) for row in summary["per_item"]] == [
        (0, 0, True),
        (0, 1, False),
        (1, 0, True),
        (1, 1, True),
    ]


@pytest.mark.parametrize(
    "count, total, low, high",
    # R. G. Newcombe, Statistics in Medicine 17, 1998, 857-872, table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(count, total, low, high):
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_a_paired_interval_holds_the_difference_and_turns_with_it(pairs):
    before, after = ([pair[i] for pair in pairs] for i in (0, 1))
    difference = (sum(after) - sum(before)) / len(pairs)
    low, high = paired_difference(before, after)
    assert -1 <= low <= difference <= high <= 1
    assert paired_difference(after, before) == pytest.approx((-high, -low))


def test_a_paired_interval_holds_the_truth_as_often_as_it_says():
    rng, held, rounds = random.Random(0), 0, 2000
    for _ in range(rounds):
        # 80 % before; one in ten of these lost and one in ten of the others gained: -.06
        before = [rng.random() < 0.8 for _ in range(60)]
        after = [right != (rng.random() < 0.1) for right in before]
        low, high = paired_difference(before, after)
        held += low <= -0.06 <= high
    assert 0.935 <= held / rounds <= 0.985


def test_a_clear_loss_is_beyond_noise_and_one_item_is_not():
    right = [True] * 32 + [False] * 8
    assert paired_difference(right, [False] + right[1:])[1] > 0
    assert paired_difference(right, [False] * 12 + right[12:])[1] < 0
    low, high = paired_difference(right, right)
    assert low == -high < 0 and high < 0.1


MODEL, TOKENIZER = byte_llama(), byte_tokenizer()


def measured(make_caches, tasks=("niah4",), seeds=(0, 1), model=MODEL, **options):
    return run_tasks(model, TOKENIZER, pick_tasks(tasks), [900], seeds, make_caches, **options)


def test_the_full_cache_and_lossless_ones_score_alike():
    full, same, lossless = measured(
        {
            "same": lambda: DynamicCache(config=MODEL.config),
            "lossless": lambda: DeltaKVCache(MODEL, **LOSSLESS),
        },
        tasks=["cloze"],
    )
    assert [scores.cache for scores in (full, same, lossless)] == [FULL, "same", "lossless"]
    assert full.contexts == same.contexts == same.full and same.em_change == 0
    assert len(full.items) == 16 and full.shares == [Shares(1.0, 0.0)] * 2
    assert lossless.contexts == full.contexts


def test_a_compressed_cache_is_noticed_and_leaves_no_trace_between_questions():
    first, second = (measured({"it": lambda: DeltaKVCache(MODEL, **TIGHT)}) for _ in range(2))
    full, it = first
    assert it.contexts == second[1].contexts
    assert full.mean("nll") != it.mean("nll") == pytest.approx(full.mean("nll"), rel=0.1)
    assert it.full == full.contexts
    assert all(0 < shares.compressed < shares.stored < 1 for shares in it.shares)


def test_layers_that_cannot_be_cropped_are_asked_too():
    config = Gemma3TextConfig(
        **SMALL | {"vocab_size": 256}, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    )
    model = build(config)
    full, it = measured({"it": lambda: DeltaKVCache(model, **LOSSLESS)}, model=model, seeds=[0])
    assert it.contexts == full.contexts


@pytest.mark.parametrize("chunk, calls", [(0, 1), (400, 3)])
def test_a_context_is_read_once_by_each_cache_in_chunks(chunk, calls):
    made, seen = [], []

    class Recorder(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            if layer_idx == 0:
                self.calls.append(key_states.shape[2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def make_cache():
        made.append(Recorder(config=MODEL.config))
        made[-1].calls = []
        return made[-1]

    def progress(contexts):
        seen.append(len(contexts))
        return iter(contexts)

    measured({"it": make_cache}, tasks=["niah4", "passkey"], progress=progress, prefill_chunk=chunk)
    assert seen == [4] and len(made) == 4
    # questions go to copies
    assert all(len(cache.calls) == calls and 800 < sum(cache.calls) <= 900 for cache in made)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"make_caches": {FULL: None}}, "`make_caches` must not hold 'full cache'"),
        ({"make_caches": {"it": dict}}, r"`make_caches\['it'\]` must make a transformers Cache, got a dict"),
        ({"seeds": []}, "`seeds` must not be empty"),
        ({"prefill_chunk": -1}, "`prefill_chunk` must be 0"),
        ({"model": byte_llama(920)}, r"`lengths` must leave room .* 920 positions .* Take \d+ less"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, words):
    with pytest.raises(InvalidOptionError, match=words):
        measured(**{"make_caches": {}} | change)
