"""How many blocks stay if similar ones share storage, and at what error: predicted from the similarities of pairs.

Blocks are compared as directions from the mean of their layer. A member is read as its leader's direction times a
factor, so its squared error, relative to its own distance from the mean, is `1 - cos^2`: a bound on the error is a
bound on the cosine. Leaders are taken in an order that has nothing to do with what they hold, so a block that `d`
others match stays with probability `1 / (1 + d)` if those match each other too (the bound of Caro and Wei is met with
equality by groups of equal blocks). If matches are independent instead, each with probability `p` (the Poisson model of
joint encoding, arXiv 2601.03067), `ln(1 + p n) / p` of `n` blocks stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# relative errors at which curves are given
GRID = tuple(step / 50 for step in range(1, 50))
# blocks of a sample, each compared with all
SAMPLE = 512
# blocks have thousands of numbers: a cosine beyond it is no chance, whatever most pairs of a few blocks have
NO_CHANCE = 0.95


@dataclass(frozen=True)
class RateDistortion:
    """What is predicted for the blocks of one layer and group, and what has come of it.

    Attributes:
        layer_idx, group: whose blocks.
        num_blocks: of them.
        mean_cosine, std_cosine: of pairs, by median and quantiles: what similarity is worth by chance.
        chance_cosine: median of the largest among `num_blocks` such pairs, if they were Gaussian.
        kept: share of the blocks that stay, predicted for each relative error of `GRID` from each block's own matches.
        kept_poisson: the same from the Gaussian's tail.
        errors: mean relative error of a member, predicted.
        max_relative_error: chosen for this layer.
        predicted_kept: share at that error.
        achieved_kept, achieved_error: share of blocks that have stayed, mean relative error of the others (the larger
            of keys and values); 0 without any.
        is_left_alone: matches were no better than chance, so nothing was fused.
    """

    layer_idx: int
    group: int
    num_blocks: int
    mean_cosine: float
    std_cosine: float
    chance_cosine: float
    kept: tuple[float, ...]
    kept_poisson: tuple[float, ...]
    errors: tuple[float, ...]
    max_relative_error: float
    predicted_kept: float
    achieved_kept: float = 1.0
    achieved_error: float = 0.0
    is_left_alone: bool = False


def predict(
    cosines: torch.Tensor, layer_idx: int, group: int, max_relative_error: float, target_ratio: float | None
) -> RateDistortion:
    """Curves of one layer, and the error to allow.

    Args:
        cosines: `[sample, n]` float32, of sampled blocks with all of a group (the smaller of keys and values), -inf
            for a pair that may not share.
        max_relative_error: the most to allow, below 1.
        target_ratio: share of blocks that may stay; None: as few as `max_relative_error` gives.
    """
    num_blocks, grid = cosines.shape[1], torch.tensor(GRID, dtype=torch.float64)
    cosines, edges = cosines.sort(1).values, (1 - grid * grid).sqrt().float().expand(len(cosines), -1)
    # how many blocks each of the sample matches with no larger error
    matches = num_blocks - torch.searchsorted(cosines, edges.contiguous().to(cosines.device)).cpu().double()
    kept, totals = (1 / (1 + matches)).mean(0), matches.sum(0)
    counts = totals.diff(prepend=totals.new_zeros(1))
    errors = (counts * (grid - GRID[0] / 2)).cumsum(0) / totals.clamp(min=1)
    mean, std = _bulk(cosines)
    expected = num_blocks * torch.special.ndtr((mean - (1 - grid * grid).sqrt()) / max(std, 1e-9))
    poisson = torch.where(expected < 1e-9, 1.0, expected.log1p() / expected.clamp(min=1e-9))
    allowed = max_relative_error
    if target_ratio is not None:
        reached = [error for error, share in zip(GRID, kept.tolist(), strict=True) if share <= target_ratio]
        allowed = min([max_relative_error, *reached])
    curve = torch.cat([torch.ones(1, dtype=torch.float64), kept]).tolist()
    place = allowed / GRID[0]
    low = min(int(place), len(GRID) - 1)
    return RateDistortion(
        layer_idx,
        group,
        num_blocks,
        mean,
        std,
        # one in two of the largest of so many is beyond it
        min(mean + std * _normal_quantile(0.5 ** (1 / max(1, num_blocks - 1))), NO_CHANCE),
        tuple(curve[1:]),
        tuple(poisson.tolist()),
        tuple(errors.tolist()),
        allowed,
        curve[low] + (curve[low + 1] - curve[low]) * (place - low),
    )


def _bulk(cosines: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of unrelated pairs: quantiles do not see the few that are related."""
    numbers = cosines.flatten()
    numbers = numbers[:: -(-numbers.numel() // 2**18)].sort().values
    # what may not share stands in front
    count = numbers.isfinite().sum()
    # the lower half alone: it is the upper one that relations widen
    shares = torch.tensor([0.1587, 0.5], device=numbers.device)
    places = (len(numbers) - count + shares * (count - 1)).long().clamp(0, len(numbers) - 1)
    low, middle, is_known = torch.cat([numbers[places], (count > 1).float()[None]]).tolist()
    return (middle, middle - low) if is_known else (0.0, 0.0)


def _normal_quantile(share: float) -> float:
    return torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).clamp(-9, 9).item()
