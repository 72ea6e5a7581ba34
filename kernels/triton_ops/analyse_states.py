"""`analyse_states`: keys and values become numbers in float16 in one pass, to the same bits as in the reference, which
tensor cores multiply.
"""

import torch
import triton
import triton.language as tl

from .analyse import analyse, power_of_two, product, room_of
from .unrotate import unrotate


@triton.jit
def read_centred(
    states, mean, weights, cos, sin, place, width, head_stride,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Numbers `place` of a token's keys or values, un-rotated and weighted; zero behind the last."""
    is_number, channel = place < width, place % HEAD_DIM
    head = states + (place // HEAD_DIM).to(tl.int64) * head_stride
    x = tl.load(head + channel, mask=is_number, other=0.0).to(tl.float32)
    if PAIRS > 0:
        if INTERLEAVED:
            is_first, pair, other = channel % 2 == 0, channel // 2, channel ^ 1
        else:
            is_first, pair, other = channel < PAIRS, channel % PAIRS, (channel + PAIRS) % (2 * PAIRS)
        is_turned = is_number & (channel < 2 * PAIRS)
        y = tl.load(head + other, mask=is_turned, other=0.0).to(tl.float32)
        c = tl.load(cos + pair, mask=is_turned, other=1.0)
        s = tl.load(sin + pair, mask=is_turned, other=0.0)
        turned = tl.div_rn(x * c + tl.where(is_first, 1.0, -1.0) * (y * s), c * c + s * s)
        x = tl.where(is_turned, turned, x)
    x -= tl.load(mean + place, mask=is_number, other=0.0)
    return x * tl.load(weights + place, mask=is_number, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "key_row", "value_row", "angle_row"])
def centre_kernel(
    keys,  # [rows, heads, n, KEY_DIM], 16 bits
    values,  # [rows, heads, n, VALUE_DIM]
    cos,  # [1 or rows, n, PAIRS] float32
    sin,
    mean,  # [width] float32
    weights,  # [width] float32
    numbers,  # [rows, n, room] float16, zero behind the width
    scales,  # [rows, n] float32, powers of two
    num_tokens,
    key_width,
    value_width,
    room,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    angle_row,  # 0 if all rows share one
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    keys += row * key_row + token * key_token
    values += row * value_row + token * value_token
    angle = row * angle_row + token * PAIRS
    key_place, value_place = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    x = read_centred(
        keys, mean, weights, cos + angle, sin + angle, key_place, key_width, key_head, KEY_DIM, PAIRS, INTERLEAVED
    )
    own = mean + key_width, weights + key_width
    y = read_centred(values, *own, cos, sin, value_place, value_width, value_head, VALUE_DIM, 0, False)
    scale = power_of_two(tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0)))
    factor = tl.div_rn(1.0, scale)
    token += row * num_tokens
    tl.store(scales + token, scale)
    numbers += token * room
    tl.store(numbers + key_place, (x * factor).to(tl.float16), mask=key_place < key_width)
    tl.store(numbers + key_width + value_place, (y * factor).to(tl.float16), mask=key_width + value_place < room)


def analyse_states(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    mean: torch.Tensor,
    weights: torch.Tensor,
    inverse: torch.Tensor,
) -> torch.Tensor:
    """See `reference.analyse_states`."""
    if key_states.dtype not in (torch.float16, torch.bfloat16):
        return analyse(unrotate(key_states, value_states, angles, interleaved), mean, weights, inverse)
    (rows, heads, num_tokens, key_dim), value_dim = key_states.shape, value_states.shape[3]
    states = [part if part.stride(3) == 1 else part.contiguous() for part in (key_states, value_states)]
    widths, room = (heads * key_dim, heads * value_dim), room_of(heads * (key_dim + value_dim), mean.device)
    numbers = torch.empty(rows, num_tokens, 1, room, dtype=torch.float16, device=mean.device)
    scales = torch.empty(rows, num_tokens, dtype=torch.float32, device=mean.device)
    # nothing is read of what is missing
    cos, sin = (mean, mean) if angles is None else (part.contiguous() for part in angles)
    pairs, angle_row = (0, 0) if angles is None else (cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0)
    blocks = [triton.next_power_of_2(max(1, size)) for size in (widths[0], room - widths[0])]
    if scales.numel():
        strides = *states[0].stride()[:3], *states[1].stride()[:3], angle_row
        # a fused multiply-add would round differently from the reference
        centre_kernel[(num_tokens, rows)](
            *(*states, cos, sin, mean, weights, numbers, scales, num_tokens, *widths, room, *strides),
            KEY_DIM=max(1, key_dim),
            VALUE_DIM=max(1, value_dim),
            PAIRS=pairs,
            INTERLEAVED=interleaved,
            KEY_BLOCK=blocks[0],
            VALUE_BLOCK=blocks[1],
            num_warps=4 if sum(blocks) <= 4096 else 8,
            enable_fp_fusion=False,
        )
    return product(numbers, scales, inverse)
