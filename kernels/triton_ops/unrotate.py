"""`unrotate` in one pass over keys and values, to the same bits as the reference."""

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=["num_tokens", "heads", "row_stride", "angle_stride"])
def unrotate_kernel(
    states,  # [rows, heads, n, head_dim], any floating dtype
    cos,  # [1 or rows, n, pairs] float32
    sin,
    tokens,  # [rows, n, width] float32, at the first number of these states
    num_tokens,
    heads,
    head_dim,
    pairs,
    row_stride,  # of `states`
    head_stride,
    token_stride,
    angle_stride,  # of a row of `cos` and `sin`; 0 if all rows share one
    width,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    head, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_DIM)
    is_held = (token < num_tokens)[:, None] & (channel < head_dim)[None, :]
    states += row * row_stride + head.to(tl.int64) * head_stride
    x = tl.load(states + token[:, None] * token_stride + channel[None, :], mask=is_held, other=0.0).to(tl.float32)
    if pairs > 0:
        is_first = channel < pairs
        pair = channel % pairs
        other = tl.where(is_first, channel + pairs, channel - pairs)
        if INTERLEAVED:
            is_first = channel % 2 == 0
            pair = channel // 2
            other = tl.where(is_first, channel + 1, channel - 1)
        is_turned = is_held & (channel < 2 * pairs)[None, :]
        y = tl.load(states + token[:, None] * token_stride + other[None, :], mask=is_turned, other=0.0).to(tl.float32)
        angle = row * angle_stride + token[:, None] * pairs + pair[None, :]
        c = tl.load(cos + angle, mask=is_turned, other=1.0)
        s = tl.load(sin + angle, mask=is_turned, other=0.0)
        turned = tl.div_rn(x * c + tl.where(is_first, 1.0, -1.0)[None, :] * (y * s), c * c + s * s)
        x = tl.where(is_turned, turned, x)
    tl.store(tokens + (row * num_tokens + token)[:, None] * width + head * head_dim + channel[None, :], x, mask=is_held)


def unrotate(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """See `reference.unrotate`."""
    rows, heads, num_tokens, head_dim = key_states.shape
    width = heads * (head_dim + value_states.shape[3])
    tokens = torch.empty(rows, num_tokens, width, dtype=torch.float32, device=key_states.device)
    for states, turn, place in ((key_states, angles, 0), (value_states, None, heads * head_dim)):
        states = states if states.stride(3) == 1 else states.contiguous()
        # nothing is read of what is missing
        cos, sin = (tokens, tokens) if turn is None else (part.contiguous() for part in turn)
        pairs, angle_stride = (0, 0) if turn is None else (cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0)
        head_dim = states.shape[3]
        if states.numel():
            sizes = num_tokens, heads, head_dim, pairs, *states.stride()[:3], angle_stride, width
            # a fused multiply-add would round differently from the reference
            unrotate_kernel[(heads, triton.cdiv(num_tokens, BLOCK_TOKENS), rows)](
                *(states, cos, sin, tokens[..., place:], *sizes),
                INTERLEAVED=interleaved,
                BLOCK_TOKENS=BLOCK_TOKENS,
                BLOCK_DIM=triton.next_power_of_2(head_dim),
                enable_fp_fusion=False,
            )
    return tokens
