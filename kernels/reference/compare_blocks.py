"""How well blocks are read as multiples of others: the specification."""

from __future__ import annotations

import torch

from .block_directions import WIDE, centred


def compare_blocks(
    blocks: torch.Tensor, members: torch.Tensor, leaders: torch.Tensor, mean: torch.Tensor, key_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaders are multiplied by, as directions from the mean, to be closest to members; and how far off that is.

    Args:
        blocks, mean, key_width: as for `block_directions`.
        members, leaders: `[m]` int64, places in `blocks`.

    Returns:
        `[m, 2]` float32, factors of keys and of values; and `[m, 2]` float32, what is missing relative to the member's
        distance from the mean (not a number if that is 0).
    """
    scales, errors = [mean.new_empty(0, 2)], [mean.new_empty(0, 2)]
    for some, others in zip(members.split(WIDE), leaders.split(WIDE), strict=True):
        tokens, theirs = blocks[some].float(), blocks[others].float()
        pairs = list(zip(centred(tokens, mean, key_width), centred(theirs, mean, key_width), strict=True))
        scale = torch.stack([(own * other).sum(1) / (other * other).sum(1) for own, other in pairs], dim=1)
        is_value = (torch.arange(len(mean), device=mean.device) >= key_width).long()
        share = scale[:, is_value].unsqueeze(1)
        gone = theirs * share + (1 - share) * mean - tokens
        parts = gone[..., :key_width].flatten(1), gone[..., key_width:].flatten(1)
        missing = [part.norm(dim=1) / own.norm(dim=1) for part, (own, _) in zip(parts, pairs, strict=True)]
        scales.append(scale)
        errors.append(torch.stack(missing, dim=1))
    return torch.cat(scales), torch.cat(errors)
