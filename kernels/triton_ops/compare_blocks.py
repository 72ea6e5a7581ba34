"""`compare_blocks`: a program for the keys and one for the values of each pair, which it reads twice."""

import torch
import triton
import triton.language as tl

from .block_directions import COLUMNS


@triton.jit
def load_token(place, column, is_column):
    """Some numbers of a token, float32."""
    return tl.load(place + column, mask=is_column, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["block_size"])
def compare_kernel(
    blocks,  # [n, block_size, width]
    members,  # [m] int64
    leaders,  # [m] int64
    mean,  # [width] float32
    scales,  # [m, 2] float32
    errors,  # [m, 2] float32
    block_size,
    key_width,
    width,
    COLUMNS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    is_value = tl.program_id(1)
    first, count = is_value * key_width, key_width + is_value * (width - 2 * key_width)
    own = blocks + tl.load(members + pair) * block_size * width + first
    other = blocks + tl.load(leaders + pair) * block_size * width + first
    own_square, square, product = (
        tl.zeros([COLUMNS], tl.float32),
        tl.zeros([COLUMNS], tl.float32),
        tl.zeros([COLUMNS], tl.float32),
    )
    for token in range(0, block_size):
        for begin in range(0, count, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            is_column = column < count
            middle = tl.load(mean + first + column, mask=is_column, other=0.0)
            x = load_token(own + token * width, column, is_column) - middle
            y = load_token(other + token * width, column, is_column) - middle
            own_square += x * x
            square += y * y
            product += x * y
    scale = tl.sum(product, 0) / tl.sum(square, 0)
    missing = tl.zeros([COLUMNS], tl.float32)
    for token in range(0, block_size):
        for begin in range(0, count, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            is_column = column < count
            middle = tl.load(mean + first + column, mask=is_column, other=0.0)
            y = load_token(other + token * width, column, is_column)
            # as it is read
            gone = y * scale + (1 - scale) * middle - load_token(own + token * width, column, is_column)
            missing += gone * gone
    tl.store(scales + 2 * pair + is_value, scale)
    tl.store(errors + 2 * pair + is_value, tl.sqrt(tl.sum(missing, 0) / tl.sum(own_square, 0)))


def compare_blocks(
    blocks: torch.Tensor, members: torch.Tensor, leaders: torch.Tensor, mean: torch.Tensor, key_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.compare_blocks`."""
    size, width = blocks.shape[1:]
    scales, errors = (torch.empty(len(members), 2, device=blocks.device) for _ in range(2))
    if len(members):
        arguments = blocks.contiguous(), members.contiguous(), leaders.contiguous(), mean.contiguous(), scales, errors
        compare_kernel[(len(members), 2)](*arguments, size, key_width, width, COLUMNS=COLUMNS)
    return scales, errors
