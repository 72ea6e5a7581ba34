"""Attention over tokens that are read in parts, values mixed in whatever space they are held in: the specification.

Softmax over all tokens is put together from parts: each knows the largest score it has seen and its sums relative to
that. A part's values may be components of a token instead of the token: the sum over tokens is linear, so it is
projected up once for each query instead of once for each token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

# held at once by `attend_many`
MOST_SCORES = 2**22


@dataclass(frozen=True)
class Attended:
    """What queries saw in some of the tokens, float32.

    Attributes:
        maximum: `[batch, heads, queries, 1]`, largest score.
        total: `[batch, heads, queries, 1]`, sum of `exp(score - maximum)`.
        mixed: `[batch, heads, queries, width]`, sum of `exp(score - maximum) * value`.
    """

    maximum: torch.Tensor
    total: torch.Tensor
    mixed: torch.Tensor

    def merge(self, other: Attended) -> Attended:
        """The same of the tokens of both."""
        maximum = torch.maximum(self.maximum, other.maximum)
        own, others = (self.maximum - maximum).exp_(), (other.maximum - maximum).exp_()
        return Attended(maximum, self.total * own + other.total * others, self.mixed * own + other.mixed * others)

    def result(self) -> torch.Tensor:
        """The attention's output `[batch, heads, queries, width]`, zero for a query that may see nothing."""
        return torch.where(self.total > 0, self.mixed / self.total, 0.0)


def attend(
    query: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor, mask: torch.Tensor | None
) -> Attended:
    """Attention of some queries to some tokens.

    Args:
        query: `[batch, heads, queries, head_dim]` float32, times the scale.
        key_states: `[batch, heads, n, head_dim]` float32, n at least 1.
        value_states: `[batch, heads, n, width]`, or `[batch, n, width]` for all heads, float32.
        mask: added to the scores, broadcastable to `[batch, heads, queries, n]`, or None.
    """
    return weigh(query @ key_states.mT, value_states, mask)


def weigh(scores: torch.Tensor, value_states: torch.Tensor, mask: torch.Tensor | None) -> Attended:
    """The same of scores `[batch, heads, queries, n]` float32, which are overwritten."""
    if mask is not None:
        scores += mask
    # a query that may see none of these tokens has no largest score; the least finite one keeps it from being NaN
    maximum = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    if value_states.ndim == 4:
        return Attended(maximum, total, weights @ value_states)
    mixed = weights.flatten(1, 2) @ value_states
    return Attended(maximum, total, mixed.view(*weights.shape[:3], -1))


def attend_many(
    query: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> Attended:
    """`attend` for more queries than their scores have room for at once.

    Args:
        query: `[batch, heads, queries, head_dim]`, any floating dtype, to be multiplied by `scale`.
        key_states, value_states: `[batch, heads, n, head_dim]` in the same dtype, n at least 1.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, n]` float32, or None.
    """
    keys, values, parts = key_states.float(), value_states.float(), []
    size = max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * keys.shape[2]))
    for first in range(0, query.shape[2], size):
        span = slice(first, first + size)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, span]
        parts.append(attend(query[:, :, span].float() * scale, keys, values, part))
    return Attended(*(torch.cat([getattr(part, f.name) for part in parts], dim=2) for f in fields(Attended)))
