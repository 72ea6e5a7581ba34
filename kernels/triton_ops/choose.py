"""`choose` in four kernels, none of which sorts."""

import torch
import triton

from .choose_kernels import BYTES, KEYS, key_kernel, sum_kernel, tally_kernel, write_kernel

# of a row's sum: the most spans, and tokens of a tile
MOST_SPANS, SUM_TOKENS = 16, 1024
# rows of scores and tokens of a tile of keys
KEY_ROWS, KEY_TOKENS = 32, 256
BLOCK = 1024


def choose(scores: torch.Tensor, log_total: torch.Tensor, budget: int) -> torch.Tensor:
    """See `reference.choose`."""
    batch, heads, num_queries, num_tokens = scores.shape
    rows, device = heads * num_queries, scores.device
    if scores.stride() != (rows * scores.stride(2), num_queries * scores.stride(2), scores.stride(2), 1):
        scores = scores.contiguous()
    room, log_total = scores.stride(2), log_total.contiguous()

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    span = triton.cdiv(triton.cdiv(num_tokens, MOST_SPANS), SUM_TOKENS) * SUM_TOKENS
    spans, blocks = triton.cdiv(num_tokens, span), triton.cdiv(num_tokens, BLOCK)
    maxima, totals = (new(batch, rows, spans, dtype=torch.float32) for _ in range(2))
    counters, keys = new(batch, BYTES.value + KEYS.value), new(batch, num_tokens)
    tallies, slots = new(batch, 2, blocks), new(batch, budget)
    sum_kernel[(spans, rows, batch)](
        scores, maxima, totals, counters, num_tokens, span, room, BLOCK=SUM_TOKENS, num_warps=4
    )
    key_kernel[(triton.cdiv(num_tokens, KEY_TOKENS), batch)](
        *(scores, maxima, totals, log_total, keys, counters, num_tokens, rows, spans, room),
        SPANS=triton.next_power_of_2(spans),
        ROWS=KEY_ROWS,
        BLOCK=KEY_TOKENS,
        num_warps=8,
    )
    tally_kernel[(blocks, batch)](keys, counters, tallies, num_tokens, budget, BLOCK=BLOCK, num_warps=4)
    write_kernel[(blocks, batch)](
        *(keys, counters, tallies, slots, num_tokens, budget),
        BLOCKS=triton.next_power_of_2(blocks),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return slots
