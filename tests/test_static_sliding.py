"""Sliding layers of a cache of fixed size: steps go round in a ring, in one graph; between steps, the host's layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from compressors import TIGHT_WINDOW, random_compressor
from helpers import TIGHT, greedy, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import full_inputs
from models import SMALL, build, new_model, tiny_model
from test_static import (
    CHANGES,
    ROWS,
    WAYS,
    assert_close_but_for_codes,
    compiled,
    generated,
    go_on,
    kept_rows,
    prompt_and_steps,
)
from torch._dynamo.utils import counters

from deltakv_hf import CacheStateError, DeltaKVCache, UnsupportedModelError
from deltakv_hf.hf_compat import DynamicSlidingWindowLayer
from deltakv_hf.memory import held_bytes
from deltakv_hf.static_window import StaticWindowLayer

SIZE = 128
SLIDING, FULL = "sliding_attention", "full_attention"
THREE = SMALL | {"num_hidden_layers": 3}
BETWEEN = dict(layer_types=[SLIDING, FULL, SLIDING])
QWEN = dict(use_sliding_window=True, max_window_layers=1)
# by the window: shorter than all prompts; reached in the steps of some; wider than the cache
MODELS = {
    "gemma3": lambda window: tf.Gemma3TextConfig(**THREE, **BETWEEN, sliding_window=window),
    "qwen2": lambda window: tf.Qwen2Config(**THREE, **QWEN, sliding_window=window),
    "cohere2": lambda window: tf.Cohere2Config(**THREE, layer_types=[SLIDING, SLIDING, FULL], sliding_window=window),
    "smollm3": lambda window: tf.SmolLM3Config(
        **THREE, **BETWEEN, sliding_window=window, use_sliding_window=True, no_rope_layers=[1, 0, 1]
    ),
    "ministral": lambda window: tf.MinistralConfig(**THREE, **BETWEEN, sliding_window=window),
}
LENGTHS = {"long": [48, 31], "short": [9, 5], "even": [20, 20]}
KEPT = {}


def model_of(family: str = "gemma3", window: int = 16):
    """Shared by all tests of the process."""
    if (family, window) not in KEPT:
        KEPT[family, window] = build(MODELS[family](window), "deltakv")
    return KEPT[family, window]


def pair(model, way: str = "coarse", size: int = SIZE) -> list[DeltaKVCache]:
    """A growing cache, and one of fixed size."""
    return [DeltaKVCache(model, **kind, **WAYS[way](model)) for kind in ({}, {"max_cache_len": size})]


def filled(model, caches, lengths=(48, 31)) -> torch.Tensor:
    """The mask of the prompt that the caches were given."""
    inputs = left_padded(list(lengths))
    for cache in caches:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions, past_key_values=cache)
    return inputs["attention_mask"]


def assert_same_tokens(caches) -> None:
    """In every layer, and in the order of the host's."""
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert caches[0]._ledger.compressed == caches[1]._ledger.compressed
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        if isinstance(layers[1], StaticWindowLayer):
            assert layers[0].get_seq_length() == layers[1].get_seq_length()
            for name in ("keys", "values"):
                found, expected = (getattr(layer, name) for layer in reversed(layers))
                rows = kept_rows(caches[0])
                if rows:
                    assert_close_but_for_codes(found[rows], expected[rows])


@pytest.fixture
def from_scratch():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("family", "window", "way"),
    [(family, 16, "coarse") for family in MODELS]
    + [("gemma3", window, "all") for window in (2, 16, 30, 200)]
    + [("gemma3", 30, "direct")],
)
def test_a_generation_is_one_graph(from_scratch, family, window, way, lengths):
    """With flushes on the way, and a window that fills: the tokens of a growing cache, eager and compiled."""
    model, inputs = model_of(family, window), left_padded(LENGTHS[lengths])
    grown, eager = pair(model, way)
    expected, got = (generated(model, cache, inputs) for cache in (grown, eager))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0.02 if way == "all" or lengths == "short" else 1e-3)
    cache = pair(model, way)[1]
    assert cache.is_compileable and min(grown._ledger.compressed) >= 2 * cache.options.block_size
    for kind in ("first", "reset", "another"):
        ids, logits = generated(model, cache, inputs, compile_config=compiled())
        assert torch.equal(ids, expected[0]), kind
        torch.testing.assert_close(logits, got[1], rtol=0, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], kind
        assert not counters["recompiles"], kind
        assert_same_tokens([eager, cache])
        cache.reset()
        cache = cache if kind == "first" else pair(model, way)[1]


