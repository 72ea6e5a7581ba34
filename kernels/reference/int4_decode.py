"""Keys and values as four bits a number, and attention straight from them: the specification.

The layout is that of KIVI: channels of keys differ from each other and tokens little, so a scale and a minimum belong
to a channel over 32 consecutive tokens. Of values they belong to a token, over 32 consecutive channels. What attention
sums up stands side by side: the numbers of a token's key, and the numbers that 32 tokens have in a channel of values.
"""

from __future__ import annotations

import torch

from .attend import Attended, attend
from .quantize import pack, quantize, unpack

NBITS = 4
# tokens that share the levels of a channel of keys, and channels that share the levels of a token's values
GROUP = 32


def int4_encode(
    key_states: torch.Tensor, value_states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and levels of keys and values; codes are chosen for the rounded levels, as in `quantize`.

    Args:
        key_states: `[batch, heads, n, head_dim]` floating, n and head_dim multiples of 32.
        value_states: `[batch, heads, n, value_dim]` floating, value_dim a multiple of 32.

    Returns:
        key_codes: `[batch, heads, n, head_dim / 2]` uint8, the first half of the channels in the low bits.
        key_levels: `[batch, heads, n / 32, head_dim, 2]` float16, scale and minimum.
        value_codes: `[batch, heads, n / 32, value_dim, 16]` uint8, the first half of 32 tokens in the low bits.
        value_levels: `[batch, heads, n, value_dim / 32, 2]` float16.

    Raises:
        ValueError: tokens or channels cannot be cut into groups of 32.
    """
    for name, size in (
        ("tokens", key_states.shape[2]),
        ("channels of keys", key_states.shape[3]),
        ("channels of values", value_states.shape[3]),
    ):
        if size % GROUP:
            raise ValueError(f"int4 wants {name} in groups of {GROUP}, got {size}.")
    key_codes, key_levels = _quantize(key_states.float().unflatten(2, (-1, GROUP)).mT)
    value_codes, value_levels = _quantize(value_states.float())
    key_codes, value_codes = key_codes.mT.flatten(2, 3), value_codes.unflatten(2, (-1, GROUP)).mT.contiguous()
    return pack(key_codes, NBITS), key_levels.squeeze(-2), pack(value_codes, NBITS), value_levels


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, one a byte, and levels."""
    codes, levels = quantize(x, NBITS, GROUP)
    return torch.cat(unpack(codes, NBITS), dim=-1), levels


def int4_dense(
    key_codes: torch.Tensor, key_levels: torch.Tensor, value_codes: torch.Tensor, value_levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `int4_encode` has encoded, read back: `[batch, heads, n, head_dim or value_dim]` float32."""
    codes = torch.cat(unpack(key_codes.unflatten(2, (-1, GROUP)), NBITS), dim=-1).float()
    scale, low = key_levels.float().unsqueeze(3).unbind(-1)
    key_states = (codes * scale + low).flatten(2, 3)
    codes = torch.cat(unpack(value_codes, NBITS), dim=-1).mT.unflatten(-1, (-1, GROUP)).float()
    scale, low = value_levels.unflatten(2, (-1, GROUP)).float().unsqueeze(-1).unbind(-2)
    return key_states, (codes * scale + low).flatten(-2).flatten(2, 3)


def int4_decode(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_levels: torch.Tensor,
    value_codes: torch.Tensor,
    value_levels: torch.Tensor,
    mask: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """What queries see in tokens that `int4_encode` has encoded.

    Args:
        query: `[batch, heads, queries, head_dim]`, to be multiplied by `scale`; heads are those of keys, queries of
            grouped heads stand side by side. float32: kernels multiply in float32; float16 or bfloat16: they multiply
            in float16 and sum in float32.
        key_codes, key_levels, value_codes, value_levels: as from `int4_encode`.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, n]` float32, or None.
        block_table: `[batch, blocks]` int32, the blocks of 32 tokens to read, in order: n = 32 * blocks. None: all.
        lengths: `[batch]` int32, how many of the n tokens of each row there are; what stands behind them is not read,
            and may be anything. None: all.
        scores: `[batch, heads, queries, n]` float32 to be filled in with the scores, -inf for what is not there; or
            None.
        before: what the same queries saw in other tokens, to be merged with.
        dtype: of the output.

    Returns:
        of values, `[batch, heads, queries, value_dim]`.
    """
    encoded = key_codes, key_levels, value_codes, value_levels
    if block_table is not None:
        rows = torch.arange(len(query), device=query.device)[:, None]
        # [batch, heads, blocks, ...]
        blocks = (part.unflatten(2, (value_codes.shape[2], -1)) for part in encoded)
        encoded = (part.transpose(1, 2)[rows, block_table].transpose(1, 2).flatten(2, 3) for part in blocks)
    key_states, value_states = int4_dense(*encoded)
    if lengths is not None:
        is_behind = (torch.arange(key_states.shape[2], device=query.device) >= lengths[:, None])[:, None, None]
        # zero times what is not a number is none either
        key_states, value_states = (part.masked_fill(is_behind.mT, 0.0) for part in (key_states, value_states))
        mask = (query.new_zeros(1).float() if mask is None else mask).masked_fill(is_behind, -torch.inf)
    if scores is not None:
        torch.matmul(query.float() * scale, key_states.mT, out=scores)
        if mask is not None:
            scores += mask
    seen = attend(query, [(key_states, value_states)], mask, scale)
    seen = seen if before is None else seen.merge(before)
    return Attended(seen.output.to(dtype), seen.log_total)
