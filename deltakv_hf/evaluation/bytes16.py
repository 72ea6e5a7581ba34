"""Bytes as a 16-bit model holds them, whatever dtype the predictions are compared in.

In 16 bits a model differs from itself by a KL of .001, so fidelity is measured in float32, where a dense cache is twice
as large and a code of four bits an eighth of it. Nobody stores that. So the cache reads as many tokens once more with a
copy of the model in bfloat16, and what it holds then is counted.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from .candidates import Candidate
from .prefill import Shares, prefill
from .presses import PressModel, measure_press_fidelity


class Bytes16:
    """Shares of a dense bfloat16 cache, each measured once for a cache and a length.

    Args:
        model: in any dtype; it is copied when the first share is asked for.
        ids: `[n]` int64, of which the first are read, and then all of them again.
        source: where another process finds the model; None if no press is measured.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor, source: str | None = None):
        self.model, self.ids, self.source, self._measured = model, ids, source, {}

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
            self._measured[key] = self._measure(candidate, num_tokens)
        held = self._measured[key]
        shares = {"stored_share_16bit": held.stored, "region": {"stored_share_16bit": "whole cache"}}
        if held.compressed:
            shares["compressed_share_16bit"] = held.compressed
            shares["region"]["compressed_share_16bit"] = "compressed tokens"
        return shares

    def _measure(self, candidate: Candidate, num_tokens: int) -> Shares:
        # a press is asked for predictions as well
        size = num_tokens + 2
        ids = self.ids.repeat(-(-size // len(self.ids)))[:size]
        if candidate.press is None:
            return prefill(self._half, ids[:num_tokens], candidate.make(self._half))
        model = replace(PressModel.like(self.model, self.source), dtype="bfloat16")
        found = measure_press_fidelity(model, [ids], {candidate.name: candidate.press}, context=num_tokens)
        return Shares(found[candidate.name].mean("stored_share"), 0.0)
