"""`vector_quantize` without a matrix of distances in memory, to the same bits as the reference.

A program takes a tile of tokens and one group of a run, and compares with all 256 vectors of the group. Numbers are
integers whose sums stay below 2**24, so float32 holds every distance exactly, fused or not.
"""

import torch
import triton
import triton.language as tl

from ..reference.vector_quantize import grid_limit

BLOCK_TOKENS = 32


@triton.jit
def assign_kernel(
    x,  # [tokens, components] float32
    table,  # [groups, 256, SIZE] int8 or int16
    steps,  # [groups] float32
    codes,  # [tokens, bytes] uint8
    num_tokens,
    num_components,
    num_bytes,
    first_component,
    first_byte,
    LIMIT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = tl.program_id(1)
    tokens = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    is_token = tokens < num_tokens
    vectors = tl.arange(0, 256)
    step = tl.load(steps + group)
    distance = tl.zeros([BLOCK_TOKENS, 256], tl.float32)
    is_lost = tokens < 0
    for place in range(SIZE):
        component = first_component + group * SIZE + place
        number = tl.load(x + tokens * num_components + component, mask=is_token, other=0.0)
        # a GPU clamps NaN to a limit
        is_lost = is_lost | (number != number)
        # to the nearest integer, ties to the even one: above 2**23 a float32 has no fraction left
        number = (tl.clamp(tl.div_rn(number, step), -LIMIT, LIMIT) + 12582912.0) - 12582912.0
        vector = tl.load(table + (group * 256 + vectors) * SIZE + place).to(tl.float32)
        distance += vector[None, :] * (vector[None, :] - 2 * number[:, None])
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
            grid = (triton.cdiv(num_tokens, BLOCK_TOKENS), groups)
            sizes = num_tokens, x.shape[-1], num_bytes, start, place
            constants = {"LIMIT": grid_limit(size), "SIZE": size, "BLOCK_TOKENS": BLOCK_TOKENS}
            assign_kernel[grid](x, table.contiguous(), step, codes, *sizes, **constants)
        place += groups
    return codes
