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
        output: `[batch, heads, queries, width]`, values weighted by the softmax over these tokens; zero for a query
            that may see none of them.
        log_total: `[batch, heads, queries, 1]`, logarithm of the sum of `exp(score)`; -inf for such a query.
    """

    output: torch.Tensor
    log_total: torch.Tensor

    def merge(self, other: Attended) -> Attended:
        """The same of the tokens of both."""
        largest = torch.maximum(self.log_total, other.log_total).clamp_(min=torch.finfo(torch.float32).min)
        own, others = (self.log_total - largest).exp_(), (other.log_total - largest).exp_()
        total = own + others
        output = (self.output * own + other.output * others) / total.clamp(min=1.0)
        return Attended(output, largest + total.log())


def attend(
    query: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Attended:
    """Attention of some queries to some tokens.

    Args:
        query: `[batch, heads, queries, head_dim]`, any floating dtype, to be multiplied by `scale`.
        parts: pairs of keys and values `[batch, heads, n, head_dim or width]`, any floating dtype, n at least 1 in
            all.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, n of all parts]`, floating, or None.
    """
    key_states, value_states = (torch.cat([part.float() for part in kind], dim=2) for kind in zip(*parts, strict=True))
    return weigh((query.float() * scale) @ key_states.mT, value_states, mask)


def weigh(scores: torch.Tensor, value_states: torch.Tensor, mask: torch.Tensor | None) -> Attended:
    """The same of scores `[batch, heads, queries, n]` float32, which are overwritten.

    Args:
        value_states: `[batch, heads, n, width]`, or `[batch, n, width]` for all heads, float32.
    """
    if mask is not None:
        scores += mask
    # a query that may see none of these tokens has no largest score; the least finite one keeps it from being NaN
    maximum = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(maximum).exp_()
    total = weights.sum(-1, keepdim=True)
    if value_states.ndim == 4:
        output = weights @ value_states
    else:
        output = (weights.flatten(1, 2) @ value_states).view(*weights.shape[:3], -1)
    # the largest weight of a query that sees something is 1
    return Attended(output / total.clamp(min=1.0), maximum + total.log())


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
    tokens, parts = [(key_states.float(), value_states.float())], []
    size = max(1, MOST_SCORES // (query.shape[0] * query.shape[1] * key_states.shape[2]))
    for first in range(0, query.shape[2], size):
        span = slice(first, first + size)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, span]
        parts.append(attend(query[:, :, span], tokens, part, scale))
    return Attended(*(torch.cat([getattr(part, f.name) for part in parts], dim=2) for f in fields(Attended)))
