"""95 % intervals for shares and for differences of shares and of means over the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import InvalidOptionError

Z = 1.959964


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of the share `count / total` (E. B. Wilson, JASA 22, 1927)."""
    share, scale = count / total, 1 + Z**2 / total
    middle = (share + Z**2 / (2 * total)) / scale
    half = Z * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2)) / scale
    # rounding must not put the share outside
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def paired_difference(before: list[bool], after: list[bool]) -> tuple[float, float]:
    """Interval of the share of true ones in `after` minus that in `before`, of the same items in the same order.

    Method 10 of R. G. Newcombe, Statistics in Medicine 17, 1998, 2635-2650: the Wilson intervals of the two shares,
    joined with their correlation. It has a width also where no item differs, which tells how much could be missed.
    """
    total = len(before)
    both, lost, gained = (
        sum(pair == kind for pair in zip(before, after, strict=True))
        for kind in ((True, True), (True, False), (False, True))
    )
    neither = total - both - lost - gained
    first, second = (both + lost) / total, (both + gained) / total
    spread = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    covariance = both * neither - lost * gained
    if covariance > 0:
        covariance = max(covariance - total / 2, 0)
    correlation = covariance / math.sqrt(spread) if spread else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 - 2 * correlation * down * up + up**2))

    (first_low, first_high), (second_low, second_high) = wilson(both + lost, total), wilson(both + gained, total)
    low = second - first - reach(second - second_low, first_high - first)
    high = second - first + reach(first - first_low, second_high - second)
    return max(-1.0, low), min(1.0, high)


def bootstrap_difference(
    before: Sequence[float], after: Sequence[float], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of `after` minus that of `before`, of the same items in the same order.

    Items are drawn again with replacement, each with both of its figures (B. Efron, Annals of Statistics 7, 1979).
    There is no width where all items differ by the same, as where none differs: for shares `paired_difference` tells
    how much could be missed.

    Args:
        before, after: one figure for each item.
        draws: times that as many items are drawn as there are.
        seed: of the draws.

    Raises:
        InvalidOptionError: there is no item, or the two differ in number.
    """
    if len(before) != len(after) or not len(before):
        raise InvalidOptionError(
            f"`before` and `after` must hold a figure for each of the same items, got {len(before)} and {len(after)}."
        )
    changes = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = changes[torch.randint(len(changes), (draws, len(changes)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
