"""Scores of a cache in a task, each beside the full cache's on the same items."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from .intervals import paired_difference, wilson
from .items import Item
from .peers import copy_cache
from .prefill import Shares, feed_behind


@dataclass(frozen=True)
class ItemScore:
    """One item.

    Attributes:
        correct: whether every answer token is the most likely one (greedy decoding would give the answer).
        token_accuracy: share of answer tokens that are.
        nll: mean negative log likelihood of the answer tokens, nats.
    """

    correct: bool
    token_accuracy: float
    nll: float


@torch.no_grad()
def score_item(model: PreTrainedModel, cache: Cache, item: Item) -> ItemScore:
    """Asks an item on top of a copy of `cache`, which stays as it is; the answer is fed (teacher forcing).

    A copy rather than a crop: it is exact for every cache, windows and linear layers of the host included.
    """
    fed = torch.tensor(item.question + item.answer[:-1])
    logits = feed_behind(model, fed, copy_cache(cache), len(item.answer)).float()
    answer = torch.tensor(item.answer, device=model.device)
    hits = logits.argmax(-1) == answer
    nll = torch.nn.functional.cross_entropy(logits, answer)
    return ItemScore(bool(hits.all()), hits.float().mean().item(), nll.item())


@dataclass(frozen=True)
class TaskScores:
    """A cache in a task at one length.

    Attributes:
        task, num_tokens, cache: names of the task and the cache; most tokens of a context.
        seeds: of the contexts.
        contexts: scores of each context's items.
        full: those of the full cache.
        shares: bytes held after each context.
    """

    task: str
    num_tokens: int
    cache: str
    seeds: list[int]
    contexts: list[list[ItemScore]]
    full: list[list[ItemScore]]
    shares: list[Shares]

    @property
    def items(self) -> list[ItemScore]:
        """The items of all contexts."""
        return [item for context in self.contexts for item in context]

    def mean(self, name: str) -> float:
        """Averages over the items.

        Args:
            name: of a field of `ItemScore`.

        Returns:
            The mean, in the unit of the field.
        """
        return _mean([getattr(item, name) for item in self.items])

    @property
    def em_interval(self) -> tuple[float, float]:
        """95 % interval of `mean("correct")`."""
        return wilson(sum(item.correct for item in self.items), len(self.items))

    @property
    def em_change(self) -> float:
        """`mean("correct")` minus the full cache's."""
        return self.mean("correct") - _mean([item.correct for context in self.full for item in context])

    @property
    def em_change_interval(self) -> tuple[float, float]:
        """Its 95 % interval, of paired items: within noise if 0 is in it."""
        full = [item.correct for context in self.full for item in context]
        return paired_difference(full, [item.correct for item in self.items])

    @property
    def nll_changes(self) -> list[float]:
        """Mean of `nll` minus the full cache's, nats, of each context."""
        pairs = zip(self.contexts, self.full, strict=True)
        return [_mean([item.nll for item in own]) - _mean([item.nll for item in full]) for own, full in pairs]

    def summary(self) -> dict:
        """All figures, for JSON.

        Returns:
            Figures by name; `*_se` is a standard error over contexts.
        """
        full = [item for context in self.full for item in context]
        pairs = list(zip(full, self.items, strict=True))
        return {
            "task": self.task,
            "length": self.num_tokens,
            "cache": self.cache,
            "contexts": len(self.contexts),
            "items": len(pairs),
            "em": self.mean("correct"),
            "em_interval": self.em_interval,
            "em_change": self.em_change,
            "em_change_interval": self.em_change_interval,
            "lost": sum(before.correct and not after.correct for before, after in pairs),
            "gained": sum(after.correct and not before.correct for before, after in pairs),
            "token_accuracy": self.mean("token_accuracy"),
            "nll": self.mean("nll"),
            "nll_change": _mean(self.nll_changes),
            "nll_change_se": _standard_error(self.nll_changes),
            "stored_share": _mean([shares.stored for shares in self.shares]),
            "compressed_share": _mean([shares.compressed for shares in self.shares]),
            "compressor_bytes": _mean([shares.compressor_bytes for shares in self.shares]),
            "break_even_tokens": _mean([shares.break_even_tokens for shares in self.shares]),
            "per_item": [
                {"seed": seed, "item": number} | vars(item)
                for seed, context in zip(self.seeds, self.contexts, strict=True)
                for number, item in enumerate(context)
            ],
        }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _standard_error(values: list[float]) -> float:
    """Of the mean; 0 for one value."""
    if len(values) == 1:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
