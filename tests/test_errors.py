"""Bad input raises one of the package's errors, which names the argument and the value: never a wrong answer."""

import re
import threading

import pytest
import torch
import transformers as tf
from helpers import TIGHT, assert_same_state, feed, full_cache, greedy, left_padded, make_tokens, prompt
from models import CONFIGS, MOE, SMALL, build, new_model, tiny_model

from deltakv_hf import (
    CacheStateError,
    DeltaKVCache,
    DeltaKVError,
    InvalidOptionError,
    UnsupportedModelError,
    detach,
)

BAD_OPTIONS = [
    *[
        (name, bad)
        for name in ("block_size", "reference_stride", "top_k", "group_size")
        for bad in (0, -1, 1.5, "8", True)
    ],
    *[(name, bad) for name in ("num_sink_tokens", "recent_window") for bad in (-1, 2.0, None, True)],
    *[(name, bad) for name in ("nbits", "reference_nbits") for bad in (0, 1, 3, 16, 4.5, "4", True, None)],
    *[("reference_growth", bad) for bad in (-0.1, float("nan"), float("inf"), "1", True)],
    ("top_k", 17),
]


@pytest.mark.parametrize("name, value", BAD_OPTIONS, ids=lambda value: repr(value))
def test_option_out_of_range(name, value):
    with pytest.raises(InvalidOptionError, match=rf"`{name}`.*{re.escape(repr(value))}"):
        DeltaKVCache(tiny_model("llama"), **{name: value})


@pytest.mark.parametrize(
    "name, near",
    [
        ("recent_windw", "recent_window"),
        ("nbit", "nbits"),
        ("sink_tokens", "num_sink_tokens"),
        ("ref_stride", "reference_stride"),
    ],
)
def test_unknown_option_suggests_the_near_name(name, near):
    with pytest.raises(InvalidOptionError, match=rf"`{name}`.*Did you mean `{near}`"):
        DeltaKVCache(tiny_model("llama"), **{name: 4})


def test_unknown_option_far_from_all_lists_them():
    with pytest.raises(InvalidOptionError, match="`zzz`.*recent_window.*reference_stride"):
        DeltaKVCache(tiny_model("llama"), zzz=1)


def test_errors_have_one_base_and_the_builtin_kind():
    assert issubclass(InvalidOptionError, (DeltaKVError, ValueError))
    assert issubclass(UnsupportedModelError, (DeltaKVError, ValueError))
    assert issubclass(CacheStateError, (DeltaKVError, RuntimeError))


@pytest.mark.parametrize(
    "value", [(1, 2), None, "gpt2", 3, tf.DynamicCache(), torch.nn.Linear(2, 2), tf.LlamaForCausalLM], ids=repr
)
def test_model_is_no_model(value):
    name = type(value).__name__
    with pytest.raises(DeltaKVError, match=rf"`model`.*{name}"):
        DeltaKVCache(value)


