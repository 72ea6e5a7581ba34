"""Models inside something else: adapters, quantised weights, compilers, weights that live on the disk."""

import copy
import functools

import accelerate
import pytest
import torch
from helpers import LOSSLESS, TIGHT, full_cache, greedy, left_padded, prompt, teacher_forced
from models import CONFIGS, build, new_model, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltakv_hf import CacheStateError, DeltaKVCache, set_default_cache
from deltakv_hf.attach import attach, unwrap

FAMILIES = ["llama", "gemma3", "smollm3"]
PADDED = left_padded([48, 31])


@functools.cache
def expected(family, **options):
    """What the plain model says with a cache of these options."""
    model = tiny_model(family)
    return greedy(model, PADDED, DeltaKVCache(model, **options) if options else full_cache(model))


def check(model, family) -> None:
    """`model` says what the plain model of the family says, with either kind of cache."""
    assert torch.equal(greedy(model, PADDED, DeltaKVCache(model, **LOSSLESS)), expected(family))
    cache = DeltaKVCache(model, **TIGHT)
    assert torch.equal(greedy(model, PADDED, cache), expected(family, **TIGHT))
    assert cache.memory_report().compressed_tokens > 0


def check_itself(model) -> None:
    """`model`, which is like no other, says the same with a lossless cache as with the host's."""
    wanted = greedy(model, PADDED, full_cache(unwrap(model)))
    assert torch.equal(greedy(model, PADDED, DeltaKVCache(model, **LOSSLESS)), wanted)
    cache = DeltaKVCache(model, **TIGHT, nbits=8)
    ids = prompt(2, 72)
    got = teacher_forced(model, ids, cache, 60)[:, 60:]
    wanted = teacher_forced(model, ids, full_cache(unwrap(model)), 60)[:, 60:]
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.05
    assert cache.memory_report().compressed_tokens > 0 and not torch.equal(got, wanted)


