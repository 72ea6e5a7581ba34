"""`block_directions`: a program for the keys and one for the values of each block, which it reads twice."""

import torch
import triton
import triton.language as tl

# numbers of a token that are loaded at once
COLUMNS = 1024


@triton.jit(do_not_specialize=["block_size"])
def direction_kernel(
    blocks,  # [n, block_size, width]
    places,  # [m] int64
    mean,  # [width] float32
    directions,  # [m, block_size * width], all keys of a block and then its values
    block_size,
    key_width,
    width,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    is_value = tl.program_id(1)
    first, count = is_value * key_width, key_width + is_value * (width - 2 * key_width)
    start = blocks + tl.load(places + block) * block_size * width + first
    out = directions + block * block_size * width + block_size * first
    total = tl.zeros([COLUMNS], tl.float32)
    for token in range(0, block_size):
        for begin in range(0, count, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            is_column = column < count
            x = tl.load(start + token * width + column, mask=is_column, other=0.0).to(tl.float32)
            x -= tl.load(mean + first + column, mask=is_column, other=0.0)
            total += x * x
    length = tl.maximum(tl.sqrt(tl.sum(total, 0)), 1e-12)
    for token in range(0, block_size):
        for begin in range(0, count, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            is_column = column < count
            x = tl.load(start + token * width + column, mask=is_column, other=0.0).to(tl.float32)
            x -= tl.load(mean + first + column, mask=is_column, other=0.0)
            tl.store(out + token * count + column, (x / length).to(directions.dtype.element_ty), mask=is_column)


def block_directions(
    blocks: torch.Tensor, places: torch.Tensor, mean: torch.Tensor, key_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_directions`."""
    size, width = blocks.shape[1:]
    directions = torch.empty(len(places), size * width, dtype=dtype, device=blocks.device)
    if len(places):
        arguments = blocks.contiguous(), places.contiguous(), mean.contiguous(), directions
        direction_kernel[(len(places), 2)](*arguments, size, key_width, width, COLUMNS=COLUMNS)
    return directions.split([size * key_width, size * (width - key_width)], dim=1)
