"""`attend_blocks`: spans of every row by programs of their own, and the spans put together."""

import os

import torch
import triton
import triton.language as tl

from ..reference.attend import Attended
from ..reference.attend_blocks import Fusion
from ..reference.reconstruct_and_attend import Rotation
from .block_kernels import block_kernel
from .capability import capability
from .merge_kernels import merge_spans
from .scoring import rotation_inputs

# the fewest tokens of a program, and spans that are put together at most
SPAN, MOST_SPANS = 512, 256
# queries of a program; tensor cores take no fewer
ROWS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tile(width: int, dtype: torch.dtype, capability: int) -> dict[str, object]:
    """Tokens of a tile, warps, tiles loaded ahead, and what products are taken in.

    Args:
        width: of keys or values, the larger.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    # neither cards before Ampere nor the interpreter multiply bfloat16
    exact = dtype == torch.float32 or (dtype == torch.bfloat16 and (capability < 80 or INTERPRETED))
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(None if exact else dtype, tl.float32)
    # what registers hold of keys, of what they turn with and of angles
    tokens = 16 if width > 128 else 32 if width > 64 or capability < 80 else 64
    # two tiles with their angles take more than other cards have for two programs
    stages = 2 if not exact and capability in (90, 100) else 1
    return {"BLOCK_TOKENS": tokens, "num_warps": 4, "num_stages": stages, "DTYPE": kind}


def attend_blocks(
    query: torch.Tensor,
    blocks: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: int,
    value_dim: int,
    fusion: Fusion | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """See `reference.attend_blocks`."""
    batch, heads, num_queries, head_dim = query.shape
    query_tiles, device = triton.cdiv(num_queries, ROWS), query.device
    options = tile(max(head_dim, value_dim), blocks.dtype, capability(device))
    # many queries keep a GPU busy by themselves. The batch does not matter: a row gives the same bits in any company
    span = max(SPAN * query_tiles, triton.cdiv(num_tokens, MOST_SPANS))
    span = triton.cdiv(span, options["BLOCK_TOKENS"]) * options["BLOCK_TOKENS"]
    num_spans, rows = triton.cdiv(num_tokens, span), batch * heads * num_queries
    query, blocks, block_table = query.contiguous(), _rows(blocks), _rows(block_table)
    cos, sin, positions, pairs, angle_stride, interleaved = rotation_inputs(rotation, None, query)
    positions = None if positions is None else _rows(positions)

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    maxima, totals, mixed = (new(num_spans, rows, *more) for more in ((), (), (value_dim,)))
    block_kernel[(num_spans, query_tiles, batch * heads)](
        *(query, blocks, block_table, *((None,) * 3 if fusion is None else (part.contiguous() for part in fusion))),
        *(cos, sin, positions, mask, lengths, maxima, totals, mixed),
        *(scale, num_tokens, span, *blocks.shape[1:2], *blocks.stride()[:2], block_table.stride(0)),
        *(heads, num_queries, angle_stride // max(1, pairs), 0 if positions is None else positions.stride(0)),
        0 if fusion is None or len(fusion.mean) == 1 else fusion.mean.shape[1],
        *([0] * 4 if mask is None else mask.expand(batch, heads, num_queries, num_tokens).stride()),
        IS_FUSED=fusion is not None,
        HAS_POSITIONS=positions is not None,
        HAS_MASK=mask is not None,
        HAS_LENGTHS=lengths is not None,
        INTERLEAVED=interleaved,
        PAIRS=pairs,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        VALUE_BLOCK=max(16, triton.next_power_of_2(value_dim)),
        ROWS=ROWS,
        **options,
    )
    output = torch.empty(batch, heads, num_queries, value_dim, dtype=dtype, device=device)
    log_total = new(batch, heads, num_queries, 1)
    merge_spans(maxima, totals, mixed, before, output, log_total)
    return Attended(output, log_total)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows whose numbers are neighbours, wherever the rows are."""
    return x if x.stride(-1) == 1 else x.contiguous()
