"""`attend`: raw tokens of up to three parts in one kernel, which goes over them as if they stood side by side."""

import os

import torch
import triton
import triton.language as tl

from ..reference.attend import Attended
from .attend_kernels import LARGEST_WEIGHT, LOG2E, LOWEST
from .capability import capability
from .merge_kernels import log_of, merge_spans

# tokens of a program, whole tiles; more are shared among programs
SPAN = 1024
# queries of a program; tensor cores take no fewer
ROWS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ANY = "num_tokens first second third num_heads num_queries mask_row mask_head mask_query mask_token".split()


@triton.jit
def load_part(states, head, place, count, column, WIDTH: tl.constexpr):
    """Of one part tokens `place`, where they are in it: `[tokens, columns]`."""
    spot = (head * count + place).to(tl.int64)[:, None] * WIDTH + column[None, :]
    is_there = (place >= 0) & (place < count)
    return tl.load(states + spot, mask=is_there[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit(do_not_specialize=ANY)
def attend_kernel(
    query,  # [batch, heads, queries, HEAD_DIM] floating
    first_keys,  # [batch, heads, first, HEAD_DIM]
    first_values,  # [batch, heads, first, VALUE_DIM]
    second_keys,
    second_values,
    third_keys,
    third_values,
    mask,  # floating
    maxima,  # [spans, batch * heads * queries] float32, powers of two
    totals,  # [spans, batch * heads * queries] float32, times LARGEST_WEIGHT
    mixed,  # [spans, batch * heads * queries, VALUE_DIM] float32, times LARGEST_WEIGHT; of one span the output itself
    log_total,  # [batch * heads * queries] float32
    scale,
    num_tokens,
    first,  # tokens of each part
    second,
    third,
    num_heads,
    num_queries,
    mask_row,  # strides of `mask`, 0 where it is shared
    mask_head,
    mask_query,
    mask_token,
    HAS_MASK: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # all tokens are of one span
    SPAN: tl.constexpr,
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
    # [KEY_BLOCK, ROWS]
    q = query + rows[None, :].to(tl.int64) * HEAD_DIM + channel[:, None]
    q = tl.load(q, mask=(channel < HEAD_DIM)[:, None] & is_query[None, :], other=0.0).to(DTYPE)
    maximum = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([VALUE_BLOCK, ROWS], tl.float32)
    begin = tl.program_id(0) * SPAN
    for start in range(begin, tl.minimum(begin + SPAN, num_tokens), BLOCK_TOKENS):
        place = start + tl.arange(0, BLOCK_TOKENS)
        behind = place - first
        # a token is in one part, of the others come zeros
        keys = load_part(first_keys, head, place, first, channel, HEAD_DIM)
        keys += load_part(second_keys, head, behind, second, channel, HEAD_DIM)
        keys += load_part(third_keys, head, behind - second, third, channel, HEAD_DIM)
        values = load_part(first_values, head, place, first, column, VALUE_DIM)
        values += load_part(second_values, head, behind, second, column, VALUE_DIM)
        values += load_part(third_values, head, behind - second, third, column, VALUE_DIM)
        scores = tl.dot(keys.to(DTYPE), q, input_precision="ieee") * (scale * LOG2E)
        is_token = place < num_tokens
        if HAS_MASK:
            spot = (own_head * mask_head + asked * mask_query)[None, :] + place.to(tl.int64)[:, None] * mask_token
            spot += batch_row * mask_row
            added = tl.load(mask + spot, mask=is_token[:, None] & is_query[None, :], other=0.0)
            scores += added.to(tl.float32) * LOG2E
        scores = tl.where(is_token[:, None], scores, float("-inf"))
        largest = tl.maximum(maximum, tl.max(scores, 0))
        weight = tl.exp2(scores - largest[None, :]) * LARGEST_WEIGHT
        shrink = tl.exp2(maximum - largest)
        total = total * shrink + tl.sum(weight, 0)
        part = tl.dot(tl.trans(values.to(DTYPE)), weight.to(DTYPE), input_precision="ieee")
        sums, maximum = sums * shrink[None, :] + part, largest
    if IS_WHOLE:
        sums = sums / tl.maximum(total, 1e-30)[None, :]
        tl.store(log_total + rows, log_of(maximum, total / LARGEST_WEIGHT), mask=is_query)
    else:
        held = tl.program_id(0) * num_rows + rows
        tl.store(maxima + held, maximum, mask=is_query)
        tl.store(totals + held, total, mask=is_query)
    held = (tl.program_id(0) * num_rows + rows).to(tl.int64)[None, :] * VALUE_DIM + column[:, None]
    tl.store(mixed + held, sums, mask=(column < VALUE_DIM)[:, None] & is_query[None, :])


def tile(width: int, dtype: torch.dtype, capability: int) -> dict[str, object]:
    """Tokens of a tile, warps, tiles loaded ahead, and what products are taken in.

    Args:
        width: of keys or values, the larger.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    # neither cards before Ampere nor the interpreter multiply bfloat16
    exact = dtype == torch.float32 or (dtype == torch.bfloat16 and (capability < 80 or INTERPRETED))
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(None if exact else dtype, tl.float32)
    is_narrow = not exact and width <= 128
    tokens = 64 if is_narrow else 32
    if capability < 80:
        # 64 KB of shared memory
        tokens = 32 if is_narrow else 16
    # two tiles of three parts take more than other cards have
    stages = 2 if is_narrow and capability in (90, 100) else 1
    return {"BLOCK_TOKENS": tokens, "num_warps": 4, "num_stages": stages, "DTYPE": kind}


def attend(
    query: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
) -> Attended:
    """See `reference.attend`."""
    if len(parts) > 3 or len({states.dtype for part in parts for states in part}) > 1:
        parts = [tuple(torch.cat([states.float() for states in kind], dim=2) for kind in zip(*parts, strict=True))]
    batch, heads, num_queries, head_dim = query.shape
    value_dim, device = parts[0][1].shape[-1], query.device
    counts = [keys.shape[2] for keys, _ in parts] + [0] * (3 - len(parts))
    # nothing is read of a part that is not there
    states = [part.contiguous() for kind in [*parts, *parts[:1] * (3 - len(parts))] for part in kind]
    num_tokens = sum(counts)
    num_spans = triton.cdiv(num_tokens, SPAN)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    rows = batch * heads * num_queries
    output, log_total = new(batch, heads, num_queries, value_dim), new(batch, heads, num_queries, 1)
    spans = (None, None, output) if num_spans == 1 else (new(num_spans, rows, *more) for more in ((), (), (value_dim,)))
    maxima, totals, mixed = spans
    attend_kernel[(num_spans, triton.cdiv(num_queries, ROWS), batch * heads)](
        *(query.contiguous(), *states, mask, maxima, totals, mixed, log_total),
        *(scale, num_tokens, *counts, heads, num_queries),
        *([0] * 4 if mask is None else mask.expand(batch, heads, num_queries, num_tokens).stride()),
        HAS_MASK=mask is not None,
        IS_WHOLE=num_spans == 1,
        SPAN=SPAN,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
        ROWS=ROWS,
        **tile(max(head_dim, value_dim), states[0].dtype, capability(device)),
    )
    if num_spans > 1:
        merge_spans(maxima, totals, mixed, None, output, log_total)
    return Attended(output, log_total)
