"""`vector_quantize` without a matrix of distances in memory, to the same bits as the reference.

A program takes one group and some tokens, and compares each with all 256 vectors of the group. Numbers are integers
that float16 holds, with sums below 2**24: products on tensor cores, summed in float32, are exact.
"""

import torch
import triton
import triton.language as tl

from ..reference.vector_quantize import SHORT, Groups, group_runs

# tokens of a program and of a tile
TOKENS = 512
TILE = {"BLOCK_TOKENS": 16, "num_warps": 2}
# places that are multiplied at once, the least that tensor cores take; the last of the first block hold |c|^2
PLACES, OWN = tl.constexpr(16), tl.constexpr(SHORT)
# 1.5 * 2**23: a float32 of that size has no fraction, and its last 22 bits are those of an integer added to it
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def read_vectors(table, vectors, first, size, last):
    """Numbers `first ..` of some vectors as places before `last`, `[PLACES, vectors]` float16."""
    place = tl.arange(0, PLACES)
    is_number = (place < last) & (first + place < size)
    numbers = tl.load(table + vectors[None, :] * size + first + place[:, None], mask=is_number[:, None], other=0)
    return numbers.to(tl.float16)


@triton.jit
def sum_of_squares(numbers):
    numbers = numbers.to(tl.float32)
    return tl.sum(numbers * numbers, 0)


@triton.jit
def first_vectors(table, vectors, size, IS_LONG: tl.constexpr, IN_BITS: tl.constexpr):
    """The first block of some vectors: OWN numbers, and what multiplied by `read_numbers` is |c|^2."""
    numbers = read_vectors(table, vectors, 0, size, OWN)
    square = sum_of_squares(numbers)
    if IS_LONG:
        for start in range(OWN, size, PLACES):
            square += sum_of_squares(read_vectors(table, vectors, start, size, PLACES))
    # in digits that float16 holds
    square = square.to(tl.int32)[None, :]
    place = tl.arange(0, PLACES)[:, None]
    digits = tl.where(place == 12, square >> 20 << 10, tl.where(place == 13, square >> 10 & 1023, square & 1023))
    if IN_BITS:
        digits = tl.where(place == 15, 12288, digits)
    else:
        digits = tl.where(place == 15, 0, digits)
    return tl.where(place < OWN, numbers, digits.to(tl.float16))


@triton.jit
def read_numbers(x, tokens, is_token, first, size, stride, scale, limit, last):
    """Numbers `first ..` of tokens on the grid, times -2, as places before `last`, `[tokens, PLACES]` float16."""
    place = tl.arange(0, PLACES)
    is_number = is_token[:, None] & ((place < last) & (first + place < size))[None, :]
    number = tl.load(x + tokens[:, None] * stride + first + place[None, :], mask=is_number, other=0.0)
    # a GPU clamps NaN to a limit
    clamped = tl.minimum(tl.maximum(number * scale, -limit), limit)
    number = tl.where(number == number, clamped, number)
    # to the nearest integer, ties to the even one
    number = -2 * ((number + WHOLE) - WHOLE)
    factor = tl.where(place == 14, 1.0, 1024.0)
    return tl.where(place < last, number, factor).to(tl.float16)


@triton.jit
def nearest_vector(
    number,
    vector,
    vectors,
    x,
    tokens,
    is_token,
    table,
    size,
    stride,
    scale,
    limit,
    IS_LONG: tl.constexpr,
    IN_BITS: tl.constexpr,
):
    """The first of the nearest of some vectors, and a number by which to compare it with others."""
    # |x - c|^2 without |x|^2, which is the same for every vector
    distance = tl.dot(number, vector)
    if IS_LONG:
        for start in range(OWN, size, PLACES):
            number = read_numbers(x, tokens, is_token, start, size, stride, scale, limit, PLACES)
            distance = tl.dot(number, read_vectors(table, vectors, start, size, PLACES), distance)
    if IN_BITS:
        least = tl.min((distance.to(tl.int32, bitcast=True) << 8) + vectors[None, :], 1)
        code = least & 255
    else:
        least = tl.min(distance, 1)
        code = tl.min(tl.where(distance == least[:, None], vectors[None, :], 256), 1)
    return least, code


# one kernel for vectors of all sizes: compiling takes longer than a prompt
@triton.jit(do_not_specialize=["num_tokens", "num_components", "num_bytes", "first_group"])
def assign_kernel(
    x,  # [tokens, components] float32
    table,  # [entries] int16
    first_component,  # [groups] int32
    first_entry,  # [groups] int32
    sizes,  # [groups] int32
    byte_idx,  # [groups] int32
    steps,  # [groups] float32
    limits,  # [groups] float32
    codes,  # [tokens, bytes] uint8
    num_tokens,
    num_components,
    num_bytes,
    first_group,
    IS_LONG: tl.constexpr,  # vectors have more numbers than OWN
    IN_BITS: tl.constexpr,  # distances are below 2**22, and a distance and a vector's number fit into 31 bits
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    scale, limit = tl.div_rn(1.0, tl.load(steps + group)), tl.load(limits + group)
    size, byte = tl.load(sizes + group), tl.load(byte_idx + group)
    x += tl.load(first_component + group)
    table += tl.load(first_entry + group)
    # in two halves: distances of all vectors would take all registers
    low, high = tl.arange(0, 128), 128 + tl.arange(0, 128)
    low_vector = first_vectors(table, low, size, IS_LONG, IN_BITS)
    high_vector = first_vectors(table, high, size, IS_LONG, IN_BITS)
    begin = tl.program_id(1) * TOKENS
    for first in range(begin, tl.minimum(begin + TOKENS, num_tokens), BLOCK_TOKENS):
        tokens = (first + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        is_token = tokens < num_tokens
        number = read_numbers(x, tokens, is_token, 0, size, num_components, scale, limit, OWN)
        least, code = nearest_vector(
            number, low_vector, low, x, tokens, is_token, table, size, num_components, scale, limit, IS_LONG, IN_BITS
        )
        other_least, other_code = nearest_vector(
            number, high_vector, high, x, tokens, is_token, table, size, num_components, scale, limit, IS_LONG, IN_BITS
        )
        # the first of the nearest; a token with NaN has no distances, and 0 or 256 either way
        code = tl.where(other_least < least, other_code, code)
        tl.store(codes + tokens * num_bytes + byte, code.to(tl.uint8), mask=is_token)


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    groups: Groups | None = None,
) -> torch.Tensor:
    """See `reference.vector_quantize`."""
    x, groups = x.contiguous(), group_runs(starts, tables, steps) if groups is None else groups
    num_tokens, num_groups = x.shape[0] * x.shape[1], len(groups.size)
    codes = x.new_empty(*x.shape[:2], num_groups, dtype=torch.uint8)
    for first, count, is_long, in_bits in groups.classes if num_tokens else ():
        # groups of the same tokens run side by side: their numbers are neighbours
        assign_kernel[(count, triton.cdiv(num_tokens, TOKENS))](
            *(x, *groups[:7], codes, num_tokens, x.shape[-1], num_groups, first),
            IS_LONG=is_long,
            IN_BITS=in_bits,
            TOKENS=TOKENS,
            **TILE,
        )
    return codes
