"""The basis of a layer's components: uncorrelated, and ordered by what leaving one out would cost the predictions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

# of the metric's part outside of its diagonal, which few windows of text do not settle
SHRINKAGE = 0.5
# least weight of a number of a token, of the largest
LEAST_WEIGHT = 1e-6


@dataclass(frozen=True)
class Basis:
    """Components of one split of a layer. Their squared errors are what they cost, whatever the component.

    Attributes:
        mean: `[size]` float64, numbers of float32.
        weights: `[size]` float64, numbers of float32: tokens are multiplied by these first. What is left of the metric
            is so even that the vectors can be stored in 16 bits.
        vectors: `[size, size]` float64, numbers of float16; row `i` is what component `i` stands for.
        covariance: `[size, size]` float64, of tokens.
    """

    mean: torch.Tensor
    weights: torch.Tensor
    vectors: torch.Tensor
    covariance: torch.Tensor

    def analyse(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[n, size]` float32 -> components `[n, size]` float32."""
        return ((tokens.double() - self.mean) * self.weights @ self._inverse).float()

    # many windows are analysed with one basis
    @cached_property
    def _inverse(self) -> torch.Tensor:
        return torch.linalg.inv(self.vectors)


def fit_basis(tokens: list[torch.Tensor], sensitivity: torch.Tensor) -> Basis:
    """Principal components in the metric of what errors cost.

    Args:
        tokens: `[n, size]` float32 each.
        sensitivity: `[size, size]` float64.
    """
    count = sum(len(part) for part in tokens)
    mean = (sum(part.double().sum(0) for part in tokens) / count).float().double()
    covariance = sum((centred := part.double() - mean).T @ centred for part in tokens) / count
    weights = sensitivity.diagonal().sqrt()
    weights = weights.clamp_min((weights.max() * LEAST_WEIGHT).clamp_min(1e-30)).float().double()
    outer = weights * weights[:, None]
    metric = (1 - SHRINKAGE) * sensitivity / outer
    metric.diagonal().add_(SHRINKAGE)
    values, turn = torch.linalg.eigh(metric)
    root = values.clamp_min(1e-6).sqrt()
    forth, back = (turn * root) @ turn.T, (turn / root) @ turn.T
    _, principal = torch.linalg.eigh(forth @ (covariance * outer) @ forth)
    vectors = principal.flip(1).T @ back
    # eigenvectors come with either sign: the same on every machine is easier to compare
    strongest = vectors.abs().argmax(1, keepdim=True)
    vectors = vectors * vectors.gather(1, strongest).sign()
    return Basis(mean, weights, vectors.half().double(), covariance)
