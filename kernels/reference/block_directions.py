"""Blocks as directions from a mean: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# blocks whose numbers are widened at once
WIDE = 256


def block_directions(
    blocks: torch.Tensor, places: torch.Tensor, mean: torch.Tensor, key_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of blocks less the mean, each at length 1; zeros for one that is the mean.

    Args:
        blocks: `[n, block_size, width]` floating, keys of all heads and then values.
        places: `[m]` int64, which of them.
        mean: `[width]` float32.
        key_width: columns of keys.
        dtype: of the directions.

    Returns:
        `[m, block_size * key_width]` and `[m, block_size * value_width]`.
    """
    parts = [centred(blocks[some], mean, key_width) for some in places.split(WIDE)]
    return tuple(torch.cat([F.normalize(part).to(dtype) for part in kind]) for kind in zip(*parts, strict=True))


def centred(tokens: torch.Tensor, mean: torch.Tensor, key_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[m, numbers]` float32 of blocks, less the mean."""
    apart = tokens.float() - mean
    return apart[..., :key_width].flatten(1), apart[..., key_width:].flatten(1)
