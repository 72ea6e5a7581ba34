"""`score` without writing keys: a tile of them is projected, rotated and multiplied by the queries in registers."""

import torch
import triton
import triton.language as tl

BLOCK_COMPONENTS = 32
# the least that a matrix product on tensor cores takes
FEWEST_QUERIES = 16


@triton.jit
def score_kernel(
    query,  # [batch, heads, queries, 2 * half] float32
    components,  # [batch, num_tokens, num_components] float32
    key_mean,  # [heads * 2 * half] float32
    key_map,  # [num_components, heads * 2 * half] float32
    cos,  # [batch or 1, num_tokens, pairs] float32
    sin,
    scores,  # [batch, heads, queries, num_tokens] float32
    num_tokens,
    num_components,
    num_queries,
    half,
    pairs,
    angle_stride,  # of a row of `cos` and `sin`; 0 if all rows share one
    HALF: tl.constexpr,  # `half` and `num_queries` rounded up to powers of two
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
):
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    place = row * num_tokens + tokens
    pair = tl.arange(0, HALF)
    is_pair = pair < half
    # the first and the second number of each pair
    column = (head * half + pair) * 2
    even = tl.zeros([BLOCK_TOKENS, HALF], tl.float32)
    odd = tl.zeros([BLOCK_TOKENS, HALF], tl.float32)
    even += tl.load(key_mean + column, mask=is_pair, other=0.0)[None, :]
    odd += tl.load(key_mean + column + 1, mask=is_pair, other=0.0)[None, :]
    for start in range(0, num_components, BLOCK_COMPONENTS):
        component = start + tl.arange(0, BLOCK_COMPONENTS)
        is_component = component < num_components
        x = tl.load(
            components + place[:, None] * num_components + component[None, :],
            mask=is_token[:, None] & is_component[None, :],
            other=0.0,
        )
        weights = key_map + component[:, None] * (num_heads * half * 2) + column[None, :]
        is_weight = is_component[:, None] & is_pair[None, :]
        even = tl.dot(x, tl.load(weights, mask=is_weight, other=0.0), even, input_precision=PRECISION)
        odd = tl.dot(x, tl.load(weights + 1, mask=is_weight, other=0.0), odd, input_precision=PRECISION)
    if pairs > 0:
        angle = row * angle_stride + tokens[:, None] * pairs + pair[None, :]
        is_turned = is_token[:, None] & (pair < pairs)[None, :]
        c = tl.load(cos + angle, mask=is_turned, other=1.0)
        s = tl.load(sin + angle, mask=is_turned, other=0.0)
        even, odd = even * c - odd * s, even * s + odd * c
    asked = tl.arange(0, QUERIES)
    is_query = asked < num_queries
    first = ((row * num_heads + head) * num_queries + asked).to(tl.int64)
    numbers = query + first[:, None] * (half * 2) + 2 * pair[None, :]
    is_number = is_query[:, None] & is_pair[None, :]
    result = tl.dot(tl.load(numbers, mask=is_number, other=0.0), tl.trans(even), input_precision=PRECISION)
    result = tl.dot(tl.load(numbers + 1, mask=is_number, other=0.0), tl.trans(odd), result, input_precision=PRECISION)
    tl.store(scores + first[:, None] * num_tokens + tokens[None, :], result, mask=is_query[:, None] & is_token[None, :])


def tile(half: int) -> dict[str, int]:
    """Tokens and components of a tile, for heads of `2 * half` numbers; wide ones leave room for fewer tokens."""
    return {"BLOCK_TOKENS": min(64, 4096 // half), "BLOCK_COMPONENTS": BLOCK_COMPONENTS}


def score(
    query: torch.Tensor,
    components: torch.Tensor,
    key_mean: torch.Tensor,
    key_map: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.score`; `scratch` is not needed. Sums are of whole float32 numbers ("ieee")."""
    batch, num_tokens, num_components = components.shape
    heads, num_queries, head_dim = query.shape[1:]
    scores = query.new_empty(batch, heads, num_queries, num_tokens)
    if scores.numel() == 0:
        return scores
    query, components, key_mean, key_map = (part.contiguous() for part in (query, components, key_mean, key_map))
    # nothing is read of angles where no pair is turned
    cos, sin = (query, query) if angles is None else (table.contiguous() for table in angles)
    pairs = 0 if angles is None else cos.shape[-1]
    angle_stride = 0 if angles is None or len(cos) == 1 else num_tokens * pairs
    sizes = num_tokens, num_components, num_queries, head_dim // 2, pairs, angle_stride
    half = max(16, triton.next_power_of_2(head_dim // 2))
    queries = max(FEWEST_QUERIES, triton.next_power_of_2(num_queries))
    constants = {"HALF": half, "QUERIES": queries, "PRECISION": "ieee"} | tile(half)
    grid = (triton.cdiv(num_tokens, constants["BLOCK_TOKENS"]), heads, batch)
    score_kernel[grid](query, components, key_mean, key_map, cos, sin, scores, *sizes, **constants)
    return scores
