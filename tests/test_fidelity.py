"""The measurement of fidelity: what is fed in which calls, and what it is compared with."""

import pytest
from helpers import LOSSLESS, TIGHT, full_cache, prompt
from models import tiny_model
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache, InvalidOptionError
from deltakv_hf.evaluation import fidelity, measure_fidelity
from deltakv_hf.evaluation.fidelity import distance_bins

WINDOWS = [prompt(1, 60, seed=seed)[0] for seed in range(2)]


class Recorder(DynamicCache):
    """Notes how many tokens each call brings."""

    def __init__(self, config):
        super().__init__(config=config)
        self.calls = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            self.calls.append(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def measured(make_cache, windows=WINDOWS, **options):
    return measure_fidelity(tiny_model("llama"), windows, {"it": make_cache}, context=40, **options)["it"]


@pytest.mark.parametrize(
    "chunk, calls", [(0, [40]), (1, [1] * 40), (16, [16, 16, 8]), (20, [20, 20]), (40, [40]), (99, [40])]
)
def test_the_context_is_fed_in_chunks_but_to_the_full_cache(monkeypatch, chunk, calls):
    made = []

    def make_cache(config):
        made.append(Recorder(config))
        return made[-1]

    monkeypatch.setattr(fidelity, "DynamicCache", make_cache)
    measured(lambda: make_cache(tiny_model("llama").config), prefill_chunk=chunk)
    assert [cache.calls for cache in made] == [[40, 20], [*calls, 20]] * len(WINDOWS)


@pytest.mark.parametrize("chunk, calls", [(0, [20]), (8, [8, 8, 4]), (20, [20]), (99, [20])])
def test_what_is_predicted_is_fed_in_chunks_but_to_the_full_cache(chunk, calls):
    caches = []

    def make_cache():
        caches.append(Recorder(tiny_model("llama").config))
        return caches[-1]

    result = measured(make_cache, predict_chunk=chunk)
    assert [cache.calls for cache in caches] == [[40, *calls]] * len(WINDOWS)
    assert abs(result.mean("kl")) < 1e-6


def test_tokens_predicted_are_compressed_on_their_way():
    model, made = tiny_model("llama"), []

    def make_cache():
        made.append(DeltaKVCache(model, **TIGHT))
        return made[-1]

    at_once, in_chunks = (measured(make_cache, WINDOWS[:1], predict_chunk=chunk) for chunk in (0, 4))
    assert at_once.mean("kl") != in_chunks.mean("kl")
    assert made[0].stats().forwards == 2 < made[1].stats().forwards == 6


@pytest.mark.parametrize("chunk", [0, 7, 16])
def test_the_full_cache_and_a_lossless_one_are_faithful(chunk):
    model = tiny_model("llama")
    for make_cache in (lambda: full_cache(model), lambda: DeltaKVCache(model, **LOSSLESS)):
        result = measured(make_cache, prefill_chunk=chunk)
        assert abs(result.mean("kl")) < 1e-6 and result.mean("top1") == 1


def test_later_chunks_attend_over_what_is_stored():
    """Which changes what they store, by little; the full cache that it is compared with stays what it was."""
    model = tiny_model("llama")
    at_once, in_chunks = (measured(lambda: DeltaKVCache(model, **TIGHT), prefill_chunk=chunk) for chunk in (0, 16))
    assert in_chunks.mean("full_nll") == at_once.mean("full_nll")
    assert 0 < at_once.mean("kl") != in_chunks.mean("kl") > 0
    assert in_chunks.mean("stored_share") == pytest.approx(at_once.mean("stored_share"), abs=0.1)


def test_a_negative_chunk_is_refused():
    for name in ("prefill_chunk", "predict_chunk"):
        with pytest.raises(InvalidOptionError, match=f"`{name}` must be 0.*-5"):
            measured(lambda: full_cache(tiny_model("llama")), **{name: -5})


@pytest.mark.parametrize("count", [1, 16, 17, 64, 65, 1023, 1999])
def test_bins_hold_every_distance_once(count):
    bins = distance_bins(count)
    assert [distance for first, last in bins for distance in range(first, last + 1)] == list(range(1, count + 1))
    assert [last for _, last in bins[:-1]] == [16, 64, 256, 1024][: len(bins) - 1]


def test_figures_by_distance_are_those_of_their_tokens():
    """Together they are the window's; behind a shorter window the same tokens have the same figures."""
    model = tiny_model("llama")
    windows = [prompt(1, 80, seed=3)[0]]
    [window] = measured(lambda: DeltaKVCache(model, **TIGHT), windows).windows
    assert [(part.first, part.last) for part in window.by_distance] == [(1, 16), (17, 39)]
    for name in ("kl", "top1", "nll", "full_nll"):
        first, last = (getattr(part, name) for part in window.by_distance)
        assert (16 * first + 23 * last) / 39 == pytest.approx(getattr(window, name))
    [short] = measured(lambda: DeltaKVCache(model, **TIGHT), [windows[0][:57]]).windows
    assert short.kl == pytest.approx(window.by_distance[0].kl, rel=1e-3)
