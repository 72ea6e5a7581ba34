"""What calibration sees of a model: tokens, gradients, what errors cost; and that the model is left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
import transformers as tf
from families import BY_NAME, FAMILIES
from helpers import prompt
from models import SMALL, build, new_model, tiny_model
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltakv_hf.calibration.capture import Observer
from deltakv_hf.calibration.statistics import collect
from deltakv_hf.calibration.workspace import Workspace

PREDICTED = 30
# beyond plain RoPE: part of a head, factor in the tables, layers without positions, one head, bias, norms, soft caps
SENSITIVE = ["llama", "llama-mqa", "phi3-partial", "glm4", "llama-yarn", "smollm3", "gpt2", "qwen2", "qwen3", "gemma3"]


def narrow_values():
    """Heads of values are narrower than those of keys."""
    if not hasattr(tf, "MiMoV2FlashConfig"):
        pytest.skip("this transformers has no family with narrow values")
    types = dict(layer_types=["full_attention"] * 2, mlp_layer_types=["dense"] * 2)
    return build(tf.MiMoV2FlashConfig(**SMALL, v_head_dim=6, **types), "eager")


MODELS = {name: lambda name=name: tiny_model(name) for name in SENSITIVE} | {"narrow values": narrow_values}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.grows and f.images is None], ids=lambda f: f.name)
def test_watching_does_not_change_what_is_watched(family):
    model, ids = family.model(), prompt(1, 30)[0]
    observer = Observer(model)
    cache = observer.read(ids[None])
    plain = DynamicCache(config=model.config)
    model(ids[None], past_key_values=plain)
    for layer_idx, tokens in cache.tokens.items():
        watched, layer = cache.layers[layer_idx], plain.layers[layer_idx]
        assert torch.equal(watched.keys, layer.keys) and torch.equal(watched.values, layer.values)
        assert tokens.shape == (1, 30, sum(observer.widths[layer_idx]))
        values = layer.values[0].transpose(0, 1).flatten(1)
        assert torch.equal(tokens[0, :, -values.shape[1] :], values)
    for gradients in observer.gradients(cache, ids[:5], 2, torch.Generator().manual_seed(0)):
        assert gradients.keys() == cache.tokens.keys()
        assert all(gradients[i].shape == tokens.shape[1:] for i, tokens in cache.tokens.items())


def test_gradients_are_those_of_unrotated_keys():
    """Against autograd through the host's own rotation."""
    for family in ("llama", "llama-yarn"):
        model, ids = tiny_model(family), prompt(1, 40)[0]
        observer = Observer(model)
        cache = observer.read(ids[None, :-10])
        (found,) = observer.gradients(cache, ids[-10:], 1, torch.Generator().manual_seed(3))
        leaves, plain = {}, DynamicCache(config=model.config)
        with torch.enable_grad():
            cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(30)[None])
            for layer_idx, tokens in cache.tokens.items():
                leaves[layer_idx] = tokens[0].clone().requires_grad_(True)
                parts = leaves[layer_idx].view(1, 30, 2, 2, 8).permute(2, 0, 3, 1, 4)
                keys, _ = apply_rotary_pos_emb(parts[0], parts[0], cos, sin)
                plain.update(keys, parts[1], layer_idx)
            likelihoods = model(ids[None, -10:], past_key_values=plain).logits[0].log_softmax(-1)
            answers = torch.multinomial(likelihoods.detach().exp(), 1, generator=torch.Generator().manual_seed(3))
            expected = torch.autograd.grad(likelihoods.gather(1, answers).sum() / 10**0.5, list(leaves.values()))
        for layer_idx, gradient in zip(leaves, expected, strict=True):
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(found[layer_idx], gradient, rtol=1e-3, atol=1e-5)


def noisy(observer, ids, layer_idx, part, noise):
    """Logits after a context whose `part` (0: un-rotated keys, 1: values) of a layer is off by `noise` [n, width]."""
    cache = observer.read(ids[None, :-PREDICTED])
    layer = cache.layers[layer_idx]
    name = ("keys", "values")[part]
    held = getattr(layer, name)
    error = noise.unflatten(1, (held.shape[1], -1)).contiguous()
    form = observer.forms[layer_idx]
    if part == 0 and form is not None:
        cos, sin = (table[0].unsqueeze(1) for table in cache.tables[layer_idx])
        turned = torch.empty_like(error)
        form.apply(error, cos, sin, turned)
        error = turned
    setattr(layer, name, held + error.transpose(0, 1)[None])
    return observer.model(ids[None, -PREDICTED:], past_key_values=cache).logits[0].log_softmax(-1)


