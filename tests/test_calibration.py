"""Calibration: what is captured, what errors cost, how bytes are allotted, whole runs on tiny models."""

import pytest
import torch
from helpers import prompt
from models import tiny_model
from transformers import DynamicCache

from deltakv_hf.calibration.capture import Observer


@pytest.mark.parametrize("family", ["llama", "llama-mqa", "gemma3", "smollm3", "phi3-partial", "cohere", "llama-yarn"])
def test_watching_does_not_change_what_is_watched(family):
    model, ids = tiny_model(family), prompt(1, 30)[0]
    observer = Observer(model)
    cache = observer.read(ids)
    plain = DynamicCache(config=model.config)
    model(ids[None], past_key_values=plain)
    for watched, layer in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(watched.keys, layer.keys) and torch.equal(watched.values, layer.values)
    for layer_idx, tokens in cache.tokens.items():
        assert tokens.shape == (30, sum(observer.widths[layer_idx]))
        values = plain.layers[layer_idx].values[0].transpose(0, 1).flatten(1)
        assert torch.equal(tokens[:, -values.shape[1] :], values)
