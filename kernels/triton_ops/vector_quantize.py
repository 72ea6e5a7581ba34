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
from ..reference.vector_quantize import OFFSET_STEP, SHORT, Groups, group_runs
from .capability import capability

# places of a block, the least that tensor cores multiply at once; the even ones of a group's first block hold numbers,
# the odd ones |c|^2 and the offset, in two halves that products may be summed in one after the other
PLACES, OWN, STEP = tl.constexpr(16), tl.constexpr(SHORT), tl.constexpr(OFFSET_STEP)
# vectors that tokens are compared with at once
WIDTH = tl.constexpr(64)
# 1.5 * 2**23: a float32 of that size has no fraction
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def vectors_kernel(
    table,  # [entries] int16
    first_entry,  # [groups] int32
    first_block,  # [groups] int32
    sizes,  # [groups] int32
    limits,  # [groups] float32
    vectors,  # [blocks, 256, PLACES] float16: of each group one block or more
):
    group = tl.program_id(0)
    size, limit = tl.load(sizes + group), tl.load(limits + group)
    table += tl.load(first_entry + group)
    row, place = tl.arange(0, 256)[:, None], tl.arange(0, PLACES)[None, :]
    vectors += tl.load(first_block + group).to(tl.int64) * 256 * PLACES + row * PLACES + place
    idx = place // 2
    is_number = (place % 2 == 0) & (idx < size)
    numbers = tl.load(table + row * size + idx, mask=is_number, other=0).to(tl.int32)
    square = tl.sum(numbers * numbers, 1)
    for first in range(OWN, size, PLACES):
        more = tl.load(table + row * size + first + place, mask=first + place < size, other=0).to(tl.int32)
        square += tl.sum(more * more, 1)
        tl.store(vectors + ((first - OWN) // PLACES + 1) * 256 * PLACES, more.to(tl.float16))
    # in digits that float16 holds; `constant_places` says what they are multiplied by
    square, offset = square[:, None], 1024 + (size * limit * limit / STEP).to(tl.int32) + 1
    digit = tl.where(idx == 0, square >> 20 << 10, tl.where(idx == 1, square >> 10 & 1023, square & 1023))
    digit = tl.where(idx < 3, digit, tl.where(idx == 4, offset * (STEP // 1024), 0))
    tl.store(vectors, tl.where(place % 2 == 0, numbers, digit).to(tl.float16))


@triton.jit
def constant_places(BLOCK_TOKENS: tl.constexpr):
    """What stands at the odd places of a token, `[BLOCK_TOKENS, OWN]` float16."""
    idx = tl.arange(0, OWN)[None, :]
    factor = tl.where(idx == 2, 1.0, tl.where(idx < 5, 1024.0, 0.0)).to(tl.float16)
    return factor.broadcast_to(BLOCK_TOKENS, OWN)


@triton.jit
def read_numbers(x, tokens, is_token, first, size, stride, scale, limit, WIDTH: tl.constexpr):
    """Numbers `first ..` of tokens on the grid, times -2, `[tokens, WIDTH]` float16."""
    place = first + tl.arange(0, WIDTH)[None, :]
    number = tl.load(x + tokens[:, None] * stride + place, mask=is_token[:, None] & (place < size), other=0.0)
    # a GPU clamps NaN to a limit
    clamped = tl.minimum(tl.maximum(number * scale, -limit), limit)
    number = tl.where(number == number, clamped, number)
    # to the nearest integer, ties to the even one
    return (-2 * ((number + WHOLE) - WHOLE)).to(tl.float16)


@triton.jit
def read_vectors(vectors, first):
    """A block of `WIDTH` vectors from `first` on, `[PLACES, WIDTH]` float16."""
    row, place = first + tl.arange(0, WIDTH)[None, :], tl.arange(0, PLACES)[:, None]
    return tl.load(vectors + row * PLACES + place)


@triton.jit
def least_key(numbers, held, first, vectors, x, tokens, is_token, size, stride, scale, limit, IS_LONG: tl.constexpr):
    """Of tokens and `WIDTH` vectors from `first` on, whose first block is `held`."""
    distance = tl.dot(numbers, held)
    if IS_LONG:
        for start in range(OWN, size, PLACES):
            vectors += 256 * PLACES
            more = read_numbers(x, tokens, is_token, start, size, stride, scale, limit, PLACES)
            distance = tl.dot(more, read_vectors(vectors, first), distance)
    number = first + tl.arange(0, WIDTH)[None, :]
    return tl.min((distance.to(tl.uint32, bitcast=True) << 8) + number.to(tl.uint32), 1)


# one kernel for vectors of all sizes: compiling takes longer than a prompt
@triton.jit(do_not_specialize=["num_tokens", "num_components", "num_bytes", "first_group"])
def assign_kernel(
    x,  # [tokens, components] float32
    vectors,  # [blocks, 256, PLACES] float16, what `vectors_kernel` wrote
    first_component,  # [groups] int32
    first_block,  # [groups] int32
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
    TOKENS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = first_group + tl.program_id(0)
    scale, limit = tl.div_rn(1.0, tl.load(steps + group)), tl.load(limits + group)
    size, byte = tl.load(sizes + group), tl.load(byte_idx + group)
    x += tl.load(first_component + group)
    vectors += tl.load(first_block + group).to(tl.int64) * 256 * PLACES
    # distances to all vectors at once would take all registers
    first, second = read_vectors(vectors, 0), read_vectors(vectors, WIDTH)
    third, fourth = read_vectors(vectors, 2 * WIDTH), read_vectors(vectors, 3 * WIDTH)
    constants = constant_places(BLOCK_TOKENS)
    begin = tl.program_id(1) * TOKENS
    for at in range(begin, tl.minimum(begin + TOKENS, num_tokens), BLOCK_TOKENS):
        tokens = (at + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
        is_token = tokens < num_tokens
        own = read_numbers(x, tokens, is_token, 0, size, num_components, scale, limit, OWN)
        # number, constant, number, ..
        numbers = tl.join(own, constants).reshape(BLOCK_TOKENS, PLACES)
        rest = vectors, x, tokens, is_token, size, num_components, scale, limit, IS_LONG
        least = least_key(numbers, first, 0, *rest)
        least = tl.minimum(least, least_key(numbers, second, WIDTH, *rest))
        least = tl.minimum(least, least_key(numbers, third, 2 * WIDTH, *rest))
        least = tl.minimum(least, least_key(numbers, fourth, 3 * WIDTH, *rest))
        # a token with NaN has equal keys but for the numbers: 0, as in the reference
        code = least & 255
        tl.store(codes + tokens * num_bytes + byte, code.to(tl.uint8), mask=is_token)


def tile(capability: int, is_long: bool) -> dict[str, int]:
    """Tokens of a program and of a tile, for a card of that compute capability and vectors of more numbers than OWN."""
    if capability == 90 and not is_long:
        # products of four warps, from shared memory
        return {"TOKENS": 512, "BLOCK_TOKENS": 128, "num_warps": 4, "num_stages": 1}
    # long vectors are few: shorter programs keep all processors busy
    return {"TOKENS": 64 if is_long else 512, "BLOCK_TOKENS": 16, "num_warps": 1}


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    groups: Groups | None = None,
) -> torch.Tensor:
    """See `reference.vector_quantize`."""
    x, groups = x.contiguous(), group_runs(starts, tables, steps) if groups is None else groups
    if not groups.is_near:
        return reference.vector_quantize(x, starts, tables, steps, groups)
    num_tokens, num_groups = x.shape[0] * x.shape[1], len(groups.size)
    codes = x.new_empty(*x.shape[:2], num_groups, dtype=torch.uint8)
    if not num_tokens or not num_groups:
        return codes
    vectors = x.new_empty(groups.num_blocks, 256, PLACES.value, dtype=torch.float16)
    places = groups.table, groups.first_entry, groups.first_block, groups.size, groups.limit
    vectors_kernel[(num_groups,)](*places, vectors)
    for first, count, is_long in groups.classes:
        shape = tile(capability(x.device), is_long)
        # groups of the same tokens run side by side: their numbers are neighbours
        assign_kernel[(count, triton.cdiv(num_tokens, shape["TOKENS"]))](
            *(x, vectors, groups.first_component, groups.first_block, groups.size, groups.byte_idx),
            *(groups.step, groups.limit, codes, num_tokens, x.shape[-1], num_groups, first),
            IS_LONG=is_long,
            **shape,
        )
    return codes
