"""Keys and values as tokens to compress: the specification."""

from __future__ import annotations

import torch


def unrotate(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Joins all heads of K and V, with the rotation of the keys undone.

    Exact for angles that carry a factor (YaRN) or are rounded to 16 bits: `x` becomes `x * cos + y * sin` and `y`
    `y * cos - x * sin`, over `cos^2 + sin^2`.

    Args:
        key_states, value_states: `[rows, heads, n, head_dim]`, any floating dtype.
        angles: cosine and sine `[1 or rows, n, pairs]` float32 of the first `2 * pairs` channels; None: not rotated.
        interleaved: whether channel `2i` turns with `2i + 1`; else channel `i` with `i + pairs`.

    Returns:
        `[rows, n, width]` float32, K and then V.
    """
    # a copy: the model may still need its keys
    keys = key_states.transpose(1, 2).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if angles is not None:
        cos, sin = (part.unsqueeze(2) for part in angles)
        pairs = cos.shape[-1]
        first, second = keys[..., :pairs], keys[..., pairs : 2 * pairs]
        if interleaved:
            first, second = keys[..., 0 : 2 * pairs : 2], keys[..., 1 : 2 * pairs : 2]
        kept = first.clone()
        square = cos * cos + sin * sin
        # no fused multiply-add: stored bytes must not depend on where in a tensor a token stands
        first.mul_(cos).add_(second * sin).div_(square)
        second.mul_(cos).sub_(kept * sin).div_(square)
    return torch.cat([keys.flatten(2), value_states.transpose(1, 2).flatten(2).float()], dim=-1)