SMALL_MLA = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4, n_group=1,
    topk_group=1,
)  # fmt: skip
UNSUPPORTED = {
    "encoder-decoder": lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
    "mla": lambda: tf.DeepseekV3Config(**SMALL | MOE | SMALL_MLA),
    "dynamic-ntk": lambda: tf.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "state-space": lambda: tf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "encoder": lambda: tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    ),
}
MODEL_CLASSES = {
    "encoder-decoder": tf.T5ForConditionalGeneration,
    "mla": tf.DeepseekV3ForCausalLM,
    "dynamic-ntk": tf.LlamaForCausalLM,
    "state-space": tf.MambaForCausalLM,
    "encoder": tf.BertModel,
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
@pytest.mark.parametrize("form", ["model", "config"])
def test_unsupported_model(kind, form):
    config = UNSUPPORTED[kind]()
    with torch.random.fork_rng():
        given = config if form == "config" else MODEL_CLASSES[kind](config)
    with pytest.raises(UnsupportedModelError, match=f"`model`|{config.model_type}"):
        DeltaKVCache(given)


def longrope(switch=64):
    factors = [1.0 + i for i in range(4)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": factors,
        "original_max_position_embeddings": switch,
    }
    return build(tf.Phi3Config(**SMALL, original_max_position_embeddings=switch, rope_parameters=rope))


def test_longrope_may_not_cross_its_switch():
    model = longrope()
    with pytest.raises(CacheStateError, match="64.*original_max_position_embeddings"):
        greedy(model, prompt(1, 60), DeltaKVCache(model, **TIGHT), max_new_tokens=12)


@pytest.mark.parametrize("length", [30, 80])
def test_longrope_on_either_side_of_its_switch(length):
    model = longrope()
    expected = greedy(model, prompt(1, length), full_cache(model), max_new_tokens=10)
    cache = DeltaKVCache(model, recent_window=4096)
    got = greedy(model, prompt(1, length), cache, max_new_tokens=10)
    assert torch.equal(got, expected)
    # regression: the host dropped the empty cache of a prompt beyond the switch and used its own
    assert cache.get_seq_length() == length + 9


def test_bare_config_refuses_a_batch():
    model = new_model("llama")
    with pytest.raises(InvalidOptionError, match="`model`.*batch.*2"):
        model(prompt(2), past_key_values=DeltaKVCache(model.config))


def test_bare_config_works_with_a_hooked_model():
    """Regression: hooks that another cache left on the model made a bare cache raise."""
    model = tiny_model("llama")
    DeltaKVCache(model)
    assert greedy(model, prompt(), DeltaKVCache(model.config, **TIGHT)).shape == (1, 60)


@pytest.mark.parametrize("family", ["gemma3", "smollm3", "phi3", "glm4", "gpt_oss", "gpt2", "cohere2"])
def test_bare_config_of_a_family_with_another_rotation(family):
    with pytest.raises(UnsupportedModelError, match=CONFIGS[family]().model_type):
        DeltaKVCache(CONFIGS[family]())


FAMILIES = ["llama", "gemma3", "smollm3", "cohere2", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hooked", [True, False], ids=["attached", "never-attached"])
def test_cache_of_another_model(family, hooked):
    """Also of layers that do not rotate, which miss no tables: the mask of the other model would not be seen."""
    model, other = tiny_model(family), new_model(family, seed=1)
    if hooked:
        DeltaKVCache(other)
    with pytest.raises(CacheStateError, match="model"):
        greedy(other, left_padded([40, 22]), DeltaKVCache(model, **TIGHT))


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_of_a_detached_model(family):
    model = new_model(family)
    cache = DeltaKVCache(model, **TIGHT)
    detach(model)
    with pytest.raises(CacheStateError):
        greedy(model, left_padded([40, 22]), cache)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, value",
    [
        (torch.ones(2, 47, dtype=torch.long), r"\(2, 47\)"),
        (torch.ones(2, 49, dtype=torch.long), r"\(2, 49\)"),
        (torch.ones(1, 48, dtype=torch.long), r"\(1, 48\)"),
        (torch.zeros(2, 1, 48, 48), "4-D"),
    ],
    ids=["short", "long", "one-row", "4-D"],
)
def test_wrong_mask_of_a_prompt(mask, value):
    model = tiny_model("llama")
    with pytest.raises(CacheStateError, match=rf"`attention_mask`.*{value}"):
        model(prompt(2), attention_mask=mask, past_key_values=DeltaKVCache(model))


def test_mask_of_the_new_tokens_only():
    model, cache = tiny_model("llama"), DeltaKVCache(tiny_model("llama"))
    model(**left_padded([48, 40]), past_key_values=cache)
    with pytest.raises(CacheStateError, match=r"`attention_mask`.*\(2, 1\)"):
        model(prompt(2, 1), attention_mask=torch.ones(2, 1, dtype=torch.long), past_key_values=cache)


def test_cache_is_usable_after_a_refused_first_mask():
    """Regression: the batch of a refused call was remembered."""
    model, cache = tiny_model("llama"), DeltaKVCache(tiny_model("llama"))
    with pytest.raises(CacheStateError):
        model(prompt(3), attention_mask=torch.ones(3, 9, dtype=torch.long), past_key_values=cache)
    assert model(prompt(1), past_key_values=cache).logits.shape[0] == 1


def test_padding_may_not_become_real():
    """Padding is dropped when it is sorted in, so there is nothing to attend to: the very call must raise."""
    model, cache = tiny_model("llama"), DeltaKVCache(tiny_model("llama"), **TIGHT)
    model(**left_padded([48, 40]), past_key_values=cache)
    with pytest.raises(CacheStateError, match="`attention_mask`"):
        model(prompt(2, 1), attention_mask=torch.ones(2, 49, dtype=torch.long), past_key_values=cache)


def test_padding_that_became_real_is_not_forgotten():
    model, cache = tiny_model("llama"), DeltaKVCache(tiny_model("llama"), **TIGHT)
    model(**left_padded([48, 40]), past_key_values=cache)
    errors = 0
    for i in range(4):
        try:
            mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
            model(prompt(2, 1, seed=i), attention_mask=mask, past_key_values=cache)
        except CacheStateError:
            errors += 1
    assert errors >= 3


# -- order of calls ----------------------------------------------------------------------------------------------------


def broken_off(model, cache, ids, layer_idx):
    """A forward that an exception ends in a layer."""

    def fail(*args):
        raise KeyboardInterrupt

    layers = model.model.layers
    handle = layers[layer_idx].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    handle.remove()


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("stage", ["prompt", "decode"])
def test_forward_after_a_broken_off_one(stage, at):
    model = tiny_model("llama-4-layers")
    cache = DeltaKVCache(model, **TIGHT)
    if stage == "decode":
        model(prompt(), past_key_values=cache)
    broken_off(model, cache, prompt(1, 1) if stage == "decode" else prompt(), at)
    for length in (1, 48):
        with pytest.raises(CacheStateError, match="reset"):
            model(prompt(1, length), past_key_values=cache)
    cache.reset()
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT))
    assert torch.equal(greedy(model, prompt(), cache), expected)


