"""The kernel of `score_leading`: a program goes over all heads, so that angles of its tokens are read once."""

import triton
import triton.language as tl

ANY = "first num_tokens num_components num_heads num_queries angle_stride".split()


@triton.jit(do_not_specialize=ANY)
def lead_kernel(
    query,  # [batch, heads, queries, 2 * half] floating
    components,  # [batch, room, width]
    key_map,  # [components, 2, heads, half], the numbers that a pair begins with before those that it ends with
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
    pair = tl.arange(0, HALF)
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
    is_pair, is_number = pair < half, (pair < half)[:, None] & is_query[None, :]
    dtype = components.dtype.element_ty

    # scores are sums over components: all heads go over a block of them while it is held
    for block in range(0, tl.maximum(tl.cdiv(num_components, BLOCK_COMPONENTS), 1)):
        component = block * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
        is_weight = (component < num_components)[:, None] & is_pair[None, :]
        z = tl.load(components + (row * room + place)[:, None] * width + component[None, :])
        # what other threads have stored is loaded below
        tl.debug_barrier()
        for head in range(0, num_heads):
            weights = key_map + component[:, None] * (num_heads * 2 * half) + (head * half + pair)[None, :]
            x_map = tl.load(weights, mask=is_weight, other=0.0)
            y_map = tl.load(weights + num_heads * half, mask=is_weight, other=0.0)
            column = head * (2 * half) + 2 * pair
            x_scale = tl.load(key_scale + column, mask=is_pair, other=0.0)
            y_scale = tl.load(key_scale + column + 1, mask=is_pair, other=0.0)
            x = tl.dot(z, x_map, input_precision="ieee") * x_scale[None, :]
            y = tl.dot(z, y_map, input_precision="ieee") * y_scale[None, :]
            if block == 0:
                x += tl.load(key_mean + column, mask=is_pair, other=0.0)[None, :]
                y += tl.load(key_mean + column + 1, mask=is_pair, other=0.0)[None, :]
            x, y = x * c - y * s, x * s + y * c
            rows = (row * num_heads + head) * num_queries + asked
            number = query + rows[None, :] * (2 * half)
            q = tl.load(number + x_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
            result = tl.dot(x.to(dtype), q.to(dtype), input_precision="ieee")
            q = tl.load(number + y_place[:, None], mask=is_number, other=0.0).to(tl.float32) * scale
            # [BLOCK_TOKENS, QUERIES]
            result = tl.dot(y.to(dtype), q.to(dtype), result, input_precision="ieee")
            spot = scores + rows[None, :] * score_room + token[:, None]
            is_scored = is_token[:, None] & is_query[None, :]
            if block > 0:
                result += tl.load(spot, mask=is_scored, other=0.0)
            tl.store(spot, tl.where(is_seen[:, None], result, float("-inf")), mask=is_scored)
