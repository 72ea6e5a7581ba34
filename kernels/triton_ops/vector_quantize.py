"""`vector_quantize` without a matrix of distances in memory, to the same bits as the reference.

A program takes one group and some tokens, and compares each with all 256 vectors c of the group. |x - c|^2 without
|x|^2, which is the same for every vector, is one product of integers that float16 holds. Moved up by an offset,
distances lie in [2**23, 2**25): those below 2**24 are exact in float32, and the nearest vector's is one of them
(`Groups.is_near`); what is rounded is farther, and stays so. All have an exponent of 150 or 151, so that their last 24
bits order them. These and the number of a vector fit into 32 bits: the least of such keys is the first of the nearest.
"""

import torch
import triton
import triton.language as tl

from .. import reference
from ..reference.vector_quantize import CONSTANT_PLACES, OFFSET_STEP, Groups, group_runs
from .capability import capability

# places of a short vector, the least that tensor cores multiply. Of those of any vector 8 hold |c|^2 and the offset, in
# two halves that products may be summed in one after the other, the others its numbers: those 8 are the odd ones of a
# short vector, the last ones of a long one
SHORT_PLACES, CONSTANTS, STEP = tl.constexpr(16), tl.constexpr(CONSTANT_PLACES), tl.constexpr(OFFSET_STEP)
# places of the longest vectors
MOST_PLACES = 256
# vectors that tokens are compared with at once
WIDTH = tl.constexpr(64)
# 1.5 * 2**23: a float32 of that size has no fraction
WHOLE = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["first_group"])
def vectors_kernel(
    table,  # [entries] int16
    first_entry,  # [groups] int32
    first_place,  # [groups] int32
    sizes,  # [groups] int32
    limits,  # [groups] float32
    vectors,  # float16: of each group [256, its places]
    first_group,
    PLACES: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    size, limit = tl.load(sizes + group), tl.load(limits + group)
    table += tl.load(first_entry + group)
    row, place = tl.program_id(1) * 64 + tl.arange(0, 64)[:, None], tl.arange(0, PLACES)[None, :]
    is_number, number, idx = place < PLACES - CONSTANTS, place, place - (PLACES - CONSTANTS)
    if PLACES == SHORT_PLACES:
        is_number, number, idx = place % 2 == 0, place // 2, place // 2
    numbers = tl.load(table + row * size + number, mask=is_number & (number < size), other=0).to(tl.int32)
    square = tl.sum(numbers * numbers, 1)[:, None]
    # in digits that float16 holds; `factors` says what they are multiplied by
    offset = 1024 + (size * limit * limit / STEP).to(tl.int32) + 1
    digit = tl.where(idx == 0, square >> 20 << 10, tl.where(idx == 1, square >> 10 & 1023, square & 1023))
    digit = tl.where(idx < 3, digit, tl.where(idx == 4, offset * (STEP // 1024), 0))
    vectors += tl.load(first_place + group).to(tl.int64) * 256 + row * PLACES + place
    tl.store(vectors, tl.where(is_number, numbers, digit).to(tl.float16))


@triton.jit
def factors(idx):
    """What stands at the constant places of a token."""
    return tl.where(idx == 2, 1.0, tl.where(idx < 5, 1024.0, 0.0)).to(tl.float16)


@triton.jit
def read_numbers(x, tokens, is_token, size, stride, scale, limit, WIDTH: tl.constexpr):
    """Numbers of tokens on the grid, times -2, `[tokens, WIDTH]` float16."""
    place = tl.arange(0, WIDTH)[None, :]
    number = tl.load(x + tokens[:, None] * stride + place, mask=is_token[:, None] & (place < size), other=0.0)
    # a GPU clamps NaN to a limit
    clamped = tl.minimum(tl.maximum(number * scale, -limit), limit)
    number = tl.where(number == number, clamped, number)
    # to the nearest integer, ties to the even one
    return (-2 * ((number + WHOLE) - WHOLE)).to(tl.float16)


@triton.jit
def read_vectors(vectors, first, PLACES: tl.constexpr, WIDTH: tl.constexpr):
    """`WIDTH` vectors from `first` on, `[PLACES, WIDTH]` float16."""
    row, place = first + tl.arange(0, WIDTH)[None, :], tl.arange(0, PLACES)[:, None]
    return tl.load(vectors + row * PLACES + place)


@triton.jit
def least_key(numbers, held, first, WIDTH: tl.constexpr):
    """Of tokens and `WIDTH` vectors from `first` on, which are `held`."""
    distance = tl.dot(numbers, held)
    number = first + tl.arange(0, WIDTH)[None, :]
    return tl.min((distance.to(tl.uint32, bitcast=True) << 8) + number.to(tl.uint32), 1)


# one kernel for vectors of many sizes: compiling takes longer than a prompt
@triton.jit(do_not_specialize=["num_tokens", "num_components", "num_bytes", "first_group"])
def assign_kernel(
    x,  # [tokens, components] float32
    vectors,  # float16, what `vectors_kernel` wrote
    first_component,  # [groups] int32
    first_place,  # [groups] int32
    sizes,  # [groups] int32
    byte_idx,  # [groups] int32
    steps,  # [groups] float32
    limits,  # [groups] float32
    codes,  # [tokens, bytes] uint8
    num_tokens,
    num_components,
    num_bytes,
    first_group,
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    scale, limit = tl.div_rn(1.0, tl.load(steps + group)), tl.load(limits + group)
    size, byte = tl.load(sizes + group), tl.load(byte_idx + group)
    x += tl.load(first_component + group)
    vectors += tl.load(first_place + group).to(tl.int64) * 256
    # distances to all vectors at once would take all registers
    first = read_vectors(vectors, 0, SHORT_PLACES, WIDTH)
    second = read_vectors(vectors, WIDTH, SHORT_PLACES, WIDTH)
    third = read_vectors(vectors, 2 * WIDTH, SHORT_PLACES, WIDTH)
    fourth = read_vectors(vectors, 3 * WIDTH, SHORT_PLACES, WIDTH)
    constants = factors(tl.arange(0, CONSTANTS)[None, :]).broadcast_to(BLOCK_TOKENS, CONSTANTS)
    begin = tl.program_id(1) * TOKENS
    for at in range(begin, tl.minimum(begin + TOKENS, num_tokens), BLOCK_TOKENS):
        tokens = (at + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        is_token = tokens < num_tokens
        own = read_numbers(x, tokens, is_token, size, num_components, scale, limit, CONSTANTS)
        # number, constant, number, ..
        numbers = tl.join(own, constants).reshape(BLOCK_TOKENS, SHORT_PLACES)
        least = least_key(numbers, first, 0, WIDTH)
        least = tl.minimum(least, least_key(numbers, second, WIDTH, WIDTH))
        least = tl.minimum(least, least_key(numbers, third, 2 * WIDTH, WIDTH))
        least = tl.minimum(least, least_key(numbers, fourth, 3 * WIDTH, WIDTH))
        # a token with NaN has equal keys but for the numbers: 0, as in the reference
        code = least & 255
        tl.store(codes + tokens * num_bytes + byte, code.to(tl.uint8), mask=is_token)


@triton.jit(do_not_specialize=["num_tokens", "num_components", "num_bytes", "first_group"])
def assign_long_kernel(
    x,  # as of `assign_kernel`
    vectors,
    first_component,
    first_place,
    sizes,
    byte_idx,
    steps,
    limits,
    codes,
    num_tokens,
    num_components,
    num_bytes,
    first_group,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    scale, limit = tl.div_rn(1.0, tl.load(steps + group)), tl.load(limits + group)
    size, byte = tl.load(sizes + group), tl.load(byte_idx + group)
    x += tl.load(first_component + group)
    vectors += tl.load(first_place + group).to(tl.int64) * 256
    tokens = (tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    is_token = tokens < num_tokens
    numbers = read_numbers(x, tokens, is_token, size, num_components, scale, limit, PLACES)
    place = tl.arange(0, PLACES)[None, :] - (PLACES - CONSTANTS)
    numbers = tl.where(place < 0, numbers, factors(place))
    least = tl.full([BLOCK_TOKENS], 0xFFFFFFFF, tl.uint32)
    for first in range(0, 256, WIDTH):
        held = read_vectors(vectors, first, PLACES, WIDTH)
        least = tl.minimum(least, least_key(numbers, held, first, WIDTH))
    code = least & 255
    tl.store(codes + tokens * num_bytes + byte, code.to(tl.uint8), mask=is_token)


def tile(capability: int) -> dict[str, int]:
    """Tokens of a program and of a tile of short vectors, for a card of that compute capability."""
    if capability == 90:
        # products of four warps, from shared memory
        return {"TOKENS": 512, "BLOCK_TOKENS": 128, "num_warps": 4, "num_stages": 1}
    return {"TOKENS": 512, "BLOCK_TOKENS": 16, "num_warps": 1}


def long_tile(capability: int, num_places: int) -> dict[str, int]:
    """Tokens and vectors of a tile of long vectors of so many places."""
    tokens, width = 64 if capability >= 80 else 32, min(64, 4096 // num_places)
    if capability == 90 and num_places <= 64:
        tokens = 128
    return {"PLACES": num_places, "BLOCK_TOKENS": tokens, "WIDTH": width, "num_warps": 4, "num_stages": 2}


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    groups: Groups | None = None,
) -> torch.Tensor:
    """See `reference.vector_quantize`."""
    x, groups = x.contiguous(), group_runs(starts, tables, steps) if groups is None else groups
    if not groups.is_near or any(num_places > MOST_PLACES for *_, num_places in groups.classes):
        return reference.vector_quantize(x, starts, tables, steps, groups)
    num_tokens, num_groups = x.shape[0] * x.shape[1], len(groups.size)
    codes = x.new_empty(*x.shape[:2], num_groups, dtype=torch.uint8)
    if not num_tokens or not num_groups:
        return codes
    vectors, card = x.new_empty(256 * groups.num_places, dtype=torch.float16), capability(x.device)
    for first, count, num_places in groups.classes:
        kept = groups.table, groups.first_entry, groups.first_place, groups.size, groups.limit
        vectors_kernel[(count, 4)](*kept, vectors, first, PLACES=num_places)
        is_short = num_places == SHORT_PLACES.value
        shape = tile(card) if is_short else long_tile(card, num_places)
        kernel = assign_kernel if is_short else assign_long_kernel
        # groups of the same tokens run side by side: their numbers are neighbours
        kernel[(count, triton.cdiv(num_tokens, shape["TOKENS" if is_short else "BLOCK_TOKENS"]))](
            *(x, vectors, groups.first_component, groups.first_place, groups.size, groups.byte_idx),
            *(groups.step, groups.limit, codes, num_tokens, x.shape[-1], num_groups, first),
            **shape,
        )
    return codes