@pytest.mark.parametrize("operation", ["flush", "crop in part", "reorder", "select", "repeat", "dequantize"])
def test_other_calls_after_a_broken_off_forward(operation):
    model = tiny_model("llama-4-layers")
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(2), past_key_values=cache)
    broken_off(model, cache, prompt(2, 3), 1)
    calls = {
        "flush": cache.flush,
        "crop in part": lambda: cache.crop(-1),
        "dequantize": lambda: cache.dequantize(0),
        "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
        "select": lambda: cache.batch_select_indices(torch.tensor([1])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
    }
    with pytest.raises(CacheStateError):
        calls[operation]()


def test_forward_after_one_that_broke_off_in_a_layer_of_the_host():
    """gemma3, first layer sliding: the host's layer holds a token more than ours, which it never got."""
    model = tiny_model("gemma3")
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(), past_key_values=cache)
    broken_off(model, cache, prompt(1, 1), 0)
    with pytest.raises(CacheStateError):
        model(prompt(1, 1), past_key_values=cache)


def test_first_forward_that_broke_off_before_the_last_layer_of_the_host():
    """Regression: our own layers were all served, and the host's layer was taken for one that never stores."""
    layer_types = ["full_attention", "sliding_attention"]
    model = build(tf.Gemma3TextConfig(**SMALL, sliding_window=16, layer_types=layer_types))
    cache = DeltaKVCache(model, **TIGHT)
    broken_off(model, cache, prompt(), 0)
    with pytest.raises(CacheStateError, match="layer 1 holds 0"):
        model(prompt(1, 1), past_key_values=cache)
    cache.crop(-48)
    assert torch.equal(greedy(model, prompt(), cache), greedy(model, prompt(), DeltaKVCache(model, **TIGHT)))