# -- accelerate --------------------------------------------------------------------------------------------------------

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
SPLITS = {
    "last-layers-on-disk": ["cpu", "cpu", "disk", "cpu", "cpu", "disk"],
    "first-layers-on-disk": ["disk", "disk", "cpu", "disk", "cpu", "cpu"],
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk", *SPLITS])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_wait_elsewhere(family, where, when, tmp_path):
    """The parameters are on `meta` between forwards, the embedding included; the cache is made before or after."""
    model = new_model(family)
    if when == "before":
        DeltaKVCache(model)
    if where in SPLITS:
        split = dict(zip(PARTS, SPLITS[where], strict=True))
        accelerate.dispatch_model(model, split, main_device="cpu", offload_dir=tmp_path)
    elif where == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    check(model, family)


def test_a_device_map_of_from_pretrained(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    split = dict(zip(PARTS, SPLITS["first-layers-on-disk"], strict=True))
    options = dict(device_map=split, offload_folder=tmp_path / "offloaded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert model.get_input_embeddings().weight.device.type == "meta"
    check(model, "llama")


# -- compilers ---------------------------------------------------------------------------------------------------------


# one layer, one short row, few calls: a compiler works for seconds on each new shape
SHORT = prompt(1, 24)


def one_layer():
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 1
    return build(config)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters["frames"].clear()
    yield
    torch._dynamo.reset()


def compile_forward(model, backend="eager"):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compile_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled, options", [(compile_forward, TIGHT), (compile_in_place, LOSSLESS)], ids=["forward", "in-place"]
)
def test_compiled(compiled, options, fresh_compiler):
    plain = one_layer()
    wanted = greedy(plain, SHORT, DeltaKVCache(plain, **options), max_new_tokens=3)
    model = compiled(one_layer())
    assert torch.equal(greedy(model, SHORT, DeltaKVCache(model, **options), max_new_tokens=3), wanted)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"


def test_a_compiled_wrapper(fresh_compiler):
    """Its `generate` runs the model inside; a call of the wrapper itself runs what was compiled."""
    plain, ids = one_layer(), SHORT
    compiled = torch.compile(one_layer(), backend="eager")
    wanted = greedy(plain, ids, DeltaKVCache(plain, **LOSSLESS))
    assert torch.equal(greedy(compiled, ids, DeltaKVCache(compiled, **LOSSLESS)), wanted)
    got = teacher_forced(compiled, ids, DeltaKVCache(compiled, **LOSSLESS), 22)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    wanted = teacher_forced(plain, ids, DeltaKVCache(plain, **LOSSLESS), 22)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_to_machine_code(fresh_compiler):
    plain, model = one_layer(), compile_forward(one_layer(), "inductor")
    wanted = greedy(plain, SHORT, full_cache(plain), max_new_tokens=3)
    try:
        greedy(model, SHORT, full_cache(plain), max_new_tokens=3)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"the compiler cannot do the host's own cache: {str(error)[:80]}")
    torch._dynamo.reset()
    assert torch.equal(greedy(model, SHORT, DeltaKVCache(model, **LOSSLESS), max_new_tokens=3), wanted)


# -- adapters ----------------------------------------------------------------------------------------------------------


def adapted(family, **options):
    """A model with a LoRA adapter that says something else than without."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(new_model(family), config, adapter_name="first").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter(family):
    model = adapted(family)
    check_itself(model)
    logits = [m(**PADDED, past_key_values=DeltaKVCache(m)).logits for m in (model, tiny_model(family))]
    assert (logits[0] - logits[1]).abs().max() > 0.1, "the adapter does nothing"


def test_an_adapter_on_a_model_that_knows_us():
    """The hooks and what was learnt stay with the attention modules, whose projections the adapter wraps."""
    peft = pytest.importorskip("peft")
    base = new_model("llama")
    cache = DeltaKVCache(base, **TIGHT)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False)).eval()
    assert greedy(model, PADDED, cache).shape == (2, 60)
    check_itself(model)


def test_an_adapter_that_is_switched_off_and_merged():
    model = adapted("llama")
    with model.disable_adapter():
        check(model, "llama")
    wanted = greedy(model, PADDED, DeltaKVCache(model, **LOSSLESS))
    merged = model.merge_and_unload()
    assert torch.equal(greedy(merged, PADDED, DeltaKVCache(merged, **LOSSLESS)), wanted)


def test_an_adapter_that_was_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted("llama")
    wanted = greedy(model, PADDED, DeltaKVCache(model, **TIGHT))
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(new_model("llama"), tmp_path / "first").eval()
    assert torch.equal(greedy(other, PADDED, DeltaKVCache(other, **TIGHT)), wanted)


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_an_adapted_model_has_a_default_cache(through):
    model, caches = adapted("llama"), []
    wanted = greedy(model, PADDED, DeltaKVCache(model, **TIGHT))

    def factory(model):
        caches.append(DeltaKVCache(model, **TIGHT))
        return caches[-1]

    set_default_cache(model if through == "wrapper" else model.base_model.model, factory)
    assert torch.equal(greedy(model, PADDED, None), wanted) and len(caches) == 1
    set_default_cache(model, None)
    greedy(model, PADDED, None)
    assert len(caches) == 1


def test_a_copy_of_an_adapted_model():
    model = adapted("llama")
    wanted = greedy(model, PADDED, DeltaKVCache(model, **TIGHT))
    other = copy.deepcopy(model)
    assert torch.equal(greedy(other, PADDED, DeltaKVCache(other, **TIGHT)), wanted)
    with pytest.raises(CacheStateError, match="model"):
        greedy(other, PADDED, DeltaKVCache(model, **TIGHT))


# -- quantised weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_bitsandbytes(family, bits, tmp_path):
    """Real 4-bit and 8-bit layers on a CPU; a row of weights must fill blocks of 64, so the model is a little wider."""
    pytest.importorskip("bitsandbytes")
    plain_config = CONFIGS[family]()
    plain_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    plain = build(plain_config)
    plain.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    assert {type(module).__name__ for module in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    check_itself(model)
    wanted = [(probe.kind, probe.form) for probe in attach(plain).values()]
    assert [(probe.kind, probe.form) for probe in attach(model).values()] == wanted
