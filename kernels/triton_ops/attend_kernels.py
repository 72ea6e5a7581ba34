"""Kernels of `reconstruct_and_attend`: decode a chunk of tokens, score it, mix it."""

import triton
import triton.language as tl

# weights are at most this: float16 holds small ones too
LARGEST_WEIGHT = tl.constexpr(2048.0)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)
# what the width of loads does not depend on is no reason to compile anew; it holds for every kernel that has the name
ANY = (
    "first num_tokens num_components part_size num_rows num_queries num_heads chunk count row_blocks "
    "row_stride slot_stride slot_map_stride reference_row_stride reference_stride idx_row_stride reference_map_stride "
    "end_16 end_8 end_4 end_2 angle_stride mask_row mask_head mask_query mask_token"
).split()


@triton.jit
def pick_vectors(
    codes,  # of the first token of the row
    offsets,  # [BLOCK_TOKENS], where each token's bytes begin
    is_token,
    table,
    byte_idx,
    first_entry,
    vector_size,
    start,
    stop,
    SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    """Components `start .. stop - 1`, at most BLOCK_COMPONENTS, that are vectors of SIZE; zero behind them."""
    vector = start + SIZE * tl.arange(0, BLOCK_COMPONENTS // SIZE)
    is_vector = vector < stop
    size = tl.load(vector_size + vector, mask=is_vector, other=0)
    byte = tl.load(byte_idx + vector, mask=is_vector, other=0)
    # what has no byte may have no memory either
    is_coded = is_token[:, None] & (size > 0)[None, :]
    code = tl.load(codes + offsets[:, None] + byte[None, :], mask=is_coded, other=0).to(tl.int32)
    entry = tl.load(first_entry + vector, mask=is_vector, other=0)[None, :] + code * size[None, :]
    entry = tl.multiple_of(entry, [SIZE, SIZE])[:, :, None] + tl.arange(0, SIZE)[None, None, :]
    number = tl.load(table + entry, mask=is_coded[:, :, None], other=0.0)
    return tl.reshape(number, [BLOCK_TOKENS, BLOCK_COMPONENTS])


@triton.jit(do_not_specialize=ANY)
def decode_kernel(
    codes,  # [batch, num_slots, bytes] uint8
    slots,  # [batch, num_tokens] int32
    slot_map,  # [batch, tokens of a row] int32
    table,  # [entries]
    byte_idx,  # [components] int32
    first_entry,  # [components] int32
    vector_size,  # [components] int32
    reference_codes,  # [batch, num_references, bytes] uint8
    reference_idx,  # [batch, num_slots] int16
    reference_map,  # [batch, references of a row] int32
    reference_byte_idx,  # [components] int32
    reference_first_entry,  # [components] int32
    reference_vector_size,  # [components] int32
    components,  # [batch, room, width]: of tokens `first ..`; zero behind the last token and the last component
    first,
    num_tokens,
    num_components,
    width,
    room,
    row_stride,
    slot_stride,
    slot_map_stride,
    reference_row_stride,
    reference_stride,
    idx_row_stride,
    reference_map_stride,
    end_16,  # behind the last component that is in a vector of 16
    end_8,
    end_4,
    end_2,
    HAS_SLOTS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_REFERENCES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token = first + place
    is_token = token < num_tokens
    slot = token
    if HAS_SLOTS:
        slot = tl.load(slots + row * num_tokens + token, mask=is_token, other=0)
    if HAS_MAP:
        # a pool of many rows may be larger than 32 bits count
        slot = tl.load(slot_map + row * slot_map_stride + slot, mask=is_token, other=0).to(tl.int64)
    codes += row * row_stride
    offsets = slot * slot_stride
    # programs that run at the same time share a part of the table, which L1 holds; one program has vectors of one size
    block = tl.program_id(1)
    before_8 = tl.cdiv(end_16, BLOCK_COMPONENTS)
    before_4 = before_8 + tl.cdiv(end_8 - end_16, BLOCK_COMPONENTS)
    before_2 = before_4 + tl.cdiv(end_4 - end_8, BLOCK_COMPONENTS)
    before_1 = before_2 + tl.cdiv(end_2 - end_4, BLOCK_COMPONENTS)
    if block < before_8:
        start, stop = block * BLOCK_COMPONENTS, end_16
        number = pick_vectors(
            codes,
            offsets,
            is_token,
            table,
            byte_idx,
            first_entry,
            vector_size,
            start,
            stop,
            16,
            BLOCK_TOKENS,
            BLOCK_COMPONENTS,
        )
    elif block < before_4:
        start, stop = end_16 + (block - before_8) * BLOCK_COMPONENTS, end_8
        number = pick_vectors(
            codes,
            offsets,
            is_token,
            table,
            byte_idx,
            first_entry,
            vector_size,
            start,
            stop,
            8,
            BLOCK_TOKENS,
            BLOCK_COMPONENTS,
        )
    elif block < before_2:
        start, stop = end_8 + (block - before_4) * BLOCK_COMPONENTS, end_4
        number = pick_vectors(
            codes,
            offsets,
            is_token,
            table,
            byte_idx,
            first_entry,
            vector_size,
            start,
            stop,
            4,
            BLOCK_TOKENS,
            BLOCK_COMPONENTS,
        )
    elif block < before_1:
        start, stop = end_4 + (block - before_2) * BLOCK_COMPONENTS, end_2
        number = pick_vectors(
            codes,
            offsets,
            is_token,
            table,
            byte_idx,
            first_entry,
            vector_size,
            start,
            stop,
            2,
            BLOCK_TOKENS,
            BLOCK_COMPONENTS,
        )
    else:
        # those by themselves, and behind them zeros up to the width
        start, stop = end_2 + (block - before_1) * BLOCK_COMPONENTS, width
        number = pick_vectors(
            codes,
            offsets,
            is_token,
            table,
            byte_idx,
            first_entry,
            vector_size,
            start,
            num_components,
            1,
            BLOCK_TOKENS,
            BLOCK_COMPONENTS,
        )
    # multiples of 8 all along, which the compiler cannot know: for whole words
    component, stop = start // 8 * 8 + tl.arange(0, BLOCK_COMPONENTS), stop // 8 * 8
    if HAS_REFERENCES:
        reference = tl.load(reference_idx + row * idx_row_stride + slot, mask=is_token, other=0).to(tl.int32) & 0xFFFF
        if HAS_MAP:
            place_of = reference_map + row * reference_map_stride + reference
            reference = tl.load(place_of, mask=is_token, other=0).to(tl.int64)
        is_component = (component < stop) & (component < num_components)
        size = tl.load(reference_vector_size + component, mask=is_component, other=0)
        byte = tl.load(reference_byte_idx + component, mask=is_component, other=0)
        is_coded = is_token[:, None] & (size > 0)[None, :]
        code = reference_codes + row * reference_row_stride + (reference * reference_stride)[:, None] + byte[None, :]
        code = tl.load(code, mask=is_coded, other=0).to(tl.int32)
        entry = tl.load(reference_first_entry + component, mask=is_component, other=0)[None, :] + code * size[None, :]
        predicted = tl.load(table + entry, mask=is_coded, other=0.0)
        number = (number.to(tl.float32) + predicted.to(tl.float32)).to(number.dtype)
    place = components + (row * room + place)[:, None] * width + component[None, :]
    tl.store(place, number, mask=(component < stop)[None, :])


@triton.jit(do_not_specialize=ANY)
def score_kernel(
    query,  # [batch, heads, queries, 2 * half] floating
    components,  # [batch, room, width]
    key_map,  # [components, heads * 2 * half]
    key_scale,  # [heads * 2 * half] float32
    key_mean,  # [heads * 2 * half] float32
    cos,  # [batch or 1, positions, pairs], floating
    sin,
    positions,  # [batch, num_tokens] int32
    mask,  # float32
    lengths,  # [batch] int32
    scores,  # [parts, batch, heads * queries, score_room] float32, as powers of two: the sum of the parts'
    scale,
    first,
    num_tokens,
    num_components,
    part_size,  # blocks of components of a part
    width,
    room,
    score_room,
    num_heads,
    num_queries,
    half,
    pairs,
    map_stride,
    angle_stride,  # of a row of `cos` and `sin`; 0 if all rows share one
    mask_row,  # strides of `mask`, 0 where it is shared
    mask_head,
    mask_query,
    mask_token,
    HAS_MASK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # numbers of a pair of a query are neighbours
    HALF: tl.constexpr,  # `half` rounded up to a power of two
    HEADS: tl.constexpr,  # of a program
    QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    num_heads_up = tl.cdiv(num_heads, HEADS)
    first_head, part = tl.program_id(0) % num_heads_up * HEADS, tl.program_id(0) // num_heads_up
    row, batch = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    place = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token = first + place
    is_token = token < num_tokens
    # the numbers of all heads of the program, those that RoPE turns together side by side
    numbers = tl.arange(0, 2 * HALF * HEADS)
    column = (first_head + numbers // (2 * HALF)) * (2 * half) + numbers % (2 * HALF)
    is_column = (first_head + numbers // (2 * HALF) < num_heads) & (numbers % (2 * HALF) < 2 * half)
    keys = tl.zeros([BLOCK_TOKENS, 2 * HALF * HEADS], tl.float32)
    for block in range(part * part_size, tl.minimum((part + 1) * part_size, tl.cdiv(num_components, BLOCK_COMPONENTS))):
        component = block * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
        is_component = component < num_components
        z = tl.load(components + (row * room + place)[:, None] * width + component[None, :])
        weights = key_map + component[:, None] * map_stride + column[None, :]
        weights = tl.load(weights, mask=is_component[:, None] & is_column[None, :], other=0.0)
        keys = tl.dot(z, weights, keys, input_precision="ieee")
    keys = keys * tl.load(key_scale + column, mask=is_column, other=0.0)[None, :]
    # of all parts the first has what is not of components
    keys = keys + tl.load(key_mean + column, mask=is_column & (part == 0), other=0.0)[None, :]
    x, y = tl.split(tl.reshape(keys, [BLOCK_TOKENS, HALF * HEADS, 2]))
    numbers = tl.arange(0, HALF * HEADS)
    head, pair = first_head + numbers // HALF, numbers % HALF
    if pairs > 0:
        position = token
        if HAS_POSITIONS:
            position = tl.load(positions + row * num_tokens + token, mask=is_token, other=0)
        angle = row * angle_stride + position.to(tl.int64)[:, None] * pairs + pair[None, :]
        is_turned = is_token[:, None] & (pair < pairs)[None, :]
        c = tl.load(cos + angle, mask=is_turned, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=is_turned, other=0.0).to(tl.float32)
        x, y = x * c - y * s, x * s + y * c
    is_seen = is_token
    if HAS_LENGTHS:
        is_seen = is_seen & (token < tl.load(lengths + row))
    # queries of all heads of the program, each multiplied by the numbers of its own head; theirs may stand otherwise
    is_side = INTERLEAVED | (pair >= pairs)
    x_place, y_place = tl.where(is_side, 2 * pair, pair), tl.where(is_side, 2 * pair + 1, pair + pairs)
    dtype = components.dtype.element_ty
    num_asked = tl.minimum(HEADS, num_heads - first_head) * num_queries
    for begin in range(0, num_asked, QUERIES):
        asked = begin + tl.arange(0, QUERIES)
        is_query = asked < num_asked
        rows = (row * num_heads + first_head) * num_queries + asked
        q_head, q_place = first_head + asked // num_queries, asked % num_queries
        number = query + rows[None, :] * (2 * half)
        is_number = (pair < half)[:, None] & is_query[None, :] & (head[:, None] == q_head[None, :])
        q = tl.load(number + x_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
        result = tl.dot(x.to(dtype), q.to(dtype), input_precision="ieee")
        q = tl.load(number + y_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
        # [BLOCK_TOKENS, QUERIES]
        result = tl.dot(y.to(dtype), q.to(dtype), result, input_precision="ieee")
        if HAS_MASK:
            spot = (q_head * mask_head + q_place * mask_query)[None, :] + token.to(tl.int64)[:, None] * mask_token
            spot += row * mask_row
            result += tl.load(mask + spot, mask=is_token[:, None] & is_query[None, :] & (part == 0), other=0.0)
        result = tl.where(is_seen[:, None], result * LOG2E, float("-inf"))
        rows += part * batch * num_heads * num_queries
        tl.store(scores + rows[None, :] * score_room + place[:, None], result, mask=is_query[None, :])


@triton.jit(do_not_specialize=ANY)
def mix_kernel(
    scores,  # [parts, batch, rows, room]
    components,  # [batch, room, width]
    maxima,  # [blocks, spans, batch, rows] float32, powers of two: of the chunks before, then of this one too
    totals,  # [blocks, spans, batch, rows] float32, times LARGEST_WEIGHT
    mixed,  # [spans, batch, rows, components] float32, times LARGEST_WEIGHT
    chunk,  # its number
    span,
    count,  # tokens of the chunk
    num_components,
    width,
    num_rows,
    room,
    row_blocks,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    part = tl.program_id(0)
    batch_row = (tl.program_id(2) // row_blocks).to(tl.int64)
    batch = tl.num_programs(2) // row_blocks
    rows = (tl.program_id(2) % row_blocks) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    component = tl.program_id(1) * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    is_component = component < num_components
    held = (part * batch + batch_row) * num_rows + rows
    spot = mixed + held[None, :] * num_components + component[:, None]
    is_held = is_component[:, None] & is_row[None, :]
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([BLOCK_COMPONENTS, ROWS], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, count), BLOCK_TOKENS):
        place = start + tl.arange(0, BLOCK_TOKENS)
        z = tl.load(components + (batch_row * room + place)[:, None] * width + component[None, :])
        spot_of_score = scores + (batch_row * num_rows + rows)[None, :] * room + place[:, None]
        is_scored = is_row[None, :] & (place < count)[:, None]
        score = tl.load(spot_of_score, mask=is_scored, other=float("-inf"))
        for other in tl.static_range(1, PARTS):
            score += tl.load(spot_of_score + other * batch * num_rows * room, mask=is_scored, other=0.0)
        largest = tl.maximum(maximum, tl.max(score, 0))
        weight = tl.exp2(score - largest[None, :]) * LARGEST_WEIGHT
        shrink = tl.exp2(maximum - largest)
        total = total * shrink + tl.sum(weight, 0)
        sums = tl.dot(tl.trans(z), weight.to(z.dtype), sums * shrink[None, :], input_precision="ieee")
        maximum = largest
    # each block of components has a copy of its own: none waits for another
    copy = held + tl.program_id(1) * tl.num_programs(0) * batch * num_rows
    if chunk > 0:
        known = tl.load(maxima + copy, mask=is_row, other=LOWEST)
        largest = tl.maximum(maximum, known)
        shrink, own = tl.exp2(known - largest), tl.exp2(maximum - largest)
        total = total * own + tl.load(totals + copy, mask=is_row, other=0.0) * shrink
        sums = sums * own[None, :] + tl.load(spot, mask=is_held, other=0.0) * shrink[None, :]
        maximum = largest
    tl.store(maxima + copy, maximum, mask=is_row)
    tl.store(totals + copy, total, mask=is_row)
    tl.store(spot, sums, mask=is_held)