@pytest.mark.parametrize("past", [0, 48])
def test_one_cache_in_two_forwards_at_once(past):
    """The second forward is refused; the first ends as if it had been alone."""
    model = tiny_model("llama-4-layers")
    cache, alone = DeltaKVCache(model, **TIGHT), DeltaKVCache(model, **TIGHT)
    for held in (cache, alone) if past else ():
        model(prompt(1, past), past_key_values=held)
    refused = []

    def second():
        try:
            model(prompt(1, 5), past_key_values=cache)
        except CacheStateError as error:
            refused.append(str(error))

    def meanwhile(*args):
        handle.remove()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    handle = model.model.layers[1].mlp.register_forward_pre_hook(meanwhile)
    got = model(prompt(1, 5, seed=1), past_key_values=cache).logits
    assert len(refused) == 1 and "still running" in refused[0]
    assert torch.equal(got, model(prompt(1, 5, seed=1), past_key_values=alone).logits)
    assert_same_state(cache, alone)


def test_two_forwards_that_begin_before_either_reaches_a_layer():
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)

    def other_begins(*args):
        handle.remove()
        thread = threading.Thread(target=cache.note_forward, args=(model, None))
        thread.start()
        thread.join()

    handle = model.model.embed_tokens.register_forward_pre_hook(other_begins)
    with pytest.raises(CacheStateError, match="one forward at a time"):
        model(prompt(), past_key_values=cache)


@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_another_one_has_overtaken(nested):
    """Regression: positions and mask were made for 40 columns, and 41 were held when the layers came."""
    model = tiny_model("llama")
    cache, alone = DeltaKVCache(model, **TIGHT), DeltaKVCache(model, **TIGHT)
    for held in (cache, alone):
        model(prompt(1, 40), past_key_values=held)

    def other(*args):
        handle.remove()
        with torch.no_grad():
            model(prompt(1, 1, seed=1), past_key_values=cache)

    def in_a_thread(*args):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    handle = model.model.layers[0].register_forward_pre_hook(other if nested else in_a_thread)
    with pytest.raises(CacheStateError, match="one forward at a time"):
        model(prompt(1, 1, seed=2), past_key_values=cache)
    model(prompt(1, 1, seed=1), past_key_values=alone)
    assert_same_state(cache, alone)


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_the_mask_of_a_forward_that_failed_is_forgotten(first):
    """Regression: the text decoder, called by itself, was given the mask of a call that had not come to a layer."""
    model = tiny_model("llama")
    cache, inputs = DeltaKVCache(model, **TIGHT), left_padded([20, 12])
    wrong = torch.ones_like(inputs["attention_mask"])
    with pytest.raises(IndexError):
        (model if first == "outer" else model.model)(
            input_ids=inputs["input_ids"] + 1000, attention_mask=wrong, past_key_values=cache
        )
    model.model(**inputs, past_key_values=cache)
    cache.flush()
    assert cache.memory_report().tokens == 32


@pytest.mark.parametrize("cache_for", ["model", "config"])
def test_the_text_decoder_called_by_itself_on_a_broken_cache(cache_for):
    """Regression: only the whole model, and only a cache that knows it, looked whether every layer was as long."""
    model = tiny_model("gemma3" if cache_for == "model" else "gemma2", "eager")
    cache = DeltaKVCache(model if cache_for == "model" else model.config, **TIGHT)
    DeltaKVCache(model)
    model(prompt(), past_key_values=cache)
    broken_off(model, cache, prompt(1, 1), 0)
    for module in (model.model, model):
        with pytest.raises(CacheStateError, match="broken off"):
            module(prompt(1, 1), past_key_values=cache)


@pytest.mark.parametrize("layer_types", [["conv", "full_attention"], ["full_attention", "conv"]], ids="-".join)
def test_a_forward_that_broke_off_beside_a_convolution(layer_types, tmp_path):
    """Regression: a convolution keeps no count, so nobody saw that it had read a token more or less."""
    model = build(tf.Lfm2Config(**SMALL, layer_types=layer_types, conv_L_cache=3))
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(), past_key_values=cache)
    model(prompt(1, 1), past_key_values=cache)

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.model.layers[0].ffn_norm.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(prompt(1, 1), past_key_values=cache)
    handle.remove()
    forward, save = lambda: model(prompt(1, 1), past_key_values=cache), lambda: cache.save(tmp_path / "cache")
    for call in (forward, cache.flush, cache.to_dynamic_cache, save):
        with pytest.raises(CacheStateError, match="broken off.*reset"):
            call()
    cache.reset()
    assert torch.equal(greedy(model, prompt(), cache), greedy(model, prompt(), DeltaKVCache(model, **TIGHT)))


