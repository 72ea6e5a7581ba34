"""Attention to tokens straight from their codes: the specification."""

from __future__ import annotations

import torch

from .attend import Attended, weigh
from .score import score


def reconstruct_and_attend(
    query: torch.Tensor,
    codes: torch.Tensor,
    table: torch.Tensor,
    byte_idx: torch.Tensor,
    first_entry: torch.Tensor,
    vector_size: torch.Tensor,
    key_map: torch.Tensor,
    key_scale: torch.Tensor,
    key_mean: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Attended:
    """What queries see in tokens, each a row of bytes that stand for components.

    Component `c` of a token is `table[first_entry[c] + code[byte_idx[c]] * vector_size[c]]`, its keys are
    `rotated(components @ key_map * key_scale + key_mean)`. Values are linear in components, which are therefore mixed
    instead of them.

    Args:
        query: `[batch, heads, queries, head_dim]` float32, times the scale; numbers that RoPE turns together stand side
            by side.
        codes: `[batch, num_slots, bytes]` uint8.
        table: `[entries]` float32 or float16, which is also what products are taken in (sums are float32).
        byte_idx, first_entry, vector_size: `[components]` int32.
        key_map: `[components, heads * head_dim]` in the dtype of `table`, numbers of a head in the order of `query`.
        key_scale, key_mean: `[heads * head_dim]` float32.
        angles: cosine and sine `[batch or 1, num_positions, pairs]` of the first `pairs` pairs of each head, floating;
            None: keys are not rotated.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, n]` float32, or None.
        slots: `[batch, n]` int32, the tokens to read; None: all, in their order.
        positions: `[batch, n]` int32, where the angles of each token stand; None: as the token itself in `codes`.
        lengths: `[batch]` int32, how many of the n tokens of each row there are; None: all.

    Returns:
        of what is mixed, `[batch, heads, queries, components]`.
    """
    batch = len(query)
    rows = torch.arange(batch, device=codes.device)[:, None]
    if angles is not None:
        angles = tuple(part.float().expand(batch, -1, -1) for part in angles)
        places = positions if positions is not None else slots
        angles = angles if places is None else tuple(part[rows, places] for part in angles)
    if slots is not None:
        codes = codes[rows, slots]
    components = table.float()[first_entry + codes[..., byte_idx].int() * vector_size]
    scores = score(query, components, key_mean, key_map.float() * key_scale, angles)
    if lengths is not None:
        is_behind = torch.arange(codes.shape[1], device=codes.device) >= lengths[:, None]
        scores = scores.masked_fill(is_behind[:, None, None], -torch.inf)
    return weigh(scores, components, mask)
