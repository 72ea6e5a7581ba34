"""The kinds of caches that must be right everywhere. A new cache class, or a new storage, is one more line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from compressors import TIGHT_WINDOW, compressor_of, learned_compressor
from helpers import LOSSLESS, TIGHT, prompt
from transformers import Cache, PreTrainedModel

from deltakv_hf import DeltaKVCache, JointEncodedCache


@dataclass(frozen=True)
class Kind:
    """A way to make a cache.

    Attributes:
        name: of the kind.
        make: function `model -> cache`.
        lossless: whether it must say what `DynamicCache` says, bit for bit; if not, it must hold compressed tokens
            after the prompt of a test, and is compared with itself in other modes.
        shares: whether a row reads what the model made of another one, which a batched product may have rounded
            otherwise.
        max_length: columns that there is room for; -1: any number.
    """

    name: str
    make: Callable[[PreTrainedModel], Cache]
    lossless: bool
    shares: bool = False
    max_length: int = -1

    def check_same(self, got: torch.Tensor, expected: torch.Tensor) -> None:
        """Raises unless a lossless cache says what is expected: ids, or logits."""
        if self.shares and got.is_floating_point():
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, expected)

    def check_active(self, cache: Cache) -> None:
        """Raises unless the cache compresses."""
        report = cache.memory_report()
        assert report.compressed_tokens > 0, "nothing was compressed"
        if self.max_length > 0:
            # its room is held whether it is used or not
            return
        # beside tokens of a few numbers what was fed takes more than in any real model
        stored = report.compressed_share if isinstance(cache, JointEncodedCache) else report.ratio
        assert stored < 1, f"stored {stored:.0%}"


KINDS = [
    Kind("lossless", lambda model: DeltaKVCache(model, **LOSSLESS), lossless=True),
    Kind("joint", lambda model: JointEncodedCache(model, block_size=4), lossless=True, shares=True),
    Kind(
        "coded", lambda model: JointEncodedCache(model, residual=compressor_of(model), **TIGHT_WINDOW), lossless=False
    ),
    Kind("compressed", lambda model: DeltaKVCache(model, **TIGHT), lossless=False),
    Kind("calibrated", lambda model: DeltaKVCache(model, compressor=compressor_of(model), **TIGHT_WINDOW), False),
    Kind(
        "static",
        lambda model: DeltaKVCache(model, compressor=compressor_of(model), max_cache_len=256, **TIGHT_WINDOW),
        lossless=False,
        max_length=256,
    ),
    Kind(
        "learned",
        lambda model: DeltaKVCache(model, compressor=compressor_of(model, learned_compressor), **TIGHT_WINDOW),
        False,
    ),
]
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
