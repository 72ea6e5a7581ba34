"""The kinds of caches that must pass the host's contract, and how they are looked at through a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from helpers import LOSSLESS, TIGHT, prompt
from transformers import Cache, PreTrainedModel

from deltakv_hf import DeltaKVCache


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        make: function from a model to an empty cache.
        lossless: whether what is read back is what was stored.
    """

    make: Callable[[PreTrainedModel], Cache]
    lossless: bool


KINDS = {
    "lossless": Kind(lambda model: DeltaKVCache(model, **LOSSLESS), lossless=True),
    "lossy": Kind(lambda model: DeltaKVCache(model, **TIGHT), lossless=False),
}
# full attention, and every other layer with a sliding window of 16
FAMILIES = ["llama", "gemma3"]


def full_inputs(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ids and a mask as long as they are: `generate` then leaves out what the cache has seen."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def after_prompt(kind: Kind, model: PreTrainedModel, batch: int = 1) -> Cache:
    """A cache that has seen a prompt of 48 tokens."""
    cache = kind.make(model)
    model(prompt(batch), past_key_values=cache)
    return cache


def next_logits(model: PreTrainedModel, cache: Cache, rows: int = 1) -> torch.Tensor:
    """Logits of three more tokens, alike in every row: what the cache's content does to the model."""
    return model(prompt(1, 3, seed=7).expand(rows, -1), past_key_values=cache).logits
