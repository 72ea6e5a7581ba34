"""A host's attention mask, which is one of columns, as what is added to the scores of stored tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layout import View


def mask_of_slots(mask: torch.Tensor, queries: torch.Tensor, view: View | None, slots: slice) -> torch.Tensor:
    """Of tokens that stand at `slots`.

    Args:
        mask: `[batch or 1, num_attention_heads or 1, q or 1, columns]`, bool (True is seen) or added to the scores;
            fewer leading axes are allowed.
        queries: `[batch, heads, group, q, ..]`, groups to stand as more rows.
        view: where columns stand, None if in order.

    Returns:
        `[batch or 1, heads or 1, group * q or 1, slots]` float32.
    """
    if view is None:
        return _additive(mask[..., slots], queries)
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape).expand(len(queries), -1, -1, -1)
    idx = view.columns[:, None, None, slots].expand(-1, *mask.shape[1:3], -1)
    mask = _additive(mask.gather(-1, idx), queries)
    return mask.masked_fill_(view.unused[:, None, None, slots], -torch.inf)


def mask_of_raw(
    mask: torch.Tensor,
    queries: torch.Tensor,
    view: View | None,
    num_sinks: int,
    num_compressed: int,
    num_tail: int,
    num_pending: int,
) -> torch.Tensor:
    """The same of sinks, tail and pending tokens, side by side."""
    behind = num_sinks + num_compressed
    spans = slice(0, num_sinks), slice(behind, behind + num_tail)
    sinks, tail = (mask_of_slots(mask, queries, view, span) for span in spans)
    # the tail of rows that were dropped from the batch may have been longer
    tail = F.pad(tail, (0, num_tail - tail.shape[-1]), value=-torch.inf)
    pending = _additive(mask[..., mask.shape[-1] - num_pending :], queries)
    return torch.cat([sinks, tail, pending.expand(len(sinks), -1, -1, -1)], dim=-1)


def _additive(mask: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """A host's mask as one added to scores, for `queries` `[batch, heads, group, q, ..]` with groups as more rows.

    Returns:
        `[batch or 1, heads or 1, group * q or 1, columns]` float32.
    """
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    mask = mask.float()
    heads, group, num_queries = queries.shape[1:4]
    if mask.shape[1] > 1:
        mask = mask.unflatten(1, (heads, group))
        return mask.expand(-1, -1, -1, num_queries, -1).flatten(2, 3)
    if mask.shape[2] == 1:
        return mask
    return mask.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
