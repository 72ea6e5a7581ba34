"""With everything inside sinks and window the cache is a `DynamicCache`; with compression on it stays near one."""

import pytest
import torch
from helpers import LOSSLESS, TIGHT, full_cache, greedy, left_padded, prompt, teacher_forced
from models import CONFIGS, new_model, tiny_model

from deltakv_hf import DeltaKVCache
from deltakv_hf.attach import attach

NO_SDPA = {"gemma2", "gpt_oss"}
FAMILIES = [name for name in CONFIGS if name not in ("llama-mha", "llama-mqa", "llama-4-layers")]
CELLS = [
    (name, kind) for name in CONFIGS for kind in ("sdpa", "eager") if (name, kind) not in {(n, "sdpa") for n in NO_SDPA}
]
# layers that keep no more than a window of tokens leave nothing to compress
NEVER_COMPRESSED = {"mistral-sliding"}

HALF, PAIRS = ("half", "halves"), ("interleaved", "pairs")
FORMS = {
    "llama": [HALF, HALF],
    "llama-yarn": [HALF, HALF],
    "qwen3": [HALF, HALF],
    "gemma3": [HALF, HALF],
    "phi3": [HALF, HALF],
    "phi3-partial": [HALF, HALF],
    "phi": [HALF, HALF],
    "stablelm": [HALF, HALF],
    "smollm3": [HALF, "none"],
    "gpt_oss": [("half", "single"), ("half", "single")],
    "cohere": [PAIRS, PAIRS],
    "cohere2": [PAIRS, "none"],
    "glm4": [("interleaved", "halves")] * 2,
    "gpt2": ["opaque", "opaque"],
}


def model_of(family):
    return tiny_model(family, "eager" if family in NO_SDPA else "sdpa")


def relative_error(got, expected):
    """Of the middle token: of a mixture of experts, one token may be routed elsewhere."""
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median()


@pytest.mark.parametrize("family, attention", CELLS)
def test_lossless_generation_is_identical(family, attention):
    model = tiny_model(family, attention)
    expected = greedy(model, prompt(), full_cache(model))
    assert torch.equal(greedy(model, prompt(), DeltaKVCache(model, **LOSSLESS)), expected)


@pytest.mark.parametrize("family, attention", CELLS)
def test_lossless_logits_are_bit_identical(family, attention):
    """Prompt, single tokens and short calls; without padding nothing is reordered, so nothing may be rounded."""
    model = tiny_model(family, attention)
    expected = teacher_forced(model, prompt(2), full_cache(model), 24, chunk=3)
    assert torch.equal(teacher_forced(model, prompt(2), DeltaKVCache(model, **LOSSLESS), 24, chunk=3), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [LOSSLESS, TIGHT], ids=["lossless", "compressed"])
def test_prefill_logits_are_bit_identical(family, options):
    model = model_of(family)
    expected = model(prompt(2), past_key_values=full_cache(model)).logits
    assert torch.equal(model(prompt(2), past_key_values=DeltaKVCache(model, **options)).logits, expected)


@pytest.mark.parametrize("family, attention", CELLS)
@pytest.mark.parametrize("lengths", [[40, 33, 40], [6, 9, 4]], ids=["long", "within-a-block"])
def test_lossless_left_padded_generation_is_identical(family, attention, lengths):
    model = tiny_model(family, attention)
    inputs = left_padded(lengths)
    expected = greedy(model, inputs, full_cache(model))
    assert torch.equal(greedy(model, inputs, DeltaKVCache(model, **LOSSLESS)), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [LOSSLESS, TIGHT], ids=["lossless", "compressed"])
