"""`vector_quantize` without a matrix of distances in memory, to the same bits as the reference.

A program takes a tile of tokens and one group of a run, and compares with all 256 vectors of the group. Numbers are
integers that float16 holds, with sums below 2**24: products on tensor cores, summed in float32, are exact.
"""

import torch
import triton
import triton.language as tl

from ..reference.vector_quantize import grid_limit

# tokens, and numbers of a vector that are multiplied at once: 16 is the least that tensor cores take
TILE = {"BLOCK_TOKENS": 64, "BLOCK_PLACES": 16}


# one kernel for vectors of all sizes: compiling takes longer than a prompt
@triton.jit(do_not_specialize=["num_tokens", "num_components", "num_bytes", "first_component", "first_byte", "size"])
def assign_kernel(
    x,  # [tokens, components] float32
    table,  # [groups, 256, size] int8 or int16
    steps,  # [groups] float32
    codes,  # [tokens, bytes] uint8
    num_tokens,
    num_components,
    num_bytes,
    first_component,
    first_byte,
    size,
    limit,  # float32
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    group = tl.program_id(0)
    tokens = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    is_token = tokens < num_tokens
    vectors = tl.arange(0, 256)
    step = tl.load(steps + group)
    is_lost = tokens < 0
    # |x - c|^2 without |x|^2, which is the same for every vector
    distance = tl.zeros([BLOCK_TOKENS, 256], tl.float32)
    for start in range(0, size, BLOCK_PLACES):
        places = start + tl.arange(0, BLOCK_PLACES)
        is_place = places < size
        component = first_component + group * size + places
        number = tl.load(
            x + tokens[:, None] * num_components + component[None, :],
            mask=is_token[:, None] & is_place[None, :],
            other=0.0,
        )
        # a GPU clamps NaN to a limit
        is_lost = is_lost | (tl.max((number != number).to(tl.int32), 1) > 0)
        # to the nearest integer, ties to the even one: above 2**23 a float32 has no fraction left
        number = tl.minimum(tl.maximum(tl.div_rn(number, step), -limit), limit)
        number = (number + 12582912.0) - 12582912.0
        entry = (group * 256 + vectors)[None, :] * size + places[:, None]
        vector = tl.load(table + entry, mask=is_place[:, None], other=0).to(tl.float32)
        distance += tl.sum(vector * vector, 0)[None, :]
        distance = tl.dot((-2 * number).to(tl.float16), vector.to(tl.float16), distance)
    least = tl.min(distance, 1)
    code = tl.min(tl.where(distance == least[:, None], vectors[None, :], 256), 1)
    code = tl.where(is_lost, 0, code)
    tl.store(codes + tokens * num_bytes + first_byte + group, code.to(tl.uint8), mask=is_token)


def vector_quantize(
    x: torch.Tensor, starts: list[int], tables: list[torch.Tensor], steps: list[torch.Tensor]
) -> torch.Tensor:
    """See `reference.vector_quantize`."""
    x = x.contiguous()
    num_tokens, num_bytes = x.shape[0] * x.shape[1], sum(len(step) for step in steps)
    codes = x.new_empty(*x.shape[:2], num_bytes, dtype=torch.uint8)
    place = 0
    for start, table, step in zip(starts, tables, steps, strict=True):
        groups, _, size = table.shape
        if num_tokens:
            # groups of the same tokens run side by side: their numbers are neighbours
            grid = (groups, triton.cdiv(num_tokens, TILE["BLOCK_TOKENS"]))
            sizes = num_tokens, x.shape[-1], num_bytes, start, place, size, float(grid_limit(size))
            assign_kernel[grid](x, table.contiguous(), step, codes, *sizes, **TILE)
        place += groups
    return codes
