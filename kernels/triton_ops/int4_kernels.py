"""The kernel of `int4_decode`: products on tensor cores that take the codes as they are.

Scales stay outside the products. A tensor core multiplies by no fewer than 16 columns, a group of heads has about four
queries: the other columns are the same queries times the scales of other blocks of keys, or the same weights times the
scales of other groups of channels. Of what they give, each token and each channel takes its own. Minima are added as
sums, in float32.

A code is no number yet: its bits in a float16 are a tiny one (a subnormal number, code / 2**24), which tensor cores
multiply exactly. Unpacking is therefore one `and` for two numbers.
"""

import triton
import triton.language as tl

from .attend_kernels import LARGEST_WEIGHT, LOG2E, LOWEST

# tokens of a block of keys, channels of a group of values
GROUP = tl.constexpr(32)
# weights times scales are at most this: small ones are not lost in float16 either
LARGEST = tl.constexpr(32768.0)
# of two bytes of a word, the codes in the low bits or those in the high ones
LOW, HIGH = tl.constexpr(0x000F000F), tl.constexpr(0x00F000F0)
# what the width of loads does not depend on is no reason to compile anew
ANY = "num_tokens span num_heads num_queries mask_row mask_head mask_query mask_token".split()


@triton.jit
def byte_of(place):
    """Of a number that was unpacked: bytes 0 and 2 of a word stand side by side, then 1 and 3."""
    return place // 4 * 4 + place % 2 * 2 + place // 2 % 2


@triton.jit
def unpack(words, MASK: tl.constexpr, IS_EXACT: tl.constexpr):
    """`[rows, words]` int32 -> what `MASK` takes of each byte: `[rows, 4 * words]` float32, or float16 times 2**-24."""
    pairs = tl.join(words & MASK, (words >> 8) & MASK)
    codes = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    codes = tl.reshape(codes, [words.shape[0], 4 * words.shape[1]])
    return codes.to(tl.float32) if IS_EXACT else codes.to(tl.float16, bitcast=True)


@triton.jit
def load(spot, mask, IS_WHOLE: tl.constexpr):
    return tl.load(spot) if IS_WHOLE else tl.load(spot, mask=mask, other=0)


