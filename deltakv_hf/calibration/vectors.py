"""Codebooks of 256 vectors by k-means, and what they lose."""

from __future__ import annotations

import torch

from ..dispatch import grid_limit

NUM_VECTORS = 256
TOKEN_TILE = 2048


def fit_vectors(samples: torch.Tensor, iterations: int, generator: torch.Generator) -> torch.Tensor:
    """Lloyd's algorithm for many groups at once.

    Args:
        samples: `[groups, samples, size]` float32, at least 256 samples.
        generator: on the CPU; draws the first vectors.

    Returns:
        `[groups, 256, size]` float32. A vector that no sample is nearest to is put on one of the worst served samples.
    """
    groups, count, size = samples.shape
    if size == 1:
        return _fit_scalars(samples.squeeze(-1), iterations).unsqueeze(-1)
    picked = torch.randperm(count, generator=generator)[:NUM_VECTORS].to(samples.device)
    vectors = samples[:, picked].clone()
    for iteration in range(iterations):
        nearest, distance = assign(samples, vectors)
        place = (nearest + NUM_VECTORS * torch.arange(groups, device=samples.device)[:, None]).flatten()
        counts = torch.bincount(place, minlength=groups * NUM_VECTORS).view(groups, NUM_VECTORS, 1)
        sums = samples.new_zeros(groups * NUM_VECTORS, size).index_add_(0, place, samples.flatten(0, 1))
        mean = sums.view_as(vectors) / counts.clamp_min(1)
        if iteration < iterations - 2:
            worst = distance.topk(NUM_VECTORS, dim=1).indices
            spare = samples.gather(1, worst.unsqueeze(-1).expand(-1, -1, size))
        else:
            spare = vectors
        vectors = torch.where(counts > 0, mean, spare)
    return vectors


def _fit_scalars(samples: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same for single numbers `[groups, samples]`: sorted samples make a cell a range. Twice the iterations."""
    ordered = samples.sort(dim=1).values
    count = ordered.shape[1]
    sums = torch.cat([ordered.new_zeros(len(ordered), 1, dtype=torch.float64), ordered.double().cumsum(1)], dim=1)
    share = (torch.arange(NUM_VECTORS, device=samples.device) + 0.5) / NUM_VECTORS
    low, high = ordered[:, :1], ordered[:, -1:]
    # between equal counts, which starve the tails, and equal steps, which starve the middle
    vectors = 0.5 * ordered[:, (share * count).long()] + 0.5 * (low + (high - low) * share)
    for _ in range(2 * iterations):
        edges = torch.searchsorted(ordered, ((vectors[:, 1:] + vectors[:, :-1]) / 2).contiguous())
        edges = torch.nn.functional.pad(edges, (1, 0))
        edges = torch.cat([edges, torch.full_like(edges[:, :1], count)], dim=1)
        sizes, totals = edges.diff(dim=1), sums.gather(1, edges).diff(dim=1)
        vectors = torch.where(sizes > 0, totals / sizes.clamp_min(1), vectors.double()).float().sort(dim=1).values
    return vectors


def assign(samples: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest of `vectors` `[groups, 256, size]` to each of `samples` `[groups, n, size]`, and the squared distance."""
    square, flat = vectors.square().sum(-1).unsqueeze(1), vectors.transpose(1, 2)
    nearest, distance = [], []
    for tile in samples.split(TOKEN_TILE, dim=1):
        found = torch.baddbmm(square, tile, flat, alpha=-2).min(dim=-1)
        nearest.append(found.indices)
        distance.append((found.values + tile.square().sum(-1)).clamp_min_(0))
    return torch.cat(nearest, dim=1), torch.cat(distance, dim=1)


def to_grid(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds `[groups, 256, size]` to each group's grid: integers (int8 where they fit, else int16) and the steps."""
    limit = grid_limit(vectors.shape[2])
    steps = (vectors.abs().amax(dim=(1, 2)) / limit).clamp_min(torch.finfo(torch.float32).tiny)
    table = (vectors / steps[:, None, None]).round()
    return table.to(torch.int8 if limit <= 127 else torch.int16), steps
