"""Scores of a benchmark by dataset and cache, each beside the full cache's on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..intervals import bootstrap_difference
from ..runner import FULL
from .runner import ItemResult


@dataclass(frozen=True)
class DatasetScore:
    """A cache in a dataset. Scores are 0 to 1; of an item with several questions the mean counts.

    Attributes:
        dataset, cache: their names.
        scores: of the items.
        full: those of the full cache.
        results: of the items.
    """

    dataset: str
    cache: str
    scores: list[float]
    full: list[float]
    results: list[ItemResult]

    @property
    def score(self) -> float:
        """The mean."""
        return _mean(self.scores)

    @property
    def change(self) -> float:
        """The mean minus the full cache's."""
        return self.score - _mean(self.full)

    @property
    def change_interval(self) -> tuple[float, float]:
        """Its 95 % interval, of paired items drawn again (bootstrap)."""
        return bootstrap_difference(self.full, self.scores)

    def share(self, name: str) -> float:
        """Mean of a field of `ItemResult` over the items where it is not 0: short prompts have nothing compressed."""
        return _mean([value for result in self.results if (value := getattr(result, name))] or [0.0])

    def summary(self) -> dict:
        """All of it by name, for JSON."""
        names = "stored_share", "compressed_share", "compressor_bytes", "break_even_tokens"
        own = {} if self.cache == FULL else {"change": self.change, "change_interval": self.change_interval}
        found = {"dataset": self.dataset, "cache": self.cache, "items": len(self.scores), "score": self.score}
        return found | own | {name: self.share(name) for name in names}


def summarize(results: Sequence[ItemResult]) -> list[DatasetScore]:
    """Scores by dataset, then cache, of results that hold the full cache's of every item.

    Items whose questions belong to different datasets count for each of them.
    """
    found: dict[tuple[str, str], dict[tuple, list[float]]] = {}
    items = {result.key: result for result in results}
    for result in results:
        for turn in result.turns:
            scores = found.setdefault((turn["dataset"], result.cache), {})
            scores.setdefault(result.key, []).append(turn["score"])
    # by dataset, in the order in which they came
    order = list(dict.fromkeys(dataset for dataset, _ in found))
    return [
        DatasetScore(
            dataset,
            cache,
            [_mean(scores) for scores in by_item.values()],
            [_mean(scores) for scores in found[dataset, FULL].values()],
            [items[key] for key in by_item],
        )
        for name in order
        for (dataset, cache), by_item in found.items()
        if dataset == name
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