def test_machine_code(from_scratch):
    model, inputs = model_of(), left_padded([9, 5])
    expected = generated(model, pair(model)[0], inputs)[0]
    assert torch.equal(generated(model, pair(model)[1], inputs, compile_config=compiled("inductor"))[0], expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_loop_of_ones_own(from_scratch):
    model, caches = model_of(), pair(model_of())
    step = torch.compile(model, backend="eager", fullgraph=True)
    ids = prompt(2, 60)
    for cache in caches:
        model(ids[:, :20], past_key_values=cache)
    for column in range(20, 60):
        new = {"input_ids": ids[:, column : column + 1], "position_ids": torch.full((2, 1), column)}
        expected = model(**new, past_key_values=caches[0]).logits
        caches[1].get_mask_sizes(1, 0)
        torch.testing.assert_close(step(**new, past_key_values=caches[1]).logits, expected, rtol=0, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert_same_tokens(caches)


@settings(max_examples=30)
@given(
    window=st.sampled_from([2, 3, 16, 30, 200]),
    length=st.integers(1, 40),
    num_steps=st.integers(1, 20),
    pads=st.lists(st.integers(0, 30), min_size=2, max_size=2),
)
def test_any_sizes(window, length, num_steps, pads):
    """The padding in front of a row leaves its window, too."""
    model = model_of(window=window)
    caches = pair(model, size=64)
    assert_close_but_for_codes(*(prompt_and_steps(model, cache, length, num_steps, pads) for cache in caches))
    assert_same_tokens(caches)


# -- between steps -----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    way=st.sampled_from(["all", "direct"]),
    window=st.sampled_from([3, 16, 70, 400]),
    steps=st.lists(st.tuples(st.sampled_from(list(CHANGES)), st.sampled_from([1, 1, 1, 3, 9])), min_size=1, max_size=6),
)
def test_between_steps_it_is_a_growing_cache(way, window, steps):
    """Whatever is done to it, refused crops included: the same tokens are held, and the next ones read the same."""
    model = model_of(window=window)
    caches = pair(model, way, size=160)
    mask = filled(model, caches)
    for number, (change, length) in enumerate(steps):
        said = [go_on(model, cache, mask, [1, length, 1], number) for cache in caches]
        rows = kept_rows(caches[0])
        if not rows:
            return
        assert_close_but_for_codes(*(logits[rows] for logits in said))
        mask = F.pad(mask, (0, length + 2), value=1)
        if change in ROWS and len(mask) != 2:
            continue
        made = []
        for cache in caches:
            try:
                made.append(CHANGES[change](cache))
            except CacheStateError as error:
                made.append(str(error))
        refused = isinstance(made[0], str)
        assert refused == isinstance(made[1], str) and refused == ("crop" in change and mask.shape[1] >= window)
        caches = made if change == "copy" else caches
        mask = mask[ROWS.get(change, slice(None))]
        if not refused:
            mask = mask[:, : -int(change == "crop") * 3 - int(change == "deep crop") * 21 or None]
        assert caches[1].get_seq_length() == mask.shape[1]
        assert_same_tokens(caches)


@pytest.mark.parametrize("window", [16, 200])
def test_crops(window):
    """Within a window that was never full, as in a growing cache; behind it refused, and nothing has happened."""
    model = model_of(window=window)
    caches = pair(model)
    mask = filled(model, caches)
    go_on(model, caches[1], mask, [1, 1], 0)
    go_on(model, caches[0], mask, [1, 1], 0)
    if window == 16:
        with pytest.raises(CacheStateError, match="`crop` must be possible in every layer"):
            caches[1].crop(-1)
        assert caches[1].get_seq_length() == 50
    for cache in caches:
        cache.crop(0)
        cache.crop(0 if window == 16 else -2)
    mask = F.pad(mask, (0, 2), value=1) if window == 16 else mask
    torch.testing.assert_close(*(go_on(model, cache, mask, [1, 1, 5, 1], 1) for cache in caches), rtol=0, atol=1e-3)
    assert_same_tokens(caches)
    caches[1].crop(-1000)
    assert caches[1].get_seq_length() == 0


@pytest.mark.parametrize("from_size, to_size", [(SIZE, None), (None, SIZE), (SIZE, 100)])
@pytest.mark.parametrize("window", [16, 200])
def test_a_saved_cache_goes_on_in_any_size(tmp_path, window, from_size, to_size):
    model, inputs = model_of(window=window), left_padded([40, 31])
    cache = DeltaKVCache(model, max_cache_len=from_size, **WAYS["coarse"](model))
    generated(model, cache, inputs, 20)
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor, max_cache_len=to_size)
    mask = F.pad(inputs["attention_mask"], (0, 19), value=1)
    said = [go_on(model, each, mask, [1, 1, 1, 5, 1], 3) for each in (cache, loaded)]
    torch.testing.assert_close(*said, rtol=0, atol=1e-3)
    with pytest.raises(CacheStateError, match="`max_cache_len` must be at least"):
        DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor, max_cache_len=50)


