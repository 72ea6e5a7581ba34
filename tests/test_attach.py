"""What a cache does to a model: two kinds of hooks, once, and nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from compatibility import longrope_model
from helpers import TIGHT, feed, full_cache, greedy, left_padded, make_tokens, prompt
from models import CONFIGS, build, new_model, tiny_model

from deltakv_hf import CacheStateError, DeltaKVCache, detach
from deltakv_hf import attach as attach_module

FAMILIES = ["llama", "gemma3", "smollm3", "glm4", "gpt2"]


def hooks(model) -> int:
    """Hooks of any kind in a model."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.fixture
def probes(monkeypatch):
    """Models that were probed."""
    probed, original = [], attach_module._probe
    monkeypatch.setattr(attach_module, "_probe", lambda root: probed.append(root) or original(root))
    return probed


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_registered_once(family, probes):
    model = new_model(family)
    DeltaKVCache(model)
    count = hooks(model)
    for _ in range(3):
        greedy(model, prompt(), DeltaKVCache(model))
    assert count > 0 and hooks(model) == count and len(probes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_found_again_on_a_copy(family):
    model = new_model(family)
    DeltaKVCache(model)
    other = copy.deepcopy(model)
    expected = greedy(model, left_padded([40, 22]), DeltaKVCache(model, **TIGHT))
    assert torch.equal(greedy(other, left_padded([40, 22]), DeltaKVCache(other, **TIGHT)), expected)
    assert hooks(other) == hooks(model)


def test_cache_of_the_original_refuses_the_copy():
    model = new_model("llama")
    cache = DeltaKVCache(model)
    with pytest.raises(CacheStateError):
        greedy(copy.deepcopy(model), prompt(), cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_removes_every_hook(family):
    model = new_model(family)
    own = model.register_forward_pre_hook(lambda module, args: None)
    DeltaKVCache(model)
    detach(model)
    assert hooks(model) == 1
    own.remove()


def test_detach_leaves_nothing_on_a_longrope_model():
    model = longrope_model()
    before = set(vars(model))
    DeltaKVCache(model)
    assert set(vars(model)) > before
    detach(model)
    assert set(vars(model)) == before


def test_detach_of_a_copy_leaves_the_original():
    model = new_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    detach(copy.deepcopy(model))
    assert greedy(model, prompt(), cache).shape == (1, 60)


def test_a_new_cache_attaches_again():
    model = new_model("llama")
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT))
    detach(model)
    assert torch.equal(greedy(model, prompt(), DeltaKVCache(model, **TIGHT)), expected)


def test_detach_of_an_untouched_model_does_nothing():
    model = new_model("llama")
    detach(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_making_a_cache_leaves_the_global_generator_alone(family, training):
    model = new_model(family).train(training)
    before = torch.get_rng_state()
    DeltaKVCache(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_making_a_cache_leaves_the_weights_and_other_caches_alone(family):
    model = new_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = greedy(model, prompt(), full_cache(model))
    DeltaKVCache(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(greedy(model, prompt(), full_cache(model)), expected)
    assert torch.equal(greedy(model, prompt(), None), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_caches_of_one_model_do_not_mix(family):
    """Forwards of two conversations take turns."""
    model = tiny_model(family)
    together, alone = [], []
    caches = [DeltaKVCache(model, **TIGHT) for _ in range(2)]
    for step in range(6):
        for seed, cache in enumerate(caches):
            ids = prompt(1 + seed, 40 if step == 0 else 1, seed=10 * step + seed)
            together.append(model(ids, past_key_values=cache).logits)
    for seed in range(2):
        cache = DeltaKVCache(model, **TIGHT)
        for step in range(6):
            ids = prompt(1 + seed, 40 if step == 0 else 1, seed=10 * step + seed)
            alone.append(model(ids, past_key_values=cache).logits)
    for i, logits in enumerate(together):
        assert torch.equal(logits, alone[(i % 2) * 6 + i // 2])


@pytest.mark.parametrize("window", [1, 2, 4, 7, 8, 9])
@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3"])
def test_a_window_shorter_than_the_probe(family, window):
    """Regression: the host's sliding layer keeps fewer keys than the probe feeds."""
    config = CONFIGS[family]()
    config.sliding_window = window
    model = build(config)
    expected = greedy(model, prompt(), full_cache(model))
    assert torch.equal(greedy(model, prompt(), DeltaKVCache(model, recent_window=4096)), expected)


@pytest.fixture
def no_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_cache_does_not_keep_its_model(no_garbage_collector):
    model = new_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    greedy(model, prompt(), cache)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert cache.get_seq_length() == 59


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_cache_is_freed_at_once(no_garbage_collector, padded):
    """No reference cycle: gigabytes may not wait for the garbage collector."""
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    greedy(model, left_padded([40, 30]) if padded else prompt(), cache)
    state = cache.layers[0].state
    references = [weakref.ref(cache), weakref.ref(state.store.residual_codes), weakref.ref(state.tail_keys)]
    del cache, state
    assert [reference() for reference in references] == [None] * 3


def test_an_unread_view_frees_with_its_cache(no_garbage_collector):
    cache = DeltaKVCache(tiny_model("llama"), **TIGHT)
    tokens = make_tokens(60)
    feed(cache, tokens.columns(slice(0, 59)), [59])
    views = feed(cache, tokens, [1], past=59)
    reference = weakref.ref(cache.layers[0].state.store.residual_codes)
    del views, cache
    assert reference() is None


def test_a_probed_model_is_freed(no_garbage_collector):
    model = new_model("llama")
    DeltaKVCache(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_models_are_taken(family):
    """`AutoModel` without a language-modelling head."""
    model = new_model(family).base_model
    cache = DeltaKVCache(model, **TIGHT)
    model(**left_padded([40, 22]), past_key_values=cache)
    assert cache.memory_report().tokens == 62


def test_cache_has_one_layer_per_decoder_layer():
    for family in FAMILIES:
        model = tiny_model(family)
        assert len(DeltaKVCache(model)) == len(full_cache(model))