@pytest.mark.parametrize("family", MODELS)
def test_sensitivity_tells_what_noise_costs(family):
    """KL(full || with noise of covariance S in N tokens) is N / 2 * trace(sensitivity S), for keys and for values."""
    model, ids = MODELS[family](), prompt(1, 90, seed=1)[0]
    observer, generator = Observer(model), torch.Generator().manual_seed(0)
    context = len(ids) - PREDICTED
    squares = {}
    for gradients in observer.gradients(observer.read(ids[None, :-PREDICTED]), ids[-PREDICTED:], 60, generator):
        for layer_idx, gradient in gradients.items():
            squares[layer_idx] = squares.get(layer_idx, 0) + gradient.T @ gradient / (60 * context)
    layer_idx = min(squares)
    full = model(ids[None]).logits[0, -PREDICTED:].log_softmax(-1)
    key_width = observer.widths[layer_idx][0]
    for part, own in enumerate((slice(0, key_width), slice(key_width, None))):
        metric = squares[layer_idx][own, own]
        width = len(metric)
        # correlated, as errors are; one direction alone would need many more draws
        root = torch.randn(width, width, generator=generator) * torch.rand(width, generator=generator).square()
        root /= (context / 2 * (metric @ root @ root.T).trace() / 1e-3).sqrt()
        kl = 0.0
        for _ in range(12):
            noise = torch.randn(context, width, generator=generator) @ root.T
            kl += torch.nn.functional.kl_div(
                noisy(observer, ids, layer_idx, part, noise), full, log_target=True, reduction="batchmean"
            ).item()
        assert 1 / 1.5 < kl / 12 / 1e-3 < 1.5, (part, kl / 12 / 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype):
    model, ids = new_model("llama").to(dtype), prompt(1, 60)[0]
    observer, exact = Observer(model), Observer(tiny_model("llama"))
    (found,), (expected,) = (
        o.gradients(o.read(ids[None, :-10]), ids[-10:], 1, torch.Generator().manual_seed(0)) for o in (observer, exact)
    )
    for layer_idx, gradient in found.items():
        assert gradient.dtype == torch.float32
        norms = gradient.norm(), expected[layer_idx].norm()
        assert norms[0] > 0 and 0.5 < norms[0] / norms[1] < 2


def test_gradients_that_half_precision_could_not_hold():
    """Those of a model that hardly attends and has small logits: they were scaled up, but down again in float16."""
    model, ids = new_model("llama"), prompt(1, 60)[0]
    model.lm_head.weight.mul_(0.01)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.001)
    model = model.half()
    exact = copy.deepcopy(model).float()
    (found,), (expected,) = (
        o.gradients(o.read(ids[None, :-10]), ids[-10:], 1, torch.Generator().manual_seed(0))
        for o in (Observer(model), Observer(exact))
    )
    for layer_idx, gradient in found.items():
        assert (gradient - expected[layer_idx]).norm() < 0.02 * expected[layer_idx].norm()


def test_large_numbers_are_kept_finite(tmp_path):
    workspace = Workspace(tmp_path, {})
    workspace.write_window(0, {1: torch.tensor([[1e6, -1e6, 3.0]])})
    assert workspace.read_window(0, 1, torch.device("cpu")).tolist() == [[65504.0, -65504.0, 3.0]]


def state_of(model):
    return {
        "flags": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "weights": [p.sum().item() for p in model.parameters()],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def test_a_reading_that_is_broken_off_leaves_gradients_off():
    """They were on between two draws."""
    observer, ids = Observer(tiny_model("llama")), prompt(1, 20)[0]
    draws = observer.gradients(observer.read(ids[None]), ids, 3, torch.Generator())
    next(draws)
    assert not torch.is_grad_enabled()


def test_collecting_leaves_nothing_on_the_model(tmp_path):
    model = new_model("llama")
    list(model.parameters())[0].requires_grad_(False)
    observer = Observer(model)
    before = state_of(model)
    collect(
        observer,
        prompt(2, 60),
        Workspace(tmp_path / "w", {}),
        predicted=20,
        sensitivity_windows=2,
        draws=2,
        num_sinks=4,
        num_splits=lambda *_: 1,
        seed=0,
        advance=lambda: None,
    )
    assert state_of(model) == before


def test_sensitivity_is_the_mean_square_of_gradients(tmp_path):
    """Of all tokens but sinks, draws and windows that are differentiated, in the parts of each group of heads."""
    observer, windows = Observer(tiny_model("llama")), prompt(3, 60)
    options = dict(sensitivity_windows=2, draws=2, num_sinks=4, num_splits=lambda *_: 2, seed=5)
    seen = collect(observer, windows, Workspace(tmp_path, {}), predicted=20, advance=lambda: None, **options)
    sums = 0
    for number in range(2):
        generator = torch.Generator().manual_seed(5 * 100_003 + number)
        cache = observer.read(windows[number : number + 1, :40])
        for drawn in observer.gradients(cache, windows[number, 40:], 2, generator):
            gradient = drawn[1][4:].double()
            sums = sums + gradient.T @ gradient
    of_groups = [[*range(0, 8), *range(16, 24)], [*range(8, 16), *range(24, 32)]]
    expected = torch.stack([sums[own][:, own] for own in of_groups]) / (2 * 2 * 36)
    torch.testing.assert_close(seen.sensitivity[1], expected, rtol=1e-4, atol=1e-6 * expected.max().item())
    assert seen.num_windows == 3 and seen.widths == {0: (16, 16), 1: (16, 16)}
    tokens = seen.workspace.read_window(2, 1, torch.device("cpu"))
    torch.testing.assert_close(tokens, observer.read(windows[2:, :40]).tokens[1][0, 4:], rtol=1e-3, atol=1e-4)


def test_families_are_known():
    assert set(SENSITIVE) <= BY_NAME.keys()
