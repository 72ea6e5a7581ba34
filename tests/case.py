"""One run of a mode: a family with one way to make its caches, and what its results are compared by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from families import Family
from transformers import Cache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

# more than a block, so that decoding itself compresses
NEW = 6
BATCH = [48, 48]
RAGGED = [48, 31, 40]
Tensors = tuple[torch.Tensor, ...]


@dataclass
class Case:
    """One family with one way to make its caches, which are kept for a look at what they hold."""

    family: Family
    make: Callable
    attention: str | None = None
    dtype: torch.dtype = torch.float32
    caches: list[Cache] = field(default_factory=list)

    @property
    def model(self):
        return self.family.model(self.attention, self.dtype)

    def cache(self) -> Cache:
        """A new cache."""
        self.caches.append(self.make(self.model))
        return self.caches[-1]

    def generate(self, inputs: dict, cache: Cache | None = None, **options):
        """`model.generate` with a new cache unless one is given; the dict of its results."""
        cache = self.cache() if cache is None else cache
        return self.generate_without(inputs, past_key_values=cache, **options)

    def generate_without(self, inputs: dict, **options):
        """`model.generate` that is given no cache."""
        fixed = dict(pad_token_id=0, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True)
        return self.model.generate(**inputs, **fixed | {"do_sample": False} | options)

    def inputs(self, lengths: list[int] | None = None, **options) -> dict:
        """Prompts, their floating-point parts in the model's dtype."""
        given = self.family.inputs(lengths, **options)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in given.items()}

    def forced(self, inputs: dict, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits `[batch, new, vocabulary]` of greedy decoding that must say `tokens` `[batch, new]`."""
        out = self.generate(inputs, cache, logits_processor=[Forced(tokens, inputs["input_ids"].shape[1])])
        return logits_of(out)


class Forced(LogitsProcessor):
    """Lets nothing but given tokens be chosen."""

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        token = self.tokens[:, input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class Listener(BaseStreamer):
    """Keeps what was streamed."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def logits_of(out) -> torch.Tensor:
    return torch.stack(out.logits, dim=1)


def new_tokens(out) -> torch.Tensor:
    return out.sequences[:, -NEW:]


def said(out) -> Tensors:
    return out.sequences, logits_of(out)


def errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative error of each token's logits."""
    return (got - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Logits agree: in the median, because one token of a mixture of experts may be routed elsewhere."""
    error = errors(got, expected).median()
    assert error <= ROUNDED, f"relative error {error:.2g} > {ROUNDED}"


# the same numbers but for the order of float sums; a key that stands on the edge of two codes may fall to either side
ROUNDED = 1e-2
