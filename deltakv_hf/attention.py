"""The attention `deltakv`: a step of one of our caches reads without dense keys and values, all else is the host's.

`model.set_attn_implementation("deltakv")` turns it on. Without it such a step is met in `scaled_dot_product_attention`,
which some versions of the host reach with keys and values already repeated, hence dense: here never.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from .hf_compat import AttentionInterface, AttentionMaskInterface, sdpa_attention_forward, sdpa_mask
from .lazy import attend_pair
from .static_layer import StaticStates

NAME = "deltakv"


def deltakv_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the host calls it.

    Args:
        query: `[batch, num_attention_heads, q, head_dim]`.
        key, value: `[batch, num_key_value_heads, columns, head_dim]`, lazy ones from our caches.
        attention_mask: as `sdpa_mask` makes it.
        kwargs: what the model passes on; with a soft cap (`softcap`) or attention sinks (`s_aux`), which
            `scaled_dot_product_attention` has not, the model's own eager attention answers.

    Returns:
        `[batch, q, num_attention_heads, head_dim]`, and weights where the eager attention gives them.
    """
    if isinstance(key, StaticStates):
        return key.layer.attend_step(query, attention_mask, scaling, kwargs), None
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        mask = _additive(attention_mask, query, key, module)
        return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    if kwargs.get("position_bias") is None:
        attended = attend_pair(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
        if attended is not None:
            return attended.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _additive(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, module: nn.Module
) -> torch.Tensor | None:
    """A mask of `sdpa_mask` as the host's eager attention adds it."""
    num_queries, columns = query.shape[2], key.shape[2]
    if mask is None:
        # left to the flag `is_causal` of `scaled_dot_product_attention`
        if num_queries == 1 or not getattr(module, "is_causal", True):
            return None
        mask = query.new_ones(num_queries, columns, dtype=torch.bool).tril(columns - num_queries)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return query.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(query.dtype).min)


def register() -> None:
    """Makes the name known to the host."""
    AttentionInterface.register(NAME, deltakv_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