def test_a_broken_forward_beside_a_window_of_the_host_is_noticed_by_every_operation():
    model = tiny_model("gemma3")
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(2), past_key_values=cache)
    broken_off(model, cache, prompt(2, 1), 0)
    calls = [
        cache.flush,
        cache.to_dynamic_cache,
        lambda: list(cache),
        lambda: cache.dequantize(1),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: model(prompt(2, 1), past_key_values=cache),
    ]
    for call in calls:
        with pytest.raises(CacheStateError, match="broken off"):
            call()


def test_tables_are_asked_for():
    cache, tokens = DeltaKVCache(tiny_model("llama")), make_tokens(10)
    cache._ledger.note_mask(None, outermost=True)
    with pytest.raises(CacheStateError, match="tables"):
        cache.update(tokens.keys[0], tokens.values[0], 0)


@pytest.mark.parametrize("length", [9, 11, 1])
def test_tables_of_a_wrong_length(length):
    cache, tokens = DeltaKVCache(tiny_model("llama")), make_tokens(20)
    cache.layers[0].receive_tables(tokens.cos[:, :length], tokens.sin[:, :length])
    with pytest.raises(CacheStateError, match="tables"):
        cache.update(tokens.keys[0][:, :, :10], tokens.values[0][:, :, :10], 0)


def test_tables_used_before():
    cache, tokens = DeltaKVCache(tiny_model("llama")), make_tokens(10)
    for layer_idx in range(2):
        cache.layers[layer_idx].receive_tables(tokens.cos, tokens.sin)
        cache.update(tokens.keys[layer_idx], tokens.values[layer_idx], layer_idx)
    cache.layers[0].receive_tables(tokens.cos, tokens.sin)
    with pytest.raises(CacheStateError, match="tables"):
        cache.update(tokens.keys[0], tokens.values[0], 0)


def test_tables_are_used_up():
    """A second update without new tables may not take the ones of the first."""
    cache = DeltaKVCache(tiny_model("llama"))
    feed(cache, make_tokens(10), [10])
    with pytest.raises(CacheStateError, match="tables"):
        cache.update(make_tokens(10).keys[0], make_tokens(10).values[0], 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch(batch):
    model, cache = tiny_model("llama"), DeltaKVCache(tiny_model("llama"))
    model(prompt(2), past_key_values=cache)
    with pytest.raises(CacheStateError, match=f"2.*{batch}"):
        model(prompt(batch, 1), past_key_values=cache)


def test_tensors_that_require_grad():
    model = tiny_model("llama")
    with torch.enable_grad(), pytest.raises(CacheStateError, match="grad"):
        model(prompt(), past_key_values=DeltaKVCache(model))


def test_token_that_does_not_fill_bytes():
    """One head of 21 numbers makes 42 numbers a token: at 2 bits, ten bytes and a half."""
    cache = DeltaKVCache(tiny_model("llama"), nbits=2)
    part = torch.zeros(1, 1, 5, 21)
    cos, sin = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    cache.layers[0].receive_tables(cos, sin)
    with pytest.raises(InvalidOptionError, match="`nbits`.*42.*2"):
        cache.update(part, part, 0)


def test_too_many_references():
    """Their numbers are 16 bits wide: beyond that an error, never a wrapped number."""
    cache = DeltaKVCache(tiny_model("llama"), recent_window=0, num_sink_tokens=0, block_size=1, reference_stride=2)
    length = 2**17 + 1
    part = torch.zeros(1, 1, length, 2)
    cache.layers[0].receive_tables(torch.ones(1, length, 2), torch.zeros(1, length, 2))
    with pytest.raises(CacheStateError, match="65536.*reference_stride"):
        cache.update(part, part, 0)
