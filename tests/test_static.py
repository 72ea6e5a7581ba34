"""Caches of fixed size: their steps say what a growing cache's say, in one graph, and between steps they are one."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from compressors import TIGHT_WINDOW, learned_compressor, random_compressor
from helpers import LOSSLESS, TIGHT, greedy, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import full_inputs
from models import new_model, tiny_model
from test_filter_layers import wide_model
from torch._dynamo.utils import counters

from deltakv_hf import CacheStateError, DeltaKVCache, InvalidOptionError, UnsupportedModelError
from deltakv_hf.memory import held_bytes

COARSE = {"selection": "coarse_to_fine", "keep": 5, "index_bytes": 3}
WAYS = {
    "all": lambda model: {"compressor": random_compressor(model)} | TIGHT_WINDOW,
    "coarse": lambda model: {"compressor": random_compressor(model)} | TIGHT_WINDOW | COARSE,
    "shared": lambda model: WAYS["coarse"](model) | {"layers_per_choice": 2},
    "learned": lambda model: {"compressor": learned_compressor(model)} | TIGHT_WINDOW,
    "direct": lambda model: TIGHT,
    "filter": lambda model: (
        {"compressor": random_compressor(model), "num_sink_tokens": 2, "recent_window": 8}
        | {"selection": "filter_layers", "filter_layers": (0,), "keep": 7, "block_size": 32}
    ),
}
SIZE = 128


def model_of(family: str):
    if family != "wide":
        return tiny_model(family, "deltakv")
    model = wide_model()
    model.set_attn_implementation("deltakv")
    return model


def inputs_of(padded: bool) -> dict:
    return left_padded([48, 31]) if padded else {"input_ids": prompt(2), "attention_mask": torch.ones(2, 48).long()}


def compiled(backend: str = "eager") -> tf.CompileConfig:
    config = tf.CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return config


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generated(model, cache, inputs, num_tokens=40, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits."""
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False} | options,
    )
    return out.sequences, torch.stack(out.logits, 1)


