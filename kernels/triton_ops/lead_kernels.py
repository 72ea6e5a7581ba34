"""The kernel of `score_leading`: a program goes over all heads, so that angles of its tokens are read once."""

import triton
import triton.language as tl

ANY = "first num_tokens num_components num_heads num_queries angle_stride".split()


@triton.jit(do_not_specialize=ANY)
def lead_kernel(
    query,  # [batch, heads, queries, 2 * half] floating
    components,  # [batch, room, width]
    key_map,  # [components, heads * 2 * half]
    key_scale,  # [heads * 2 * half] float32
    key_mean,  # [heads * 2 * half] float32
    cos,  # [batch or 1, positions, pairs], floating
    sin,
    positions,  # [batch, num_tokens] int32
    lengths,  # [batch] int32
    scores,  # [batch, heads * queries, score_room] float32
    scale,
    first,
    num_tokens,
    num_components,
    width,
    room,
    score_room,
    num_heads,
    num_queries,
    half,
    pairs,
    map_stride,
    angle_stride,  # of a row of `cos` and `sin`; 0 if all rows share one
    HAS_POSITIONS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # numbers of a pair of a query are neighbours
    HALF: tl.constexpr,  # `half` rounded up to a power of two
    QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    asked = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    token = first + place
    is_token, is_query = token < num_tokens, asked < num_queries
    pair, numbers = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    position = token
    if HAS_POSITIONS:
        position = tl.load(positions + row * num_tokens + token, mask=is_token, other=0)
    angle = row * angle_stride + position.to(tl.int64)[:, None] * pairs + pair[None, :]
    is_turned = is_token[:, None] & (pair < pairs)[None, :]
    c, s = tl.load(cos + angle, mask=is_turned, other=1.0), tl.load(sin + angle, mask=is_turned, other=0.0)
    is_seen = is_token
    if HAS_LENGTHS:
        is_seen = is_seen & (token < tl.load(lengths + row))
    # numbers of a query may stand in another order
    is_side = INTERLEAVED | (pair >= pairs)
    x_place, y_place = tl.where(is_side, 2 * pair, pair), tl.where(is_side, 2 * pair + 1, pair + pairs)
    is_number = (pair < half)[:, None] & is_query[None, :]
    dtype = components.dtype.element_ty

    # heads and blocks of components are one loop: the next tiles are loaded while a head is finished
    num_blocks = tl.maximum(tl.cdiv(num_components, BLOCK_COMPONENTS), 1)
    keys = tl.zeros([BLOCK_TOKENS, 2 * HALF], tl.float32)
    for step in range(0, num_heads * num_blocks):
        head, block = step // num_blocks, step % num_blocks
        component, column = block * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS), head * (2 * half) + numbers
        is_component, is_column = component < num_components, numbers < 2 * half
        z = tl.load(components + (row * room + place)[:, None] * width + component[None, :])
        weights = key_map + component[:, None] * map_stride + column[None, :]
        weights = tl.load(weights, mask=is_component[:, None] & is_column[None, :], other=0.0)
        keys = tl.dot(z, weights, keys, input_precision="ieee")
        if block == num_blocks - 1:
            keys = keys * tl.load(key_scale + column, mask=is_column, other=0.0)[None, :]
            keys = keys + tl.load(key_mean + column, mask=is_column, other=0.0)[None, :]
            x, y = tl.split(tl.reshape(keys, [BLOCK_TOKENS, HALF, 2]))
            x, y = x * c - y * s, x * s + y * c
            rows = (row * num_heads + head) * num_queries + asked
            number = query + rows[None, :] * (2 * half)
            q = tl.load(number + x_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
            result = tl.dot(x.to(dtype), q.to(dtype), input_precision="ieee")
            q = tl.load(number + y_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
            # [BLOCK_TOKENS, QUERIES]
            result = tl.dot(y.to(dtype), q.to(dtype), result, input_precision="ieee")
            result = tl.where(is_seen[:, None], result, float("-inf"))
            spot = scores + rows[None, :] * score_room + token[:, None]
            tl.store(spot, result, mask=is_token[:, None] & is_query[None, :])
            keys = tl.zeros([BLOCK_TOKENS, 2 * HALF], tl.float32)
