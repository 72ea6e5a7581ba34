"""Attention to tokens in blocks of a pool, some read as multiples of others: the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .attend import Attended, attend
from .reconstruct_and_attend import Rotation


class Fusion(NamedTuple):
    """Blocks that stand for several: a token of slot s is `a * blocks[leader[s]] + (1 - a) * mean` in float32.

    Where a is 1 that is what the pool holds, to the bit.

    Attributes:
        leader: `[slots]` int32, where in the pool the block of a slot stands.
        scale: `[slots, 2]` float32, a of keys and of values.
        mean: `[batch or 1, width]` float32.
    """

    leader: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor


def attend_blocks(
    query: torch.Tensor,
    blocks: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: int,
    value_dim: int,
    fusion: Fusion | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """What queries see in tokens of the blocks that a table names.

    Args:
        query: `[batch, heads, queries, head_dim]`, any floating dtype, to be multiplied by `scale`; heads are those of
            keys, queries of grouped heads stand side by side.
        blocks: `[pool, block_size, width]` float32, bfloat16 or float16, which is also what kernels take products in
            (sums are float32); a token is K of all heads, then V of all heads, width = heads * (head_dim + value_dim).
        block_table: `[batch, n_blocks]` int64 or int32, the slots of a row's blocks in order; 0 behind its last, which
            has to be a slot too.
        num_tokens: how many tokens of each row are read, at least 1; of the last block perhaps a part.
        fusion: None: a slot is a place in the pool.
        rotation: None: keys are read as they are held. Else they are held as the model makes them and are rotated here:
            of a head's first 2 * pairs channels i with i + pairs or, interleaved, 2 * i with 2 * i + 1. `positions` are
            `[batch, num_tokens]` int32; None: a token's angles stand at its place in the row.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, num_tokens]` float32, or None.
        lengths: `[batch]` int32, how many of the tokens of each row there are; what stands behind them may be
            anything. None: all.
        before: what the same queries saw in other tokens, to be merged with.
        dtype: of the output.

    Returns:
        of values, `[batch, heads, queries, value_dim]`.
    """
    batch, heads, _, head_dim = query.shape
    widths = heads * head_dim, heads * value_dim
    tokens = _read(blocks, block_table, num_tokens, widths, fusion)
    if lengths is not None:
        is_behind = torch.arange(num_tokens, device=query.device) >= lengths[:, None]
        # zero times what is not a number is none either
        tokens.masked_fill_(is_behind[:, :, None], 0.0)
        mask = (query.new_zeros(1).float() if mask is None else mask).masked_fill(is_behind[:, None, None], -torch.inf)
    key_states, value_states = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in tokens.split(widths, -1))
    if rotation is not None:
        cos, sin = (part.float().expand(batch, -1, -1) for part in rotation[:2])
        rows = torch.arange(batch, device=query.device)[:, None]
        places = torch.arange(num_tokens, device=query.device) if rotation.positions is None else rotation.positions
        key_states = _rotate(key_states, cos[rows, places][:, None], sin[rows, places][:, None], rotation.interleaved)
    seen = attend(query, [(key_states, value_states)], mask, scale)
    seen = seen if before is None else seen.merge(before)
    return Attended(seen.output.to(dtype), seen.log_total)


def _read(
    blocks: torch.Tensor, block_table: torch.Tensor, num_tokens: int, widths: tuple[int, int], fusion: Fusion | None
) -> torch.Tensor:
    """Tokens `[batch, num_tokens, width]` float32."""
    # a table may be longer than what is read of it
    slots = block_table[:, : -(-num_tokens // blocks.shape[1])]
    tokens = blocks[slots if fusion is None else fusion.leader[slots]].float()
    if fusion is not None:
        is_value = (torch.arange(sum(widths), device=slots.device) >= widths[0]).long()
        # [batch, n_blocks, 1, width]
        factor = fusion.scale[slots][..., is_value][:, :, None]
        tokens.mul_(factor).add_((1 - factor) * fusion.mean[:, None, None])
    return tokens.flatten(1, 2)[:, :num_tokens]


def _rotate(key_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Keys `[batch, heads, n, head_dim]` turned by angles `[batch, 1, n, pairs]`."""
    pairs = cos.shape[-1]
    turned, rest = key_states[..., : 2 * pairs], key_states[..., 2 * pairs :]
    axis, shape = (-1, (pairs, 2)) if interleaved else (-2, (2, pairs))
    first, second = turned.unflatten(-1, shape).unbind(axis)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis)
    return torch.cat([turned.flatten(-2), rest], dim=-1)