def prompt_and_steps(model, cache, length: int, num_steps: int, pads: list[int]) -> torch.Tensor:
    """Newest logits of a padded prompt of two rows and of so many steps behind it."""
    ids, logits = prompt(2, length + num_steps), []
    mask = torch.stack([torch.arange(length + num_steps) >= min(count, length - 1) for count in pads]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start, stop in [(0, length), *((at, at + 1) for at in range(length, length + num_steps))]:
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model(ids[:, start:stop], **given, past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


def assert_close_but_for_codes(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A number that is rounded otherwise may get another code now and then, and be read as that."""
    difference = (got - expected).abs()
    assert difference.median() < 5e-3 and difference.max() < 1.0, (difference.median(), difference.max())


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", way) for way in WAYS if way != "filter"]
    + [("wide", "filter"), ("wide", "all")]
    + [(family, way) for family in ("phi3-partial", "cohere", "gpt2", "gemma3") for way in ("all", "coarse")],
)
def test_steps_are_those_of_a_growing_cache(family, way, padded):
    model, inputs = model_of(family), inputs_of(padded)
    options = WAYS[way](model)
    grown, fixed = DeltaKVCache(model, **options), DeltaKVCache(model, max_cache_len=SIZE, **options)
    expected, got = (generated(model, cache, inputs) for cache in (grown, fixed))
    assert torch.equal(got[0], expected[0])
    # what a step adds is rounded otherwise, and may get another code
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0.02 if way in ("learned", "all") else 1e-4)
    assert fixed._ledger.compressed == grown._ledger.compressed and fixed.stats() == grown.stats()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize(
    ("family", "way", "backend"),
    [("llama", way, "eager") for way in WAYS if way != "filter"]
    + [("wide", "filter", "eager"), ("gpt2", "all", "eager"), ("phi3-partial", "shared", "inductor")],
)
def test_a_generation_is_one_graph(fresh_compiler, family, way, backend, padded):
    """With flushes on the way; another cache, and one that was reset, compile nothing more."""
    model, inputs = model_of(family), inputs_of(padded)
    options = WAYS[way](model)
    uncompiled = generated(model, DeltaKVCache(model, max_cache_len=SIZE, **options), inputs)[0]
    cache = DeltaKVCache(model, max_cache_len=SIZE, **options)
    for kind in ("first", "reset", "another"):
        ids, _ = generated(model, cache, inputs, compile_config=compiled(backend))
        assert torch.equal(ids, uncompiled), kind
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], kind
        cache.reset() if kind == "first" else None
        cache = cache if kind == "first" else DeltaKVCache(model, max_cache_len=SIZE, **options)


def test_many_steps_are_one_graph(fresh_compiler):
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=600, **WAYS["coarse"](model))
    generated(model, cache, inputs_of(True), 500, compile_config=compiled())
    assert counters["stats"]["unique_graphs"] == 1 and cache.stats().forwards == 500


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_lossless_settings_give_the_tokens_of_dynamic_cache(padded):
    model, inputs = model_of("llama"), inputs_of(padded)
    expected = generated(model, tf.DynamicCache(config=model.config), inputs)
    got = generated(model, DeltaKVCache(model, max_cache_len=SIZE, **LOSSLESS), inputs)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-4)


@given(
    way=st.sampled_from(["all", "coarse", "direct"]),
    length=st.integers(1, 40),
    num_steps=st.integers(1, 20),
    sinks=st.integers(0, 3),
    window=st.integers(0, 9),
    block=st.integers(1, 9),
    pads=st.lists(st.integers(0, 30), min_size=2, max_size=2),
)
def test_any_sizes(way, length, num_steps, sinks, window, block, pads):
    model = model_of("llama")
    options = WAYS[way](model) | {"num_sink_tokens": sinks, "recent_window": window, "block_size": block}
    caches = [DeltaKVCache(model, **kind, **options) for kind in ({}, {"max_cache_len": 64})]
    assert_close_but_for_codes(*(prompt_and_steps(model, cache, length, num_steps, pads) for cache in caches))
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert caches[0]._ledger.compressed == caches[1]._ledger.compressed


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_loop_over_a_compiled_model(family, fresh_compiler):
    """Whose mask is of all columns, of which the model makes those of its layers inside of what is compiled."""
    model, inputs, said = model_of(family), inputs_of(True), []
    first = inputs["attention_mask"]
    for forward in (model, torch.compile(model, backend="eager")):
        cache, mask, logits = DeltaKVCache(model, max_cache_len=SIZE, **WAYS["coarse"](model)), first, []
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        for step in range(12):
            mask = F.pad(mask, (0, 1), value=1)
            cache.get_mask_sizes(1, 0)
            given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1)[:, -1:]}
            logits.append(forward(prompt(2, 1, step), **given, past_key_values=cache).logits)
        said.append(torch.cat(logits, 1))
    assert_close_but_for_codes(*said)


# -- between steps -----------------------------------------------------------------------------------------------------

ROWS = {"reorder": [1, 1], "select": [1], "repeat": [0, 0, 1, 1]}
CHANGES = {
    "crop": lambda cache: cache.crop(-3),
    "deep crop": lambda cache: cache.crop(-21),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "flush": lambda cache: cache.flush(),
    "release": lambda cache: cache.release_rows([0]),
    "copy": copy.deepcopy,
    "nothing": lambda cache: None,
}


def kept_rows(cache) -> list[int]:
    """Those that were not released, whose logits mean something."""
    released = cache._ledger.released or [0] * cache._ledger.batch_size
    return [row for row, count in enumerate(released) if not count]


def go_on(model, cache, mask, lengths, seed) -> torch.Tensor:
    """Logits of calls of so many tokens, alike in every row."""
    logits = []
    for length in lengths:
        mask, ids = F.pad(mask, (0, length), value=1), prompt(1, length, seed).expand(len(mask), -1)
        positions = (mask.cumsum(-1) - 1)[:, -length:]
        logits.append(model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(logits, 1)


@settings(max_examples=40)
@given(
    way=st.sampled_from(["all", "coarse", "learned", "direct", "filter"]),
    padded=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(list(CHANGES)), st.sampled_from([1, 1, 1, 3, 9])), min_size=1, max_size=6),
)
def test_between_steps_it_is_a_growing_cache(way, padded, steps):
    """Whatever is done to it: the same tokens are held, and the next ones read the same."""
    model = model_of("wide" if way == "filter" else "llama")
    options, inputs = WAYS[way](model), inputs_of(padded)
    caches = [DeltaKVCache(model, **kind, **options) for kind in ({}, {"max_cache_len": 160})]
    mask = inputs["attention_mask"]
    for cache in caches:
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, (change, length) in enumerate(steps):
        said = [go_on(model, cache, mask, [1, length, 1], number) for cache in caches]
        rows = kept_rows(caches[0])
        if not rows:
            return
        assert_close_but_for_codes(*(logits[rows] for logits in said))
        mask = F.pad(mask, (0, length + 2), value=1)
        if change in ROWS and len(mask) != 2:
            continue
        made = [CHANGES[change](cache) for cache in caches]
        caches = made if change == "copy" else caches
        mask = mask[ROWS.get(change, slice(None))]
        mask = mask[:, : -int(change == "crop") * 3 - int(change == "deep crop") * 21 or None]
        assert {cache.get_seq_length() for cache in caches} == {mask.shape[1]}
        assert caches[0]._ledger.compressed == caches[1]._ledger.compressed
        for layer_idx in range(len(caches[0].layers)):
            for states, expected in zip(*(cache.dequantize(layer_idx) for cache in caches), strict=True):
                rows = kept_rows(caches[0])
                if rows:
                    assert_close_but_for_codes(states[rows], expected[rows])


@pytest.mark.parametrize("size", [None, 160], ids=["growing", "fixed"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "filter"])
def test_a_batch_may_lose_its_longest_row(way, size):
    """What is held for it is wider than what the others need."""
    model, inputs = model_of("llama"), inputs_of(True)
    mask, said = inputs["attention_mask"], []
    for rows in ([0, 1], [1]):
        cache = DeltaKVCache(model, max_cache_len=size, **WAYS[way](model))
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        cache.batch_select_indices(torch.tensor(rows))
        said.append(go_on(model, cache, mask[rows], [1, 1, 9, 1], 4)[-1:])
    assert_close_but_for_codes(*said)


@pytest.mark.parametrize("to", [None, 100])
def test_a_saved_cache_goes_on_in_any_size(tmp_path, to):
    model, inputs = model_of("llama"), inputs_of(True)
    cache = DeltaKVCache(model, max_cache_len=SIZE, **WAYS["coarse"](model))
    ids, _ = generated(model, cache, inputs, 20)
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor, max_cache_len=to)
    mask = F.pad(inputs["attention_mask"], (0, 19), value=1)
    said = [go_on(model, each, mask, [1, 1, 1, 5, 1], 3) for each in (cache, loaded)]
    torch.testing.assert_close(*said, rtol=0, atol=1e-4)
    with pytest.raises(CacheStateError, match="`max_cache_len` must be at least"):
        DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor, max_cache_len=60)


MODES = {
    "sampling": {"do_sample": True},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "chunked-prefill": {"prefill_chunk_size": 10},
}


# after which one row holds what was said
LASTING = ("sampling", "prompt-lookup", "chunked-prefill")


@pytest.mark.parametrize("mode", MODES)
def test_generate_in_every_mode(mode):
    model, results = model_of("llama"), []
    ids = prompt(1, 12).repeat(1, 4)
    for kind in ({}, {"max_cache_len": 200}):
        cache = DeltaKVCache(model, **kind, **WAYS["coarse"](model))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            first = greedy(model, ids, cache, **MODES[mode])
            turn = torch.cat([first, prompt(len(first), 4, seed=1)], 1)
            again = greedy(model, full_inputs(turn), cache) if mode in LASTING else first
        results.append((first, again))
    assert all(map(torch.equal, *results))


def test_what_is_reported_is_held():
    """Room too, which a reset keeps."""
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=SIZE, **WAYS["all"](model))
    generated(model, cache, inputs_of(True), 20)
    stored = cache.memory_report().stored_bytes
    room = [t for layer in cache.layers for t in (layer.raw_keys, layer.raw_values, *vars(layer.pool).values())]
    room += [table for tables in cache._static.rooms for table in tables] + cache._static.plan.tensors()
    assert stored == held_bytes(room + cache._ledger.tensors())
    cache.reset()
    assert cache.memory_report().stored_bytes == held_bytes(room)


def addresses(cache) -> list[int]:
    plan, tensors = cache._static.plan, []
    for layer in cache.layers:
        tensors += [layer.raw_keys, layer.raw_values, *vars(layer.pool).values(), layer.reader.anchor]
        tensors += layer.tables.room
    return [tensor.data_ptr() for tensor in (*tensors, plan.counts, plan.place, plan.raw_bias, plan.compressed)]


def test_addresses_stay():
    model, inputs = model_of("llama"), inputs_of(True)
    cache = DeltaKVCache(model, max_cache_len=SIZE, **WAYS["coarse"](model))
    generated(model, cache, inputs, 12)
    before, mask = addresses(cache), F.pad(inputs["attention_mask"], (0, 11), value=1)
    cache.crop(-20)
    go_on(model, cache, mask[:, :-20], [1, 1], 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    go_on(model, cache, F.pad(mask[[1, 0], :-20], (0, 2), value=1), [9, 1], 1)
    assert addresses(cache) == before
    cache.reset()
    generated(model, cache, inputs_of(False), 12)
    assert addresses(cache) == before


@pytest.mark.parametrize("way", ["all", "coarse"])
def test_one_cache_serves_batch_after_batch(way):
    """Padded ones and even ones, as if each were its first."""
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=SIZE, **WAYS[way](model))
    for padded in (True, False, True):
        fresh = DeltaKVCache(model, max_cache_len=SIZE, **WAYS[way](model))
        said = [generated(model, each, inputs_of(padded)) for each in (cache, fresh)]
        assert all(map(torch.equal, *said))
        cache.reset()


def test_the_attention_may_change_between_steps():
    model = new_model("llama", "deltakv", 0)
    options, inputs = WAYS["coarse"](model), inputs_of(True)
    caches = [DeltaKVCache(model, **kind, **options) for kind in ({}, {"max_cache_len": SIZE})]
    mask = inputs["attention_mask"]
    for cache in caches:
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for number, attention in enumerate(["deltakv", "sdpa", "deltakv", "eager", "deltakv"]):
        model.set_attn_implementation(attention)
        assert caches[1].is_compileable == (attention == "deltakv")
        torch.testing.assert_close(
            *(go_on(model, cache, mask, [1, 1, 1], number) for cache in caches), rtol=0, atol=1e-3
        )
        mask = F.pad(mask, (0, 3), value=1)


@pytest.mark.parametrize("way", ["all", "coarse", "filter"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_cache_that_is_resized_goes_on(way, padded):
    model, inputs = model_of("wide" if way == "filter" else "llama"), inputs_of(padded)
    options, mask = WAYS[way](model), inputs["attention_mask"]
    small, large = (DeltaKVCache(model, max_cache_len=size, **options) for size in (56, SIZE))
    for cache in (small, large):
        cache.resize(60 if cache is small else SIZE)
        generated(model, cache, inputs, 10)
    small.resize(SIZE)
    assert small.layers[0].capacity == large.layers[0].capacity
    mask = F.pad(mask, (0, 9), value=1)
    for number, lengths in enumerate(([1, 1, 1, 20, 1], [1, 1])):
        said = [go_on(model, cache, mask, lengths, number) for cache in (small, large)]
        torch.testing.assert_close(*said, rtol=0, atol=1e-4)
        mask = F.pad(mask, (0, sum(lengths)), value=1)
        # less room than there was
        small.resize(small.get_seq_length() + 2)
    small.reset()
    small.resize(SIZE)
    assert torch.equal(generated(model, small, inputs)[0], generated(model, DeltaKVCache(model, **options), inputs)[0])


# -- refused -----------------------------------------------------------------------------------------------------------


def test_more_than_there_is_room_for():
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=50, **WAYS["all"](model))
    with pytest.raises(CacheStateError, match="`max_cache_len` must be at least 60.*got 50"):
        model(prompt(2, 60), past_key_values=cache)
    model(prompt(2, 48), past_key_values=cache)
    for _ in range(2):
        model(prompt(2, 1), past_key_values=cache)
    for length in (1, 7):
        with pytest.raises(CacheStateError, match=f"`max_cache_len` must be at least {50 + length}.*got 50"):
            model(prompt(2, length), past_key_values=cache)
    assert cache.get_seq_length() == 50
    with pytest.raises(InvalidOptionError, match="`max_cache_len` must be at least the 50 columns held, got 49"):
        cache.resize(49)
    cache.crop(-3)
    assert model(prompt(2, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("length", [1, 7], ids=["step", "call"])
@pytest.mark.parametrize("attention", ["deltakv", "sdpa"])
def test_what_is_refused_leaves_sliding_layers_alone(attention, length):
    """The host's layer comes first: it must not hold tokens that the layer behind it has no room for."""
    model = tiny_model("gemma3", attention)
    cache = DeltaKVCache(model, max_cache_len=48, **TIGHT)
    model(prompt(1, 48), past_key_values=cache)
    with pytest.raises(CacheStateError, match="`max_cache_len` must be at least"):
        model(prompt(1, length), past_key_values=cache)
    assert {layer.get_seq_length() for layer in cache.layers} == {48}


def test_a_cache_that_grows_is_not_resized():
    with pytest.raises(InvalidOptionError, match="`resize` must be left out"):
        DeltaKVCache(tiny_model("llama")).resize(50)


def test_a_prompt_that_is_refused_leaves_an_empty_cache():
    """So that a shorter one may follow."""
    model = tiny_model("gemma3", "deltakv")
    cache = DeltaKVCache(model, max_cache_len=48, **TIGHT)
    with pytest.raises(CacheStateError, match="`max_cache_len` must be at least"):
        model(prompt(1, 60), past_key_values=cache)
    model(prompt(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_sizes_that_are_none(size):
    with pytest.raises(InvalidOptionError, match="`max_cache_len`"):
        DeltaKVCache(tiny_model("llama"), max_cache_len=50).resize(size)
    with pytest.raises(InvalidOptionError, match="`max_cache_len` must be an integer >= 1"):
        DeltaKVCache(model_of("llama"), max_cache_len=size)


@pytest.mark.parametrize("name", ["reference_growth", "sample_every", "offloading"])
def test_options_that_do_not_go_with_it(name):
    with pytest.raises(InvalidOptionError, match=f"`{name}` must be .* with `max_cache_len`"):
        DeltaKVCache(model_of("llama"), max_cache_len=SIZE, **{name: 1})


def test_a_bare_config():
    with pytest.raises(InvalidOptionError, match="`max_cache_len` must be None with a bare config"):
        DeltaKVCache(model_of("llama").config, max_cache_len=SIZE)


def test_padding_in_a_step_is_noticed():
    model, inputs = model_of("llama"), inputs_of(False)
    cache = DeltaKVCache(model, max_cache_len=SIZE, **WAYS["all"](model))
    model(**inputs, past_key_values=cache)
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    mask[1, -1] = 0
    model(prompt(2, 1), attention_mask=mask, past_key_values=cache)
    with pytest.raises(CacheStateError, match="`attention_mask` must be 1"):
        cache.get_seq_length()
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_soft_cap_is_refused():
    model = model_of("gemma2")
    cache = DeltaKVCache(model, max_cache_len=SIZE, **TIGHT)
    model(prompt(1), past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="`max_cache_len` must be left out .* `softcap`"):
        model(prompt(1, 1), past_key_values=cache)
