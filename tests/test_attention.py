"""The attention `deltakv`: the host's own for all but a step of our caches, which it answers without dense numbers."""

import copy

import pytest
import torch
from compressors import TIGHT_WINDOW, compressor_of
from families import BY_NAME
from helpers import greedy, left_padded, prompt, teacher_forced
from models import new_model, tiny_model
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache
from deltakv_hf.reading import StateReader

# soft caps and attention sinks are beyond `scaled_dot_product_attention`: there the host's eager attention is right
FAMILIES = {"llama": "sdpa", "qwen3": "sdpa", "mistral-sliding": "sdpa", "gemma3": "sdpa", "gemma2": "eager"}
FAMILIES |= {"gpt_oss": "eager", "phi3-partial": "sdpa", "granite": "sdpa"}


def pair(family):
    """The model with the attention that is right for it, and with ours."""
    theirs = copy.deepcopy(BY_NAME[family].model())
    theirs.set_attn_implementation(FAMILIES[family])
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("deltakv")
    return theirs, ours


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_our_cache_it_is_the_hosts(family, padded):
    theirs, ours = pair(family)
    inputs = left_padded([30, 17]) if padded else {"input_ids": prompt(2, 30)}
    assert torch.equal(theirs(**inputs).logits, ours(**inputs).logits)
    assert torch.equal(greedy(theirs, inputs, DynamicCache(config=theirs.config)), greedy(ours, inputs, None))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_are_the_hosts(family):
    gradients = []
    for model in pair(family):
        model.train()
        with torch.enable_grad():
            model(prompt(2, 20), labels=prompt(2, 20), use_cache=False).loss.backward()
        gradients.append([part.grad for part in model.parameters() if part.grad is not None])
    assert gradients[0] and all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_our_cache_gives_what_it_gives_without(family, padded):
    theirs, ours = pair(family)
    inputs = left_padded([60, 37]) if padded else {"input_ids": prompt(2, 60)}
    logits = []
    for model in (theirs, ours):
        cache = DeltaKVCache(model, compressor=compressor_of(BY_NAME[family].model()), **TIGHT_WINDOW)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        model(**inputs, past_key_values=cache)
        assert cache.memory_report().compressed_tokens > 0 or not cache.own_layers
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        logits.append(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_lossless_tokens_are_those_of_the_full_cache():
    theirs, ours = pair("llama")
    inputs = left_padded([50, 33])
    assert torch.equal(greedy(theirs, inputs, None, 20), greedy(ours, inputs, DeltaKVCache(ours), 20))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_a_step_with_groups_of_heads_never_decodes(monkeypatch, padded):
    """Also where the host repeats keys and values for `scaled_dot_product_attention`."""
    model = new_model("llama")
    model.set_attn_implementation("deltakv")
    cache = DeltaKVCache(model, compressor=compressor_of(tiny_model("llama")), **TIGHT_WINDOW)
    inputs = left_padded([60, 37]) if padded else {"input_ids": prompt(2, 60)}
    model(**inputs, past_key_values=cache)

    def never(self):
        raise AssertionError("a step was decoded")

    monkeypatch.setattr(StateReader, "decode", never)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1) if padded else None
    model(prompt(2, 1), attention_mask=mask, past_key_values=cache)


def test_chunks_of_a_prompt_are_exact_enough():
    theirs, ours = pair("llama")
    ids = prompt(1, 70)
    logits = []
    for model in (theirs, ours):
        cache = DeltaKVCache(model, compressor=compressor_of(tiny_model("llama")), **TIGHT_WINDOW)
        logits.append(teacher_forced(model, ids, cache, 30, 7))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
