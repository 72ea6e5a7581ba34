"""What the host asks a cache about itself, answered by every kind of cache of ours; and what is not right yet."""

import copy

import pytest
import torch
from helpers import (
    LOSSLESS,
    TIGHT,
    assert_same_state,
    driven,
    full_cache,
    greedy,
    make_tokens,
    prompt,
    teacher_forced,
)
from kinds import after_prompt
from models import tiny_model
from transformers import Cache

from deltakv_hf import DeltaKVCache, DeltaKVError


def test_a_copy_of_a_fresh_cache_is_fresh(kind, model):
    cache = copy.deepcopy(kind.make(model))
    assert torch.equal(greedy(model, prompt(2), cache), greedy(model, prompt(2), kind.make(model)))


@pytest.mark.parametrize("calls", [[], [5], [48], [10, 1, 1, 9], [48, 1]], ids=str)
def test_every_question_is_answered_as_by_the_hosts_cache(kind, model, calls):
    """Lengths that masks and positions are made from, layer by layer, and what the layers are."""
    cache, host = kind.make(model), full_cache(model)
    for number, length in enumerate(calls):
        for each in (cache, host):
            model(prompt(2, length, seed=number), past_key_values=each)
    assert len(cache) == len(host) == len(model.model.layers)
    for name in ("is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy", "offloading"):
        # is_dummy came with 5.23
        assert getattr(cache, name, None) == getattr(host, name, None), name
    for layer_idx in range(len(host) + 1):
        for query_length in (1, 3, 20):
            sizes = [each.get_mask_sizes(query_length, layer_idx) for each in (cache, host)]
            assert sizes[0] == sizes[1]
        for name in ("get_seq_length", "get_query_offset", "get_max_length"):
            answers = [getattr(each, name)(layer_idx) for each in (cache, host)]
            if name == "get_max_length" and layer_idx < len(host) and cache.layers[layer_idx] in cache.own_layers:
                answers[1] = kind.max_length
            assert answers[0] == answers[1] and type(answers[0]) is int, name
    if kind.max_length < 0:
        assert cache.get_max_length() == host.get_max_length()
    if calls:
        assert cache.batch_size == 2


# what is asked of a `Cache` by the hosts that we know; each is overridden, or inherited and right as it is
KNOWN_QUESTIONS = {
    *("activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop", "early_initialization"),
    *("get_conv_state", "get_mask_sizes", "get_max_length", "get_query_offset", "get_recurrent_state"),
    *("get_seq_length", "has_previous_state", "is_recording_past", "offload", "prefetch", "reorder_cache", "reset"),
    *("update", "update_conv_state", "update_indexer", "update_recurrent_state"),
    *("batch_size", "is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_sliding"),
    # gone in 5.20
    *("get_max_cache_shape", "max_batch_size", "max_cache_len"),
}


def test_the_host_asks_nothing_new():
    """A method that a new host adds would be inherited and might read `keys`, which a compressed layer has not."""
    assert {name for name in vars(Cache) if not name.startswith("_")} <= KNOWN_QUESTIONS


def test_early_initialization_changes_nothing(kind, model):
    """The host's export makes layers before the first tokens come."""
    cache = kind.make(model)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, prompt(2), cache), greedy(model, prompt(2), kind.make(model)))


def test_keys_are_all_keys_or_an_error(kind, model):
    """The host's cache can be iterated, which is how data parallelism gathers it; a part passed off as all is a lie."""
    cache, host = after_prompt(kind, model), full_cache(model)
    model(prompt(), past_key_values=host)
    for layer, expected in zip(cache.layers, host.layers, strict=True):
        keys = getattr(layer, "keys", None)
        assert keys is None or keys.shape == expected.keys.shape
    for read in (list, lambda each: [each[layer_idx] for layer_idx in range(len(each))]):
        try:
            rows = read(cache)
        except (TypeError, DeltaKVError):
            continue
        for (keys, values, *_), expected in zip(rows, host.layers, strict=True):
            assert keys.shape == expected.keys.shape and values.shape == expected.values.shape
            if kind.lossless:
                assert torch.equal(keys, expected.keys) and torch.equal(values, expected.values)


# -- what was not right once -------------------------------------------------------------------------------------------


def test_a_cache_that_holds_tokens_is_initialized(kind):
    model = tiny_model("llama")
    assert not kind.make(model).is_initialized
    assert after_prompt(kind, model).is_initialized


def test_a_fresh_cache_has_no_batch_size(kind, model):
    assert kind.make(model).batch_size == full_cache(model).batch_size == -1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("number", [0, 3])
def test_an_empty_cache_can_be_cropped(kind, family, number):
    model = tiny_model(family)
    cache = kind.make(model)
    cache.crop(-number)
    assert torch.equal(greedy(model, prompt(2), cache), greedy(model, prompt(2), kind.make(model)))


def test_lossless_autocast_is_identical(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = teacher_forced(model, prompt(2), full_cache(model), 40)
        assert torch.equal(teacher_forced(model, prompt(2), DeltaKVCache(model, **LOSSLESS), 40), expected)


def test_autocast_does_not_reach_the_stored_bytes(model):
    """It would round the search in integers, which is exact in float32 only, and it cannot join integers on a CPU."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = DeltaKVCache(model, **TIGHT)
        assert teacher_forced(model, prompt(2), cache, 40).isfinite().all()
    assert cache.memory_report().compressed_tokens > 0
    tokens = make_tokens(60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = driven(tokens)
    assert_same_state(cast, driven(tokens))


def test_use_cache_false_with_a_cache_is_right_or_an_error(kind):
    """The host's own cache gives wrong tokens here and says nothing."""
    model = tiny_model("llama")
    expected = greedy(model, prompt(), kind.make(model))
    try:
        got = greedy(model, prompt(), kind.make(model), use_cache=False)
    except DeltaKVError:
        return
    assert torch.equal(got, expected)
