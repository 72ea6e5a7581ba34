"""`set_default_cache`: what `model.generate` uses when it is told of no cache, and what it leaves alone."""

import copy
import functools
import pickle
import re
from types import MethodType

import pytest
import torch
from helpers import LOSSLESS, TIGHT, full_cache, greedy, left_padded, prompt
from models import new_model, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from deltakv_hf import DeltaKVCache, InvalidOptionError, detach, set_default_cache


class Factory:
    """Makes tight caches and keeps what it was asked."""

    def __init__(self):
        self.models, self.caches = [], []

    def __call__(self, model):
        self.models.append(model)
        self.caches.append(DeltaKVCache(model, **TIGHT))
        return self.caches[-1]


@pytest.fixture
def model():
    return new_model("llama")


def plain(model, ids=None, **options):
    """Greedy generation that names no cache."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12} | options
    return model.generate(prompt() if ids is None else ids, **options)


def test_every_call_has_a_cache_of_its_own(model):
    factory = Factory()
    set_default_cache(model, factory)
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT))
    for _ in range(2):
        assert torch.equal(plain(model), expected)
    assert factory.models == [model, model] and factory.caches[0] is not factory.caches[1]
    for cache in factory.caches:
        assert cache.get_seq_length() == 59 and cache.memory_report().compressed_tokens > 0


def test_the_class_itself_is_a_factory(model):
    set_default_cache(model, DeltaKVCache)
    got = plain(model, return_dict_in_generate=True)
    assert type(got.past_key_values) is DeltaKVCache


def test_setting_twice_replaces(model):
    first, second = Factory(), Factory()
    set_default_cache(model, first)
    set_default_cache(model, second)
    plain(model)
    assert not first.caches and len(second.caches) == 1


def test_none_removes_it(model):
    before = set(vars(model))
    factory = Factory()
    for _ in range(2):
        set_default_cache(model, factory)
    set_default_cache(model, None)
    set_default_cache(model, None)
    assert set(vars(model)) == before
    assert type(plain(model, return_dict_in_generate=True).past_key_values) is DynamicCache and not factory.caches


def test_other_models_of_the_class_are_left_alone(model):
    factory, other = Factory(), new_model("llama", seed=1)
    method = type(model)._prepare_cache_for_generation
    set_default_cache(model, factory)
    plain(other)
    assert not factory.caches and type(model)._prepare_cache_for_generation is method


def test_a_module_as_factory_is_no_part_of_the_model(model):
    class Maker(torch.nn.Linear):
        def forward(self, model):
            return DeltaKVCache(model, **TIGHT)

    names = set(model.state_dict())
    set_default_cache(model, Maker(2, 2))
    assert set(model.state_dict()) == names
    assert type(plain(model, return_dict_in_generate=True).past_key_values) is DeltaKVCache


# -- what the user asks for comes first --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [DynamicCache, lambda: None], ids=["cache", "none"])
def test_an_explicit_cache_is_used(model, make):
    factory = Factory()
    set_default_cache(model, factory)
    cache = make()
    plain(model, past_key_values=cache)
    assert len(factory.caches) == (cache is None)
    assert cache is None or cache.get_seq_length() == 59


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"generation_config": GenerationConfig(use_cache=False)},
        {"generation_config": GenerationConfig(cache_implementation="dynamic")},
    ],
    ids=["no-cache", "dynamic", "static", "config-no-cache", "config-dynamic"],
)
def test_an_explicit_choice_is_kept(model, options):
    expected = plain(model, **options)
    set_default_cache(model, lambda model: pytest.fail("the factory was asked"))
    assert torch.equal(plain(model, **options), expected)


def test_the_model_s_own_generation_config_is_kept(model):
    model.generation_config.cache_implementation = "dynamic"
    set_default_cache(model, lambda model: pytest.fail("the factory was asked"))
    assert plain(model).shape == (1, 60)


def test_an_explicit_cache_beside_an_implementation_is_still_an_error(model):
    set_default_cache(model, DeltaKVCache)
    with pytest.raises(ValueError, match="cache_implementation"):
        plain(model, past_key_values=DeltaKVCache(model), cache_implementation="static")


# -- modes and wrappers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prompt_lookup_num_tokens": 3},
     {"prefill_chunk_size": 10}],
    ids=["beams", "returned-beams", "lookup", "chunks"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_modes_of_generate(family, options):
    model, factory = new_model(family), Factory()
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT), **options)
    set_default_cache(model, factory)
    assert torch.equal(plain(model, **options), expected)
    assert len(factory.caches) == 1 and factory.caches[0].memory_report().compressed_tokens > 0


def test_a_padded_batch(model):
    inputs = left_padded([40, 22])
    expected = greedy(model, inputs, DeltaKVCache(model, **TIGHT))
    set_default_cache(model, Factory())
    assert torch.equal(plain(model, inputs["input_ids"], attention_mask=inputs["attention_mask"]), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.parametrize("who", ["main", "assistant", "both"])
def test_assisted_decoding(family, who):
    model, assistant, factory = new_model(family), new_model(family, seed=1), Factory()
    try:
        expected = plain(model, assistant_model=assistant)
    except RuntimeError as error:
        pytest.skip(f"the host itself cannot do this (sliding layers before transformers 5.18): {error}")
    for given, name in ((model, "main"), (assistant, "assistant")):
        if who in (name, "both"):
            set_default_cache(
                given, lambda model: factory.caches.append(DeltaKVCache(model, **LOSSLESS)) or factory.caches[-1]
            )
    assert torch.equal(plain(model, assistant_model=assistant), expected)
    assert len(factory.caches) == (2 if who == "both" else 1)


def test_early_exit():
    """The model drafts for itself with its first layers: the factory sees a config of fewer layers."""
    model, layers = new_model("llama-4-layers"), []

    def factory(model):
        layers.append(len(DeltaKVCache(model)))
        return DeltaKVCache(model, **LOSSLESS)

    expected = plain(model)
    set_default_cache(model, factory)
    assert torch.equal(plain(model, assistant_early_exit=2), expected)
    assert layers[:2] == [4, 2]


def test_a_copy_of_the_model_has_its_own(model):
    factory = Factory()
    set_default_cache(model, factory)
    other = copy.deepcopy(model)
    set_default_cache(model, None)
    got = plain(other, return_dict_in_generate=True)
    assert type(got.past_key_values) is DeltaKVCache and not factory.caches, "the copy's factory is a copy"
    assert type(plain(model, return_dict_in_generate=True).past_key_values) is DynamicCache
    method = other._prepare_cache_for_generation
    assert isinstance(method, MethodType) and method.__self__ is other


def test_a_model_saved_whole_loads(model):
    """What is a plain attribute is pickled: the method by its name, the factory as itself."""
    set_default_cache(model, functools.partial(DeltaKVCache, **TIGHT))
    expected = plain(model)
    detach(model)
    other = pickle.loads(pickle.dumps(model))
    set_default_cache(other, functools.partial(DeltaKVCache, **TIGHT))
    assert torch.equal(plain(other), expected)


@pytest.mark.parametrize("through", ["wrapper", "inside"])
def test_a_compiled_model(model, through):
    compiled, factory = torch.compile(model, backend="eager"), Factory()
    set_default_cache(compiled if through == "wrapper" else model, factory)
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT))
    assert torch.equal(plain(compiled), expected) and torch.equal(plain(model), expected)
    assert len(factory.caches) == 2
    set_default_cache(compiled, None)
    plain(compiled)
    assert len(factory.caches) == 2


def test_the_text_generation_pipeline(model):
    names = ["[PAD]", "[UNK]", *map(str, range(2, 64))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side="left"
    )
    generator, factory = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu"), Factory()
    texts = [" ".join(names[i] for i in prompt(1, length, seed=length)[0]) for length in (40, 22, 31)]
    options = dict(do_sample=False, max_new_tokens=8, batch_size=2, return_tensors=True)
    generator(texts, **options)
    set_default_cache(model, factory)
    outputs = generator(texts, **options)
    assert len(outputs) == 3 and len(factory.caches) == 2
    assert all(cache.memory_report().compressed_tokens > 0 for cache in factory.caches)
    expected = plain(model, prompt(1, 31, seed=31), max_new_tokens=8)[0]
    assert outputs[2][0]["generated_token_ids"] == expected.tolist()


# -- bad arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [3, "DeltaKVCache", {}, full_cache(tiny_model("llama"))], ids=lambda v: type(v).__name__
)
def test_factory_is_no_function(model, value):
    with pytest.raises(InvalidOptionError, match=rf"`factory`.*{re.escape(repr(value))}"):
        set_default_cache(model, value)
    assert type(plain(model, return_dict_in_generate=True).past_key_values) is DynamicCache


@pytest.mark.parametrize(
    "value", [None, 3, tiny_model("llama").config, torch.nn.Linear(2, 2)], ids=lambda v: type(v).__name__
)
def test_model_is_no_model(value):
    with pytest.raises(InvalidOptionError, match=f"`model`.*{type(value).__name__}"):
        set_default_cache(value, DeltaKVCache)


def test_model_that_does_not_generate(model):
    with pytest.raises(InvalidOptionError, match="`model`.*generate.*LlamaModel.*AutoModelForCausalLM"):
        set_default_cache(model.model, DeltaKVCache)


@pytest.mark.parametrize("value", [None, 3, DeltaKVCache], ids=["none", "int", "class"])
def test_factory_makes_no_cache(model, value):
    set_default_cache(model, lambda model: value)
    with pytest.raises(InvalidOptionError, match="`factory`.*Cache"):
        plain(model)


def test_factory_that_makes_no_new_cache(model):
    """A cache of an earlier call would be continued, which no caller of `generate` expects."""
    cache = DeltaKVCache(model, **TIGHT)
    set_default_cache(model, lambda model: cache)
    plain(model)
    with pytest.raises(InvalidOptionError, match="`factory`.*new cache.*59"):
        plain(model)


def test_an_encoder_decoder_is_refused_when_it_generates():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    set_default_cache(model, DeltaKVCache)
    with pytest.raises(ValueError, match="encoder-decoder"):
        plain(model)
