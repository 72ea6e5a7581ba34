"""Bytes as a 16-bit model holds them, whatever dtype the predictions are compared in.

In 16 bits a model differs from itself by a KL of .001, so fidelity is measured in float32, where a dense cache is twice
as large and a code of four bits an eighth of it. Nobody stores that. So the cache reads as many tokens once more with a
copy of the model in bfloat16, and what it holds then is counted.
"""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from transformers import PreTrainedModel

from .candidates import Candidate
from .prefill import prefill


class Bytes16:
    """Shares of a dense bfloat16 cache, each measured once for a cache and a length.

    Args:
        model: in any dtype; it is copied when the first share is asked for.
        ids: `[n]` int64, of which the first are read, and then all of them again.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor):
        self.model, self.ids, self._measured = model, ids, {}

    @cached_property
    def _half(self) -> PreTrainedModel:
        if self.model.dtype == torch.bfloat16:
            return self.model
        return copy.deepcopy(self.model).to(torch.bfloat16)

    def shares(self, candidate: Candidate, num_tokens: int) -> dict:
        """Measures the shares after `num_tokens` tokens.

        Returns:
            `stored_share_16bit` of the whole cache, `compressed_share_16bit` of its compressed tokens alone where it
            tells them apart, and `region`: which is which.
        """
        key = candidate.name, num_tokens
        if key not in self._measured:
            ids = self.ids.repeat(-(-num_tokens // len(self.ids)))[:num_tokens]
            self._measured[key] = prefill(self._half, ids, candidate.make(self._half))
        held = self._measured[key]
        shares = {"stored_share_16bit": held.stored, "region": {"stored_share_16bit": "whole cache"}}
        if held.compressed:
            shares["compressed_share_16bit"] = held.compressed
            shares["region"]["compressed_share_16bit"] = "compressed tokens"
        return shares