def test_left_padded_prefill_logits_are_bit_identical(family, options):
    model = model_of(family)
    inputs = left_padded([40, 33, 21])
    expected = model(**inputs, past_key_values=full_cache(model)).logits
    assert torch.equal(model(**inputs, past_key_values=DeltaKVCache(model, **options)).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_compression_stores_less_than_dense(family):
    model = model_of(family)
    cache = DeltaKVCache(model, **TIGHT)
    tokens = greedy(model, prompt(2, 60), cache, max_new_tokens=20)
    report = cache.memory_report()
    assert tokens.shape[1] == 80 and cache.get_seq_length() == 79
    if family not in NEVER_COMPRESSED:
        assert report.compressed_tokens > 0 and report.stored_bytes < report.dense_bytes


@pytest.mark.parametrize("stride", [1, 3, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_logits_are_near_dense(family, stride):
    """Also the proof that keys are rotated back to the right place: a wrong position moves logits by their own size."""
    model = model_of(family)
    options = TIGHT | {"reference_stride": stride, "nbits": 8}
    expected = teacher_forced(model, prompt(2, 72), full_cache(model), 60, chunk=1)[:, 60:]
    got = teacher_forced(model, prompt(2, 72), DeltaKVCache(model, **options), 60, chunk=1)[:, 60:]
    assert relative_error(got, expected) < 0.03
    if family not in NEVER_COMPRESSED:
        assert relative_error(got, expected) > 0, "nothing was compressed"


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_logits_are_near_dense_with_left_padding(family):
    model = model_of(family)
    mask = torch.ones(2, 72, dtype=torch.long)
    mask[0, :13] = 0
    inputs = {"attention_mask": mask}
    expected = teacher_forced(model, prompt(2, 72), full_cache(model), 60, **inputs)[:, 60:]
    got = teacher_forced(model, prompt(2, 72), DeltaKVCache(model, **TIGHT, nbits=8), 60, **inputs)[:, 60:]
    assert relative_error(got, expected) < 0.03


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
def test_padding_does_not_change_a_row(family):
    """A left-padded row gives the logits of the row run alone (to 1e-3: padding alone moves hidden states)."""
    model = model_of(family)
    ids, mask = prompt(2, 64), torch.ones(2, 64, dtype=torch.long)
    mask[0, :13] = 0
    together = teacher_forced(model, ids, DeltaKVCache(model, **TIGHT, nbits=8), 50, attention_mask=mask)[:1, 50:]
    alone = teacher_forced(model, ids[:1, 13:], DeltaKVCache(model, **TIGHT, nbits=8), 37)[:, 37:]
    assert (together - alone).abs().max() < 1e-3 * max(1, alone.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4", "phi3-partial", "smollm3"])
def test_half_precision_lossless_generation_is_identical(family, dtype):
    model = new_model(family).to(dtype)
    inputs = left_padded([40, 33])
    expected = greedy(model, inputs, full_cache(model))
    assert torch.equal(greedy(model, inputs, DeltaKVCache(model, **LOSSLESS)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "glm4", "phi3-partial", "smollm3"])
def test_half_precision_rope_form_is_found(family, dtype):
    probes = attach(new_model(family).to(dtype))
    assert {i: (p.kind, p.form) for i, p in probes.items()} == {
        i: (p.kind, p.form) for i, p in attach(tiny_model(family)).items()
    }


@pytest.mark.parametrize("family", FORMS)
def test_rope_form_is_found(family):
    probes = attach(model_of(family))
    found = [probes[i] for i in range(2)]
    assert [(p.form.pairing, p.form.table) if p.kind == "rope" else p.kind for p in found] == FORMS[family]


def test_norm_after_rotation_is_opaque():
    """Hunyuan normalises keys after rotation: with a trained weight that cannot be un-rotated."""
    model = new_model("hunyuan")
    for layer in model.model.layers:
        layer.self_attn.key_layernorm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    assert [probe.kind for probe in attach(model).values()] == ["opaque", "opaque"]
    expected = teacher_forced(model, prompt(2, 72), full_cache(model), 60)[:, 60:]
    got = teacher_forced(model, prompt(2, 72), DeltaKVCache(model, **TIGHT, nbits=8), 60)[:, 60:]
    assert relative_error(got, expected) < 0.03


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
@pytest.mark.parametrize("sampling", [{"num_return_sequences": 3}, {}], ids=["3-sequences", "1-sequence"])
def test_lossless_sampling_is_identical(family, sampling):
    model = model_of(family)
    outputs = []
    for cache in (full_cache(model), DeltaKVCache(model, **LOSSLESS)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            outputs.append(greedy(model, prompt(), cache, do_sample=True, **sampling))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "mistral-sliding"])
def test_chunked_prefill_is_lossless_identical(family):
    model = model_of(family)
    expected = greedy(model, prompt(2), full_cache(model), prefill_chunk_size=10)
    got = greedy(model, prompt(2), DeltaKVCache(model, **LOSSLESS), prefill_chunk_size=10)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
@pytest.mark.parametrize("options", [LOSSLESS, TIGHT], ids=["lossless", "compressed"])
def test_second_turn_with_full_ids_continues(family, options):
    """Multi-turn: the ids of the first turn come again and are not run again."""
    model = model_of(family)
    outputs = []
    for cache in (full_cache(model), DeltaKVCache(model, **options)):
        first = greedy(model, prompt(), cache)
        second = torch.cat([first, prompt(1, 9, seed=5)], dim=1)
        outputs.append(greedy(model, {"input_ids": second, "attention_mask": torch.ones_like(second)}, cache))
        assert cache.get_seq_length() == outputs[-1].shape[1] - 1
    if options is LOSSLESS:
        assert torch.equal(*outputs)


@pytest.mark.parametrize("config_of", ["llama", "qwen3", "mistral", "olmo2", "granite", "llama-yarn"])
def test_bare_config_is_as_good_as_the_model(config_of):
    hooked, plain = tiny_model(config_of), new_model(config_of)
    expected = teacher_forced(hooked, prompt(1, 72), DeltaKVCache(hooked, **TIGHT), 60)
    got = teacher_forced(plain, prompt(1, 72), DeltaKVCache(plain.config, **TIGHT), 60)
    assert torch.equal(got, expected)