def test_to_and_from_dynamic_cache():
    model, inputs = model_of(), left_padded([40, 31])
    caches = pair(model)
    for cache in caches:
        generated(model, cache, inputs, 20)
    dynamic = [cache.to_dynamic_cache() for cache in caches]
    assert [type(layer).__name__ for layer in dynamic[1].layers] == [
        type(layer).__name__ for layer in dynamic[0].layers
    ]
    torch.testing.assert_close(*(each.layers[0].keys for each in dynamic), rtol=0, atol=1e-4)
    mask = F.pad(inputs["attention_mask"], (0, 19), value=1)
    made = [
        DeltaKVCache.from_dynamic(dynamic[0], model, mask, **kind, **WAYS["coarse"](model))
        for kind in ({}, {"max_cache_len": SIZE})
    ]
    assert isinstance(made[1].layers[0], StaticWindowLayer)
    torch.testing.assert_close(*(go_on(model, each, mask, [1, 1, 1, 5, 1], 3) for each in made), rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [16, 70])
def test_a_cache_that_is_resized_goes_on(window):
    model, inputs = model_of(window=window), left_padded([40, 31])
    small, large = (DeltaKVCache(model, max_cache_len=size, **WAYS["coarse"](model)) for size in (56, SIZE))
    for cache in (small, large):
        generated(model, cache, inputs, 10)
    mask = F.pad(inputs["attention_mask"], (0, 9), value=1)
    for number, lengths in enumerate(([1, 1, 1, 20, 1], [1, 1])):
        small.resize(SIZE)
        said = [go_on(model, cache, mask, lengths, number) for cache in (small, large)]
        torch.testing.assert_close(*said, rtol=0, atol=1e-3)
        mask = F.pad(mask, (0, sum(lengths)), value=1)
        small.resize(small.get_seq_length() + 2)
    assert_same_tokens([large, small])


