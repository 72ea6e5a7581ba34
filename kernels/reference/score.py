"""Scores of queries and tokens that are held as components, keys rotated by their positions: the specification."""

from __future__ import annotations

import torch

from .quantize import take


def score(
    query: torch.Tensor,
    components: torch.Tensor,
    key_mean: torch.Tensor,
    key_map: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Products of queries with keys `rotated(components @ key_map + key_mean)`.

    Args:
        query: `[batch, heads, queries, head_dim]` float32; numbers that RoPE turns together stand side by side.
        components: `[batch, n, components]` float32.
        key_mean: `[heads * head_dim]` float32, numbers in the order of `query`.
        key_map: `[components, heads * head_dim]` float32.
        angles: cosine and sine `[batch or 1, n, pairs]` float32 of the first `pairs` pairs of each head; None: keys are
            not rotated.
        scratch: 1-D float32 to hold the keys.

    Returns:
        `[batch, heads, queries, n]` float32.
    """
    batch, n, _ = components.shape
    heads, _, head_dim = query.shape[1:]
    keys = take(scratch, (batch * n, heads * head_dim), components.device)
    torch.addmm(key_mean, components.flatten(0, 1), key_map, out=keys)
    keys = keys.view(batch, n, heads, head_dim)
    if angles is not None:
        turn = torch.complex(*angles).unsqueeze(-2)
        # a pair is a complex number, which is turned by one product
        torch.view_as_complex(keys[..., : 2 * turn.shape[-1]].unflatten(-1, (-1, 2))).mul_(turn)
    return query @ keys.permute(0, 2, 3, 1)


def paired(x: torch.Tensor, pairs: int, interleaved: bool) -> torch.Tensor:
    """The last axis with both numbers of a rotated pair side by side, `pairs` pairs first.

    In this order a rotation is a product of complex numbers, and scores stay the same if queries stand in it too.

    Args:
        interleaved: they do already; else the second number stands `pairs` behind the first.
    """
    if interleaved:
        return x
    turned = torch.stack([x[..., :pairs], x[..., pairs : 2 * pairs]], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
