"""Kernels of `choose`: weights become keys of 16 bits, which are counted; the tokens below a bound are written down.

A key is the distance to weight 1 in steps of its logarithm, so the smallest are chosen. Keys are counted by their high
byte and by themselves: from the one sort of counts follows the byte in which the bound lies, from the other the bound.
"""

import triton
import triton.language as tl

from .attend_kernels import LOG2E, LOWEST
from .merge_kernels import log_of

ANY = "num_tokens num_rows num_spans budget span room".split()
# a row's counters: of each high byte, then of each key; the last key is not counted
BYTES, KEYS = tl.constexpr(256), tl.constexpr(65536)
LAST, STEPS = tl.constexpr(65535), tl.constexpr(1024)


@triton.jit(do_not_specialize=ANY)
def sum_kernel(
    scores,  # [batch * rows, room] float32
    maxima,  # [batch * rows, spans] float32, powers of two
    totals,  # [batch * rows, spans] float32
    counters,  # [batch, BYTES + KEYS] int32, to become zero
    num_tokens,
    span,  # a multiple of BLOCK
    room,
    BLOCK: tl.constexpr,
):
    """Sums of `exp(score)` of a span of a row."""
    num_spans, num_rows = tl.num_programs(0), tl.num_programs(1)
    row = tl.program_id(2) * num_rows + tl.program_id(1)
    maximum, total = tl.full([BLOCK], LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    begin = tl.program_id(0) * span
    for start in range(begin, tl.minimum(begin + span, num_tokens), BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(scores + row.to(tl.int64) * room + token, mask=token < num_tokens, other=float("-inf")) * LOG2E
        largest = tl.maximum(maximum, score)
        total = total * tl.exp2(maximum - largest) + tl.exp2(score - largest)
        maximum = largest
    most = tl.max(maximum, 0)
    tl.store(maxima + row * num_spans + tl.program_id(0), most)
    tl.store(totals + row * num_spans + tl.program_id(0), tl.sum(total * tl.exp2(maximum - most), 0))
    # all programs of a batch row share its counters
    share = tl.cdiv(BYTES + KEYS, num_spans * num_rows)
    first = (tl.program_id(1) * num_spans + tl.program_id(0)) * share
    last = tl.minimum(first + share, BYTES + KEYS)
    counters += tl.program_id(2) * (BYTES + KEYS)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(counters + place, tl.zeros([BLOCK], tl.int32), mask=place < last)


@triton.jit(do_not_specialize=ANY)
def key_kernel(
    scores,  # [batch, rows, room] float32
    maxima,  # as of sum_kernel
    totals,
    log_total,  # [batch, rows] float32
    keys,  # [batch, tokens] int32
    counters,
    num_tokens,
    num_rows,
    num_spans,
    room,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys of tokens, and how often each occurs."""
    batch_row, spans = tl.program_id(1), tl.arange(0, SPANS)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, num_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        is_row = rows < num_rows
        rows += batch_row * num_rows
        held, is_held = rows[:, None] * num_spans + spans[None, :], is_row[:, None] & (spans < num_spans)[None, :]
        maximum = tl.load(maxima + held, mask=is_held, other=LOWEST)
        most = tl.max(maximum, 1)
        total = tl.load(totals + held, mask=is_held, other=0.0) * tl.exp2(maximum - most[:, None])
        own = log_of(most, tl.sum(total, 1))
        other = tl.load(log_total + rows, mask=is_row, other=float("-inf"))
        largest = tl.maximum(tl.maximum(own, other), LOWEST)
        everywhere = largest + tl.log(tl.exp(own - largest) + tl.exp(other - largest))
        spot = scores + rows.to(tl.int64)[:, None] * room + token[None, :]
        score = tl.load(spot, mask=is_row[:, None] & is_token[None, :], other=float("-inf"))
        # a query that sees nothing has no say
        weight = score - tl.where(everywhere > LOWEST, everywhere, float("inf"))[:, None]
        best = tl.maximum(best, tl.max(tl.where(weight == weight, weight, float("-inf")), 0))
    key = tl.minimum(tl.maximum(best * -STEPS, 0.0), LAST).to(tl.int32)
    tl.store(keys + batch_row.to(tl.int64) * num_tokens + token, key, mask=is_token)
    counters += batch_row * (BYTES + KEYS)
    count = tl.histogram(key // 256, BYTES)
    tl.atomic_add(counters + tl.arange(0, BYTES), count, mask=count > 0, sem="relaxed")
    tl.atomic_add(counters + BYTES + key, tl.full([BLOCK], 1, tl.int32), mask=is_token & (key < LAST), sem="relaxed")


@triton.jit
def find_bound(counters, budget):
    """The largest key that is chosen, and how many of those that have it are."""
    place = tl.arange(0, BYTES)
    count = tl.load(counters + place)
    is_before = tl.cumsum(count, 0) < budget
    byte, below = tl.sum(is_before.to(tl.int32), 0), tl.sum(tl.where(is_before, count, 0), 0)
    count = tl.load(counters + BYTES + byte * 256 + place)
    is_before = (below + tl.cumsum(count, 0) < budget) & (place < 255)
    bound = byte * 256 + tl.sum(is_before.to(tl.int32), 0)
    return bound, budget - below - tl.sum(tl.where(is_before, count, 0), 0)


@triton.jit(do_not_specialize=ANY)
def tally_kernel(
    keys,
    counters,
    tallies,  # [batch, 2, blocks] int32
    num_tokens,
    budget,
    BLOCK: tl.constexpr,
):
    """How many tokens of a block are below the bound, and how many at it."""
    block, num_blocks, batch_row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    bound, _ = find_bound(counters + batch_row * (BYTES + KEYS), budget)
    token = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + batch_row.to(tl.int64) * num_tokens + token, mask=token < num_tokens, other=KEYS)
    tallies += batch_row * 2 * num_blocks + block
    tl.store(tallies, tl.sum((key < bound).to(tl.int32), 0))
    tl.store(tallies + num_blocks, tl.sum((key == bound).to(tl.int32), 0))


@triton.jit(do_not_specialize=ANY)
def write_kernel(
    keys,
    counters,
    tallies,
    slots,  # [batch, budget] int32
    num_tokens,
    budget,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the chosen tokens of a block behind those of the blocks before."""
    block, num_blocks, batch_row = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    bound, left = find_bound(counters + batch_row * (BYTES + KEYS), budget)
    token = block * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + batch_row.to(tl.int64) * num_tokens + token, mask=token < num_tokens, other=KEYS)
    blocks = tl.arange(0, BLOCKS)
    tallies += batch_row * 2 * num_blocks + blocks
    below = tl.sum(tl.load(tallies, mask=blocks < block, other=0), 0)
    tied = tl.sum(tl.load(tallies + num_blocks, mask=blocks < block, other=0), 0)
    # of equal tokens the first
    is_tied = (key == bound).to(tl.int32)
    is_chosen = (key < bound) | ((is_tied > 0) & (tied + tl.cumsum(is_tied, 0) <= left))
    count = is_chosen.to(tl.int32)
    place = below + tl.minimum(tied, left) + tl.cumsum(count, 0) - count
    tl.store(slots + batch_row.to(tl.int64) * budget + place, token, mask=is_chosen)
