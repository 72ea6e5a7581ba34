"""`vector_quantize` without a matrix of distances in memory, to the same bits as the reference.

A program takes one group of a run and some tokens, and compares each with all 256 vectors of the group. Numbers are
integers that float16 holds, with sums below 2**24: products on tensor cores, summed in float32, are exact.
"""

import torch
import triton
import triton.language as tl

from ..reference.vector_quantize import grid_limit

# tokens of a program and of a tile, and numbers of a vector that are multiplied at once: 16 is the least that tensor
# cores take
TOKENS = 512
TILE = {"BLOCK_TOKENS": 64, "BLOCK_PLACES": 16}
# 1.5 * 2**23: a float32 of that size has no fraction, and its last 22 bits are those of an integer added to it
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def read_vectors(table, entries, first, size, BLOCK_PLACES: tl.constexpr):
    """Numbers `first ..` of 256 vectors, `[BLOCK_PLACES, 256]` float16, and sums of their squares."""
    places = first + tl.arange(0, BLOCK_PLACES)
    vectors = tl.load(table + entries[None, :] + places[:, None], mask=(places < size)[:, None], other=0)
    vectors = vectors.to(tl.float32)
    return vectors.to(tl.float16), tl.sum(vectors * vectors, 0)


@triton.jit
def read_numbers(x, tokens, is_token, first, size, stride, step, limit, BLOCK_PLACES: tl.constexpr):
    """Numbers `first ..` of tokens on the grid, times -2."""
    places = first + tl.arange(0, BLOCK_PLACES)
    is_number = is_token[:, None] & (places < size)[None, :]
    number = tl.load(x + tokens[:, None] * stride + places[None, :], mask=is_number, other=0.0)
    # a GPU clamps NaN to a limit
    clamped = tl.minimum(tl.maximum(tl.div_rn(number, step), -limit), limit)
    number = tl.where(number == number, clamped, number)
    # to the nearest integer, ties to the even one
    return (-2 * ((number + WHOLE) - WHOLE)).to(tl.float16)


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
    IS_LONG: tl.constexpr,  # vectors have more numbers than BLOCK_PLACES
    IN_BITS: tl.constexpr,  # distances are below 2**22, and a distance and a vector's number fit into 31 bits
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
):
    group = tl.program_id(0)
    vectors = tl.arange(0, 256)
    entries = (group * 256 + vectors) * size
    step = tl.load(steps + group)
    x += first_component + group * size
    vector, square = read_vectors(table, entries, 0, size, BLOCK_PLACES)
    if IS_LONG:
        for start in range(BLOCK_PLACES, size, BLOCK_PLACES):
            square += read_vectors(table, entries, start, size, BLOCK_PLACES)[1]
    if IN_BITS:
        square += WHOLE
    begin = tl.program_id(1) * TOKENS
    for first in range(begin, tl.minimum(begin + TOKENS, num_tokens), BLOCK_TOKENS):
        tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        is_token = tokens < num_tokens
        # |x - c|^2 without |x|^2, which is the same for every vector
        distance = tl.zeros([BLOCK_TOKENS, 256], tl.float32) + square[None, :]
        number = read_numbers(x, tokens, is_token, 0, size, num_components, step, limit, BLOCK_PLACES)
        distance = tl.dot(number, vector, distance)
        if IS_LONG:
            for start in range(BLOCK_PLACES, size, BLOCK_PLACES):
                number = read_numbers(x, tokens, is_token, start, size, num_components, step, limit, BLOCK_PLACES)
                distance = tl.dot(number, read_vectors(table, entries, start, size, BLOCK_PLACES)[0], distance)
        # the first of the nearest; a token with NaN has no distances, and 0 either way
        if IN_BITS:
            code = tl.min((distance.to(tl.int32, bitcast=True) << 8) + vectors[None, :], 1) & 255
        else:
            least = tl.min(distance, 1)
            code = tl.min(tl.where(distance == least[:, None], vectors[None, :], 256), 1)
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
        limit = grid_limit(size)
        if num_tokens:
            # groups of the same tokens run side by side: their numbers are neighbours
            assign_kernel[(groups, triton.cdiv(num_tokens, TOKENS))](
                *(x, table.contiguous(), step, codes),
                *(num_tokens, x.shape[-1], num_bytes, start, place, size, float(limit)),
                IS_LONG=size > TILE["BLOCK_PLACES"],
                IN_BITS=3 * size * limit**2 < 2**22,
                TOKENS=TOKENS,
                **TILE,
            )
        place += groups
    return codes
