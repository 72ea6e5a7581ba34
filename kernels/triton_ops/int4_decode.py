"""`int4_decode`: splits of every row by as many programs as keep a GPU busy, and the splits put together."""

import torch
import triton

from ..reference.attend import Attended
from .capability import capability
from .int4_kernels import GROUP, int4_kernel
from .merge_kernels import merge_spans

# queries of a head that are multiplied at once
MOST_QUERIES = 8
# splits of a row that are put together, at most
MOST_SPLITS = 256


def tile(width: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Tokens of a tile, warps, tiles loaded ahead, programs for each processor, columns multiplied by at least.

    Args:
        width: numbers of a head.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    if dtype == torch.float32 or capability < 80 or width > 128:
        return {"BLOCK_TOKENS": 64, "num_warps": 4, "num_stages": 1, "programs": 2, "columns": 16}
    # single warps: none waits for another
    return {"BLOCK_TOKENS": 32, "num_warps": 1, "num_stages": 3, "programs": 8, "columns": 4}


def shapes(head_dim: int, value_dim: int, num_queries: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """All constants of the kernel but what there is to read; and `programs`, see `tile`."""
    options = tile(max(head_dim, value_dim), dtype, capability)
    blocks, columns = options["BLOCK_TOKENS"] // GROUP.value, options.pop("columns")
    queries = min(MOST_QUERIES, max(columns // blocks, triton.next_power_of_2(num_queries)))
    words = {"KEY_WORDS": head_dim // 8, "VALUE_WORDS": value_dim // 8}
    return (
        options
        | words
        | {
            "IS_EXACT": dtype == torch.float32,
            "KEY_BLOCK": triton.next_power_of_2(words["KEY_WORDS"]),
            "QUERIES": queries,
            "GROUPS": max(columns // queries, triton.next_power_of_2(value_dim // GROUP.value)),
        }
    )


def int4_decode(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_levels: torch.Tensor,
    value_codes: torch.Tensor,
    value_levels: torch.Tensor,
    mask: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """See `reference.int4_decode`."""
    batch, heads, num_queries, head_dim = query.shape
    num_tokens = key_codes.shape[2] if block_table is None else GROUP.value * block_table.shape[1]
    value_dim, device = value_codes.shape[-2], query.device
    options = shapes(head_dim, value_dim, num_queries, query.dtype, capability(device))
    programs = options.pop("programs") * _processors(device)
    rows, parts = heads * num_queries, triton.cdiv(num_queries, options["QUERIES"])

    # as many splits as keep all processors busy, each of whole tiles
    tiles = triton.cdiv(num_tokens, options["BLOCK_TOKENS"])
    splits = min(MOST_SPLITS, max(1, programs // (batch * heads * parts)))
    span = triton.cdiv(tiles, splits) * options["BLOCK_TOKENS"]
    splits = triton.cdiv(num_tokens, span)
    if scores is not None and lengths is not None:
        # nothing is read there
        scores.fill_(-torch.inf)
    codes = [_words(part) for part in (key_codes, key_levels, value_codes, value_levels)]
    strides = [0] * 4 if mask is None else mask.expand(batch, heads, num_queries, num_tokens).stride()

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    maxima, totals, mixed = (new(splits, batch, rows, *more) for more in ((), (), (value_dim,)))
    int4_kernel[(splits, heads * parts, batch)](
        *(query.contiguous(), *codes, mask, block_table, lengths, scores, maxima, totals, mixed),
        *(scale, num_tokens, span, heads, num_queries),
        *(size for part in codes for size in part.stride()[:2]),
        *strides,
        HAS_MASK=mask is not None,
        HAS_TABLE=block_table is not None,
        HAS_LENGTHS=lengths is not None,
        KEEPS_SCORES=scores is not None,
        **options,
    )
    output = torch.empty(batch, heads, num_queries, value_dim, dtype=dtype, device=device)
    log_total = new(batch, heads, num_queries, 1)
    merge_spans(maxima, totals, mixed, before, output, log_total)
    return Attended(output, log_total)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _words(x: torch.Tensor) -> torch.Tensor:
    """Four codes or a pair of levels as one number: `[batch, heads, ...]` int32 with dense rows of each head."""
    x = x if x[0, 0].is_contiguous() else x.contiguous()
    return x.view(torch.int32)