def test_what_is_reported_is_held():
    """Room too, which a reset keeps; a `DynamicCache` holds the window alone."""
    model, inputs = model_of(), left_padded([48, 31])
    grown, cache = pair(model, "all")
    for each in (grown, cache):
        generated(model, each, inputs, 20)
        # it holds no more than the window now, not the prompt
    report = cache.memory_report()
    windows = [layer for layer in cache.layers if isinstance(layer, StaticWindowLayer)]
    rings = [ring for layer in windows for ring in (layer.ring_keys, layer.ring_values)]
    assert report.parts["host layers"] == held_bytes(rings + [layer._sliding_window_tensor for layer in windows])
    # the host's slices keep one token more alive
    assert 0.9 < report.dense_bytes / grown.memory_report().dense_bytes <= 1
    own = cache.layers[1]
    room = [*rings, own.raw_keys, own.raw_values, *vars(own.pool).values(), *cache._static.tensors()]
    room += [table for tables in cache._static.rooms for table in tables]
    room += [layer._sliding_window_tensor for layer in windows]
    assert report.stored_bytes == held_bytes(room + cache._ledger.tensors())
    cache.reset()
    assert cache.memory_report().stored_bytes == held_bytes(room)
    assert [layer.keys for layer in windows] == [None, None]


def test_addresses_stay():
    model, inputs = model_of(), left_padded([48, 31])
    cache = pair(model)[1]

    def addresses() -> list[int]:
        windows = [layer for layer in cache.layers if isinstance(layer, StaticWindowLayer)]
        rings = [ring for layer in windows for ring in (layer.ring_keys, layer.ring_values)]
        return [tensor.data_ptr() for tensor in (*rings, *cache._static.live.values())]

    generated(model, cache, inputs, 12)
    before, mask = addresses(), F.pad(inputs["attention_mask"], (0, 11), value=1)
    go_on(model, cache, mask, [9, 1], 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    go_on(model, cache, F.pad(mask[[1, 0]], (0, 10), value=1), [1, 1], 1)
    assert addresses() == before and len(set(before)) == 5
    cache.reset()
    generated(model, cache, left_padded([20, 20]), 12)
    assert addresses() == before


def test_one_cache_serves_batch_after_batch():
    model, (_, cache) = model_of(), pair(model_of())
    for lengths in LENGTHS.values():
        said = [generated(model, each, left_padded(lengths)) for each in (cache, pair(model)[1])]
        assert all(map(torch.equal, *said))
        cache.reset()


def test_a_copy_goes_its_own_way():
    model, caches = model_of(), pair(model_of())
    mask = filled(model, caches)
    go_on(model, caches[1], mask, [1, 1], 0)
    copied, mask = copy.deepcopy(caches[1]), F.pad(mask, (0, 2), value=1)
    go_on(model, copied, mask, [1] * 20, 1)
    go_on(model, caches[0], mask[:, :-2], [1, 1], 0)
    assert_same_tokens(caches)
    torch.testing.assert_close(*(go_on(model, cache, mask, [1] * 20, 2) for cache in caches), rtol=0, atol=1e-3)


def test_the_attention_may_change_between_steps():
    model = build(MODELS["gemma3"](16), "deltakv")
    caches = pair(model)
    mask = filled(model, caches, (20, 9))
    for number, attention in enumerate(["deltakv", "sdpa", "deltakv", "eager", "deltakv"]):
        model.set_attn_implementation(attention)
        assert caches[1].is_compileable == (attention == "deltakv")
        said = (go_on(model, cache, mask, [1, 1, 1], number) for cache in caches)
        torch.testing.assert_close(*said, rtol=0, atol=1e-3)
        mask = F.pad(mask, (0, 3), value=1)


MODES = {
    "sampling": {"do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill": {"prefill_chunk_size": 10},
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_in_every_mode(mode):
    model, results = model_of(), []
    ids = prompt(1, 12).repeat(1, 4)
    for cache in pair(model, size=200):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first = greedy(model, ids, cache, **MODES[mode])
            # plain steps after drafts fail in transformers 5.17, whatever the cache
            if mode in ("sampling", "chunked-prefill"):
                turn = torch.cat([first, prompt(len(first), 4, seed=1)], 1)
                first = greedy(model, full_inputs(turn), cache)
        results.append(first)
    assert torch.equal(*results)


def test_windows_that_record_grow():
    """While drafts may be taken back; then steps are not compiled, and right."""
    model, caches = model_of(), pair(model_of())
    mask = filled(model, caches)
    for number in range(7):
        length = [1, 1, 4][number % 3]
        assert_close_but_for_codes(*(go_on(model, cache, mask, [length], number) for cache in caches))
        mask = F.pad(mask, (0, length), value=1)
        if number == 0:
            for cache in caches:
                cache.activate_past_recording()
        elif length == 4:
            mask = mask[:, :-3]
        for cache in caches:
            cache.crop(-3 if length == 4 else 0)
        assert not caches[1].is_compileable
        assert_same_tokens(caches)


# -- broken off, refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_step_that_is_broken_off_has_not_happened(where, monkeypatch):
    model = build(MODELS["gemma3"](16), "deltakv")
    caches = pair(model)
    mask = filled(model, caches)
    for cache in caches:
        go_on(model, cache, mask, [1, 1], 0)
    mask = F.pad(mask, (0, 2), value=1)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(model.model.layers[where].self_attn.o_proj, "forward", lambda states: 1 / 0)
        go_on(model, caches[1], mask, [1], 1)
    if where == 2:
        # all layers have the token
        assert caches[1].get_seq_length() == 51
        return
    # what has left the window is compressed before a step
    assert caches[1].get_seq_length() == 50
    assert_close_but_for_codes(*(cache.layers[0].keys for cache in caches))
    said = [go_on(model, cache, mask, [1, 1, 1], 2) for cache in caches]
    torch.testing.assert_close(*said, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("family", "name"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_soft_caps_and_sinks_are_refused(family, name):
    model = tiny_model(family, "deltakv")
    cache = DeltaKVCache(model, max_cache_len=SIZE, **TIGHT)
    model(prompt(1), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match=f"`max_cache_len` must be left out .* `{name}`"):
        model(prompt(1, 1), past_key_values=cache)


def test_gradients_are_refused():
    model = new_model("gemma3", "deltakv")
    cache = DeltaKVCache(model, max_cache_len=SIZE, compressor=random_compressor(model), **TIGHT_WINDOW)
    with torch.no_grad():
        model(prompt(1), past_key_values=cache)
    with torch.enable_grad(), pytest.raises(UnsupportedModelError, match="under `torch.no_grad"):
        model(prompt(1, 1), past_key_values=cache)
    assert not cache.layers[0].ring_keys.requires_grad and cache.get_seq_length() == 48


@pytest.mark.parametrize("family", ["mistral-sliding", "llama4"])
def test_what_stays_as_it_grows(family):
    """Chunks, which begin anew, and models without a layer that keeps all tokens."""
    from families import BY_NAME

    model = BY_NAME[family].model("deltakv")
    caches = [DeltaKVCache(model, **kind, **TIGHT) for kind in ({}, {"max_cache_len": SIZE})]
    assert not caches[1].is_compileable and DynamicSlidingWindowLayer in {type(layer) for layer in caches[1].layers}
    assert torch.equal(*(greedy(model, prompt(1, 12), cache, max_new_tokens=30) for cache in caches))


@pytest.mark.parametrize("kind", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_and_values(kind):
    """More layers attend than store: served as growing ones, as with another attention."""
    sharing = dict(layer_types=[SLIDING, FULL] * 2, sliding_window=16, num_kv_shared_layers=2)
    four = SMALL | {"num_hidden_layers": 4} | sharing
    if kind == "gemma3n":
        own = dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, activation_sparsity_pattern=[0.0] * 4)
        model = build(tf.Gemma3nTextConfig(**four, **own), "deltakv")
    else:
        model = build(tf.Gemma4TextConfig(**four), "deltakv")
    caches = pair(model)
    assert not caches[1].is_compileable
    assert torch.equal(*(greedy(model, prompt(1, 24), cache, max_new_tokens=30) for cache in caches))
