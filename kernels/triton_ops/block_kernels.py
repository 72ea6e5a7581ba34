"""The kernel of `attend_blocks`: tokens are gathered from blocks, keys are rotated in registers."""

import triton
import triton.language as tl

from .attend_kernels import LARGEST_WEIGHT, LOG2E, LOWEST

# what the width of loads does not depend on is no reason to compile anew
ANY = (
    "num_tokens span block_size num_heads num_queries table_stride angle_rows position_stride mean_stride "
    "mask_row mask_head mask_query mask_token"
).split()


@triton.jit
def load_columns(blocks, mean, offset, factor, column, is_token, is_column, IS_FUSED: tl.constexpr):
    """Of tokens that begin at `offset` some columns: `[tokens, columns]` float32."""
    is_read = is_token[:, None] & is_column[None, :]
    states = tl.load(blocks + offset[:, None] + column[None, :], mask=is_read, other=0.0).to(tl.float32)
    if IS_FUSED:
        added = tl.load(mean + column, mask=is_column, other=0.0)
        states = factor[:, None] * states + (1 - factor)[:, None] * added[None, :]
    return states


@triton.jit(do_not_specialize=ANY)
def block_kernel(
    query,  # [batch, heads, queries, HEAD_DIM] floating
    blocks,  # [pool, block_size, width]
    block_table,  # [batch, n_blocks] int64 or int32
    leader,  # [slots] int32
    factors,  # [slots, 2] float32
    mean,  # [batch or 1, width] float32
    cos,  # [batch or 1, positions, PAIRS] floating
    sin,
    positions,  # [batch, num_tokens] int32
    mask,  # float32
    lengths,  # [batch] int32
    maxima,  # [spans, batch * heads * queries] float32, powers of two
    totals,  # [spans, batch * heads * queries] float32, times LARGEST_WEIGHT
    mixed,  # [spans, batch * heads * queries, VALUE_DIM] float32, times LARGEST_WEIGHT
    scale,
    num_tokens,
    span,  # tokens of a program
    block_size,
    block_stride,
    token_stride,
    table_stride,
    num_heads,
    num_queries,
    angle_rows,  # positions that `cos` and `sin` have for each row; 0 if all rows share them
    position_stride,
    mean_stride,  # 0 if all rows share it
    mask_row,  # strides of `mask`, 0 where it is shared
    mask_head,
    mask_query,
    mask_token,
    IS_FUSED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,  # 0: keys are not rotated
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DTYPE: tl.constexpr,  # of products
):
    head = tl.program_id(2)
    batch_row, own_head = (head // num_heads).to(tl.int64), head % num_heads
    asked = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_query = asked < num_queries
    rows, num_rows = head * num_queries + asked, tl.num_programs(2) * num_queries
    channel, column = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    is_channel, is_column, is_turned = channel < HEAD_DIM, column < VALUE_DIM, channel < 2 * PAIRS
    # of each channel what it is turned with, and where that one's angle stands
    if INTERLEAVED:
        is_first, partner, pair = channel % 2 == 0, channel ^ 1, channel // 2
    else:
        is_first = channel < PAIRS
        partner, pair = (
            tl.where(is_first, channel + PAIRS, channel - PAIRS),
            tl.where(is_first, channel, channel - PAIRS),
        )
    sign = tl.where(is_first, -1.0, 1.0)
    if IS_FUSED:
        mean += batch_row * mean_stride
    first_key, first_value = own_head * HEAD_DIM, num_heads * HEAD_DIM + own_head * VALUE_DIM
    # [KEY_BLOCK, ROWS]
    q = query + rows[None, :].to(tl.int64) * HEAD_DIM + channel[:, None]
    q = tl.load(q, mask=is_channel[:, None] & is_query[None, :], other=0.0).to(DTYPE)
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([VALUE_BLOCK, ROWS], tl.float32)
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths + batch_row))
    begin = tl.program_id(0) * span
    for start in range(begin, tl.minimum(begin + span, end), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        is_token = token < end
        slot = tl.load(block_table + batch_row * table_stride + token // block_size, mask=is_token, other=0)
        place, key_factor, value_factor = slot, 1.0, 1.0
        if IS_FUSED:
            place = tl.load(leader + slot, mask=is_token, other=0)
            key_factor = tl.load(factors + 2 * slot, mask=is_token, other=1.0)
            value_factor = tl.load(factors + 2 * slot + 1, mask=is_token, other=1.0)
        offset = place.to(tl.int64) * block_stride + token % block_size * token_stride
        keys = load_columns(blocks, mean, offset, key_factor, first_key + channel, is_token, is_channel, IS_FUSED)
        if PAIRS > 0:
            position = token
            if HAS_POSITIONS:
                position = tl.load(positions + batch_row * position_stride + token, mask=is_token, other=0)
            # a multiple of PAIRS all along: for whole words
            angle = (batch_row * angle_rows + position)[:, None] * PAIRS + pair[None, :]
            has_angle = is_token[:, None] & is_turned[None, :]
            c = tl.load(cos + angle, mask=has_angle, other=1.0).to(tl.float32)
            s = tl.load(sin + angle, mask=has_angle, other=0.0).to(tl.float32)
            others = load_columns(blocks, mean, offset, key_factor, first_key + partner, is_token, is_turned, IS_FUSED)
            keys = keys * c + others * (s * sign[None, :])
        scores = tl.dot(keys.to(DTYPE), q, input_precision="ieee") * (scale * LOG2E)
        if HAS_MASK:
            spot = (own_head * mask_head + asked * mask_query)[None, :] + token.to(tl.int64)[:, None] * mask_token
            spot += batch_row * mask_row
            added = tl.load(mask + spot, mask=is_token[:, None] & is_query[None, :], other=0.0)
            scores += added.to(tl.float32) * LOG2E
        scores = tl.where(is_token[:, None], scores, float("-inf"))
        largest = tl.maximum(maximum, tl.max(scores, 0))
        weight = tl.exp2(scores - largest[None, :]) * LARGEST_WEIGHT
        shrink = tl.exp2(maximum - largest)
        total = total * shrink + tl.sum(weight, 0)
        values = load_columns(blocks, mean, offset, value_factor, first_value + column, is_token, is_column, IS_FUSED)
        part = tl.dot(tl.trans(values.to(DTYPE)), weight.to(DTYPE), input_precision="ieee")
        sums, maximum = sums * shrink[None, :] + part, largest
    held = tl.program_id(0) * num_rows + rows
    tl.store(maxima + held, maximum, mask=is_query)
    tl.store(totals + held, total, mask=is_query)
    spot = mixed + held.to(tl.int64)[None, :] * VALUE_DIM + column[:, None]
    tl.store(spot, sums, mask=is_column[:, None] & is_query[None, :])
