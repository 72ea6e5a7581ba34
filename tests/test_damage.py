"""Every metric of the evaluation notices a cache that was damaged: the same measurement as of a whole one."""

import pytest
import torch
from transformers import DynamicCache

from deltakv_hf.evaluation import measure_fidelity, pick_tasks, run_tasks
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.runner import FULL
from deltakv_hf.evaluation.texts import BUNDLED_TEXT
from deltakv_hf.evaluation.windows import text_windows

CONTEXT = 512


class Damaged(DynamicCache):
    """A full cache that spoils what it holds when it is first read."""

    def __init__(self, model, damage):
        super().__init__(config=model.config)
        self.damage = damage

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.damage is not None and layer_idx == 0 and self.get_seq_length():
            self.damage(self.layers)
            self.damage = None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def add_noise(layers):
    """A quarter of the spread of what is there."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for states in (layer.keys, layer.values):
            states += 0.25 * states.std() * torch.randn(states.shape, generator=generator)


def swap_layers(layers):
    """The tenth and the eleventh."""
    one, other = layers[10:12]
    one.keys, one.values, other.keys, other.values = other.keys, other.values, one.keys, one.values


def shift_positions(layers):
    """Keys stand one position further than they were read at."""
    width = layers[0].keys.shape[3]
    angles = THETA ** -(torch.arange(width) % (width // 2) * 2 / width)
    for layer in layers:
        low, high = layer.keys.chunk(2, dim=-1)
        layer.keys = layer.keys * angles.cos() + torch.cat([-high, low], dim=-1) * angles.sin()


def shift_values(layers):
    """A token's value is that of the token before it."""
    for layer in layers:
        layer.values = layer.values.roll(1, dims=2)


DAMAGES = [add_noise, swap_layers, shift_positions, shift_values]
THETA = 100_000  # of SmolLM2


@pytest.fixture(scope="module")
def loaded():
    return load_demo_model(torch.float32, "cpu")


@pytest.fixture(scope="module")
def makers(loaded):
    model = loaded[0]
    return {"whole": lambda: Damaged(model, None)} | {
        damage.__name__: lambda damage=damage: Damaged(model, damage) for damage in DAMAGES
    }


def test_fidelity_notices(loaded, makers):
    model, tokenizer = loaded
    windows = text_windows(tokenizer, BUNDLED_TEXT, CONTEXT + 128, 1)
    results = measure_fidelity(model, windows, makers, context=CONTEXT)
    whole = results.pop("whole")
    assert abs(whole.mean("kl")) < 1e-6 and whole.mean("top1") == 1 and abs(whole.nll_change) < 1e-6
    for damaged in results.values():
        assert damaged.mean("kl") > 3e-4 and damaged.mean("top1") < 1 and abs(damaged.nll_change) > 3e-4


def test_tasks_notice(loaded, makers):
    """By NLL all of it; answers break when a fact does, which a model's 10th layer or one position do not decide."""
    model, tokenizer = loaded
    results = run_tasks(model, tokenizer, pick_tasks(["niah4", "copy"]), [CONTEXT], [0], makers)
    for scores in (scores.summary() for scores in results if scores.cache not in (FULL, "whole")):
        assert scores["nll_change"] > 1e-3, scores["cache"]
        if scores["cache"] in ("add_noise", "shift_values"):
            assert scores["em_change"] < 0 and scores["lost"] > 0
    for full, whole in zip(*([s for s in results if s.cache == name] for name in (FULL, "whole")), strict=True):
        assert full.items == whole.items and full.mean("correct") > 0
