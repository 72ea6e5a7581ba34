"""Which tokens matter most to any query: the specification."""

from __future__ import annotations

import torch

# logarithms of weights are compared in steps of 1/1024, from 1 down to e**-64
STEPS, LAST = 1024, 2**16 - 1


def choose(scores: torch.Tensor, log_total: torch.Tensor, budget: int) -> torch.Tensor:
    """The tokens with the largest softmax weight for any head and query, one set for all of them.

    Of tokens with weights that differ by less than a thousandth, the earlier come first.

    Args:
        scores: `[batch, heads, queries, n]` float32.
        log_total: `[batch, heads, queries, 1]` float32, logarithm of the sum of `exp(score)` over other tokens that
            each query sees.
        budget: how many tokens of a row, at most n.

    Returns:
        `[batch, budget]` int32, ascending.
    """
    # a head that looks elsewhere has no say here
    everywhere = torch.logaddexp(scores.logsumexp(-1, keepdim=True), log_total)
    weights = (scores - everywhere).nan_to_num_(nan=-torch.inf).amax((1, 2))
    keys, n = (weights * -STEPS).clamp_(0, LAST).long(), scores.shape[-1]
    keys = keys * n + torch.arange(n, device=scores.device)
    return keys.topk(budget, largest=False, sorted=False).indices.sort(dim=-1).values.int()