@triton.jit
def levels_of(words):
    """Scale and minimum, float16."""
    return words.to(tl.int16).to(tl.float16, bitcast=True), (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit(do_not_specialize=ANY)
def int4_kernel(
    query,  # [batch, heads, queries, 8 * key_words] floating
    key_codes,  # [batch, heads, slots, key_words] int32
    key_levels,  # [batch, heads, slots / 32, 8 * key_words] int32
    value_codes,  # [batch, heads, slots / 32, 8 * value_words, 4] int32
    value_levels,  # [batch, heads, slots, value_words / 4] int32
    mask,  # float32
    block_table,  # [batch, blocks] int32
    lengths,  # [batch] int32
    all_scores,  # [batch, heads, queries, tokens] float32
    maxima,  # [splits, batch, heads * queries] float32, powers of two
    totals,  # [splits, batch, heads * queries] float32, times LARGEST_WEIGHT
    mixed,  # [splits, batch, heads * queries, 8 * value_words] float32, times LARGEST_WEIGHT
    query_scale,
    num_tokens,
    span,
    num_heads,
    num_queries,
    key_row,  # strides of batch rows and heads
    key_head,
    key_level_row,
    key_level_head,
    value_row,
    value_head,
    value_level_row,
    value_level_head,
    mask_row,  # strides of `mask`, 0 where it is shared
    mask_head,
    mask_query,
    mask_token,
    HAS_MASK: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    KEEPS_SCORES: tl.constexpr,
    IS_EXACT: tl.constexpr,  # products in float32
    KEY_WORDS: tl.constexpr,  # of a token
    VALUE_WORDS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,  # KEY_WORDS rounded up to a power of two
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,  # of value channels, likewise
    BLOCK_TOKENS: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_TOKENS // GROUP
    HALF: tl.constexpr = BLOCK_TOKENS // 2
    CHANNELS: tl.constexpr = GROUPS * GROUP
    DTYPE: tl.constexpr = tl.float32 if IS_EXACT else tl.float16
    # what a product of codes is multiplied by
    UNIT: tl.constexpr = 1.0 if IS_EXACT else 16777216.0
    head, row = tl.program_id(1) % num_heads, tl.program_id(2).to(tl.int64)
    asked = tl.program_id(1) // num_heads * QUERIES + tl.arange(0, QUERIES)
    is_query = asked < num_queries
    rows = (row * num_heads + head) * num_queries + asked
    key_codes += row * key_row + head.to(tl.int64) * key_head
    key_levels += row * key_level_row + head.to(tl.int64) * key_level_head
    value_codes += row * value_row + head.to(tl.int64) * value_head
    value_levels += row * value_level_row + head.to(tl.int64) * value_level_head
    end = num_tokens
    if HAS_LENGTHS:
        end = tl.minimum(end, tl.load(lengths + row))

    word, byte = tl.arange(0, KEY_BLOCK), byte_of(tl.arange(0, 4 * KEY_BLOCK))
    group, channel, quarter = tl.arange(0, GROUPS), tl.arange(0, CHANNELS), tl.arange(0, 4 * BLOCKS)
    # [bytes, 1, QUERIES], of the low codes and of the high ones
    number = query + rows[None, :] * (8 * KEY_WORDS) + byte[:, None]
    is_number = (byte < 4 * KEY_WORDS)[:, None] & is_query[None, :]
    low_query = tl.load(number, mask=is_number, other=0.0).to(tl.float32)[:, None, :]
    high_query = tl.load(number + 4 * KEY_WORDS, mask=is_number, other=0.0).to(tl.float32)[:, None, :]
    # at most 1, so that no product with a scale leaves the range of float16; by a power of two, which rounds nothing
    strength = tl.maximum(tl.maximum(tl.max(tl.abs(low_query)), tl.max(tl.abs(high_query))), 1e-30)
    strength = tl.exp2(tl.ceil(tl.log2(strength)))
    low_query, high_query = low_query / strength, high_query / strength
    # high codes stand 16 times as high
    low_half, high_half = low_query.to(DTYPE), (high_query / 16).to(DTYPE)
    strength *= query_scale * LOG2E

    maximum = tl.full([QUERIES], LOWEST, tl.float32)
    # of each place in a tile, to be put together at the end
    total = tl.zeros([BLOCK_TOKENS, QUERIES], tl.float32)
    bottom = tl.zeros([BLOCK_TOKENS, GROUPS, QUERIES], tl.float32)
    sums = tl.zeros([CHANNELS, GROUPS * QUERIES], tl.float32)
    # tokens as values are unpacked: first those of low codes
    place = tl.arange(0, BLOCK_TOKENS)
    place = place % HALF // 16 * GROUP + place // HALF * 16 + byte_of(place % 16)
    own = (place[:, None] // GROUP == tl.arange(0, BLOCKS)[None, :])[:, :, None]
    begin = tl.program_id(0) * span
    for start in range(begin, tl.minimum(begin + span, end), BLOCK_TOKENS):
        token = start + place
        # behind the end the last token is read again: cheaper than not to read
        slot = tl.minimum(token, end - 1)
        block = tl.minimum(start + tl.arange(0, BLOCKS) * GROUP, end - 1) // GROUP
        value_block = tl.minimum(start + quarter // 4 * GROUP, end - 1) // GROUP
        if HAS_TABLE:
            table = block_table + row * (num_tokens // GROUP)
            if BLOCKS == 1:
                # one number for the whole tile
                first = tl.load(table + start // GROUP)
                slot, block, value_block = first * GROUP + slot - start, first + block * 0, first + value_block * 0
            else:
                slot = tl.load(table + slot // GROUP) * GROUP + slot % GROUP
                block, value_block = tl.load(table + block), tl.load(table + value_block)

        # queries times the scales of each block: [bytes, BLOCKS, QUERIES]
        spot = key_levels + block[None, :] * (8 * KEY_WORDS) + byte[:, None]
        is_level = (byte < 4 * KEY_WORDS)[:, None]
        low_scale, low = levels_of(load(spot, is_level, KEY_BLOCK == KEY_WORDS))
        high_scale, high = levels_of(load(spot + 4 * KEY_WORDS, is_level, KEY_BLOCK == KEY_WORDS))
        lowest = low_query * low.to(tl.float32)[:, :, None] + high_query * high.to(tl.float32)[:, :, None]
        lowest = tl.sum(lowest, 0) * strength
        # scales as large as float16 has room for, by a power of two again
        most = tl.max(tl.maximum(low_scale, high_scale).to(tl.float32))
        raised = tl.exp2(15 - tl.ceil(tl.log2(tl.maximum(most, 1.0))))
        low_scale, high_scale = low_scale * raised.to(tl.float16), high_scale * raised.to(tl.float16)
        low_fold = tl.reshape(low_half * low_scale[:, :, None], [4 * KEY_BLOCK, BLOCKS * QUERIES])
        high_fold = tl.reshape(high_half * high_scale[:, :, None], [4 * KEY_BLOCK, BLOCKS * QUERIES])
        words = key_codes + slot[:, None] * KEY_WORDS + word[None, :]
        words = load(words, (word < KEY_WORDS)[None, :], KEY_BLOCK == KEY_WORDS)
        scores = tl.dot(unpack(words, LOW, IS_EXACT), low_fold, input_precision="ieee")
        scores = tl.dot(unpack(words, HIGH, IS_EXACT), high_fold, scores, input_precision="ieee")
        scores = tl.reshape(scores, [BLOCK_TOKENS, BLOCKS, QUERIES]) * (strength * UNIT / raised) + lowest[None]
        # [BLOCK_TOKENS, QUERIES]
        scores = tl.sum(tl.where(own, scores, 0.0), 1)
        is_token = token < end
        if HAS_MASK:
            spot = row * mask_row + head * mask_head + asked[None, :] * mask_query
            spot = mask + spot + token.to(tl.int64)[:, None] * mask_token
            scores += tl.load(spot, mask=is_token[:, None] & is_query[None, :], other=0.0) * LOG2E
        scores = tl.where(is_token[:, None], scores, float("-inf"))
        if KEEPS_SCORES:
            spot = all_scores + rows[None, :] * num_tokens + token[:, None]
            tl.store(spot, scores / LOG2E, mask=is_token[:, None] & is_query[None, :])
        largest = tl.maximum(maximum, tl.max(scores, 0))
        weight = tl.exp2(scores - largest[None, :])
        shrink = tl.exp2(maximum - largest)
        maximum, total = largest, total * shrink[None, :] + weight

        # weights times the scales of each group: [BLOCK_TOKENS, GROUPS, QUERIES], as large as float16 has room for
        spot = value_levels + slot[:, None] * (VALUE_WORDS // 4) + group[None, :]
        scale, low = levels_of(load(spot, (group < VALUE_WORDS // 4)[None, :], GROUPS == VALUE_WORDS // 4))
        scale, low = scale.to(tl.float32), low.to(tl.float32)
        bottom = bottom * shrink[None, None, :] + weight[:, None, :] * low[:, :, None]
        most = tl.maximum(tl.max(scale), 1e-30)
        fold = weight[:, None, :] * (scale * (LARGEST / most))[:, :, None]
        fold = tl.permute(tl.reshape(fold, [2, HALF, GROUPS * QUERIES]), (1, 2, 0))
        low_fold, high_fold = tl.split(fold)
        words = value_codes + (value_block * (32 * VALUE_WORDS) + quarter % 4)[None, :] + channel[:, None] * 4
        words = load(words, (channel < 8 * VALUE_WORDS)[:, None], GROUPS == VALUE_WORDS // 4)
        part = tl.dot(unpack(words, LOW, IS_EXACT), low_fold.to(DTYPE), input_precision="ieee")
        part = tl.dot(unpack(words, HIGH, IS_EXACT), (high_fold / 16).to(DTYPE), part, input_precision="ieee")
        shrink = tl.reshape(tl.broadcast_to(shrink[None, :], [GROUPS, QUERIES]), [GROUPS * QUERIES])[None, :]
        sums = sums * shrink + part * (most * (UNIT / LARGEST))

    held = (tl.program_id(0) * tl.num_programs(2) + row) * num_heads * num_queries + head * num_queries + asked
    tl.store(maxima + held, maximum, mask=is_query)
    tl.store(totals + held, tl.sum(total, 0) * LARGEST_WEIGHT, mask=is_query)
    # of all groups' columns each channel's own, with what the minima of that group add
    sums = tl.reshape(sums, [CHANNELS, GROUPS, QUERIES]) + tl.sum(bottom, 0)[None]
    own = (channel[:, None] // GROUP == group[None, :])[:, :, None]
    sums = tl.sum(tl.where(own, sums, 0.0), 1)
    spot = mixed + held[None, :] * (8 * VALUE_WORDS) + channel[:, None]
    tl.store(spot, sums * LARGEST_WEIGHT, mask=(channel < 8 * VALUE_WORDS)[:, None] & is_query[None, :])
