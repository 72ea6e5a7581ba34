"""`reconstruct_and_attend` by way of a chunk of components that stays in the L2 cache of a GPU.

Heads share components, so a chunk of tokens is decoded once for all of them. Keys of a tile are projected, rotated and
multiplied by queries in registers. Softmax is put together from spans of tokens, each relative to its own maximum.
"""

from itertools import accumulate

import torch
import triton

from ..reference.attend import Attended
from ..reference.reconstruct_and_attend import KeyMap, References, Vectors
from .attend_kernels import decode_kernel, merge_kernel, mix_kernel, score_kernel
from .capability import capability

# bytes of the chunk of components; with scores and partial sums a read takes less than 64 MB
CHUNK_BYTES = 2**25
# spans of a chunk with sums of their own, over all rows, and the fewest tokens of one
MOST_SPANS, SPAN = 8, 256
# tokens and components of a chunk are multiples of it, and it is one of the tiles'
WHOLE = 128
DECODE_TILE = {"BLOCK_TOKENS": 16, "BLOCK_COMPONENTS": 64, "num_warps": 2}
MIX_TILE = {"BLOCK_TOKENS": 64, "BLOCK_COMPONENTS": 128, "num_warps": 8}
# programs that do not keep a GPU busy, and into how many parts the components of a short list are cut at most
FEW, MOST_PARTS = 256, 4
# queries of a head that are multiplied at once; tensor cores take no fewer than 16
FEWEST_ROWS, MOST_QUERIES = 16, 32


def score_tile(half: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Heads of a program, tokens and components of a tile, warps, and how many tiles are loaded ahead.

    Args:
        half: half a head's numbers, a power of two.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    if dtype == torch.float32 or capability < 80:
        tokens, columns, components, warps, stages = 32, 128, 32, 4, 2
    elif capability == 90 and half <= 64:
        # two programs a processor: one multiplies while the other rotates
        tokens, columns, components, warps, stages = 128, 128, 64, 4, 3
    elif capability in (80, 90, 100):
        tokens, columns, components, warps, stages = 128, 256, 64, 8, 3
    else:
        tokens, columns, components, warps, stages = 128, 128, 32, 8, 3
    tile = {"HEADS": max(1, columns // (2 * half)), "BLOCK_TOKENS": tokens, "BLOCK_COMPONENTS": components}
    return tile | {"num_warps": warps, "num_stages": stages}


def mix_stages(dtype: torch.dtype) -> int:
    """How many tiles of components `mix` loads ahead: what the smallest cards have room for."""
    return 2 if dtype == torch.float32 else 3


def reconstruct_and_attend(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    references: References | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> Attended:
    """See `reference.reconstruct_and_attend`."""
    batch, heads, num_queries, head_dim = query.shape
    num_tokens = codes.shape[1] if slots is None else slots.shape[1]
    table, *indices = vectors[:4]
    num_components, rows, dtype, device = len(indices[0]), heads * num_queries, table.dtype, table.device
    width = max(1, triton.cdiv(num_components, WHOLE)) * WHOLE
    positions = slots if positions is None else positions
    query, matrix, pairs, angle_stride = query.to(dtype).contiguous(), _rows_side_by_side(key_map.matrix), 0, 0
    # nothing is read of what is missing
    cos = sin = query
    if angles is not None:
        cos, sin = (_rows_side_by_side(part) for part in angles)
        pairs, angle_stride = cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0
    strides = [0] * 4 if mask is None else mask.expand(batch, heads, num_queries, num_tokens).stride()
    half = max(16, triton.next_power_of_2(head_dim // 2))
    tile = score_tile(half, dtype, capability(device))
    heads_up = triton.cdiv(heads, tile["HEADS"])
    programs = triton.cdiv(num_tokens, tile["BLOCK_TOKENS"]) * heads_up * batch
    parts = 1
    while 2 * parts * programs <= FEW and parts < MOST_PARTS:
        parts *= 2
    part_size = triton.cdiv(num_components, parts * tile["BLOCK_COMPONENTS"])
    asked = min(heads, tile["HEADS"]) * num_queries
    tile["QUERIES"] = min(MOST_QUERIES, max(FEWEST_ROWS, triton.next_power_of_2(asked)))
    row_block = min(64, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
    row_blocks, blocks = triton.cdiv(rows, row_block), width // MIX_TILE["BLOCK_COMPONENTS"]

    room = min(_chunk(batch * width * table.itemsize, heads, tile, device), triton.cdiv(num_tokens, WHOLE) * WHOLE)
    num_spans = max(1, min(MOST_SPANS // batch, room // SPAN))
    span = triton.cdiv(room, num_spans * WHOLE) * WHOLE
    chunks = [(first, min(room, num_tokens - first)) for first in range(0, num_tokens, room)]

    # vectors of one size in blocks of their own; the last are by themselves, and fill the width up with zeros
    ends = list(accumulate(vectors.counts))
    decode_blocks = sum(
        triton.cdiv(stop - start, DECODE_TILE["BLOCK_COMPONENTS"])
        for start, stop in zip([0, *ends], [*ends, width], strict=True)
    )
    reference_parts, reference_strides = [None] * 5, [0] * 3
    if references is not None:
        reference_parts = references
        reference_strides = *references.codes.stride()[:2], references.reference_idx.stride(0)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    components, scores = new(batch, room, width, dtype=dtype), new(parts, batch, rows, room)
    maxima, totals = (new(blocks, num_spans, batch, rows) for _ in range(2))
    mixed = new(num_spans, batch, rows, num_components)
    for chunk, (first, count) in enumerate(chunks):
        sizes, tokens = (first, num_tokens, num_components), triton.cdiv(count, WHOLE) * WHOLE
        decode_kernel[(tokens // DECODE_TILE["BLOCK_TOKENS"], decode_blocks, batch)](
            *(codes, slots, table, *indices, *reference_parts, components),
            *(*sizes, width, room, *codes.stride()[:2], *reference_strides, *ends),
            HAS_SLOTS=slots is not None,
            HAS_REFERENCES=references is not None,
            **DECODE_TILE,
        )
        score_kernel[(heads_up * parts, tokens // tile["BLOCK_TOKENS"], batch)](
            *(query, components, matrix, *key_map[1:], cos, sin, positions, mask, lengths, scores),
            *(*sizes, part_size, width, room, heads, num_queries, head_dim // 2, pairs),
            *(matrix.stride(0), angle_stride, *strides),
            HAS_MASK=mask is not None,
            HAS_POSITIONS=positions is not None,
            HAS_LENGTHS=lengths is not None,
            HALF=half,
            **tile,
        )
        mix_kernel[(num_spans, blocks, batch * row_blocks)](
            *(scores, components, maxima, totals, mixed),
            *(chunk, span, count, num_components, width, rows, room, row_blocks),
            PARTS=parts,
            ROWS=row_block,
            num_stages=mix_stages(dtype),
            **MIX_TILE,
        )
    maximum, total, result = (new(batch, heads, num_queries, size) for size in (1, 1, num_components))
    merge_kernel[(batch * rows, blocks)](
        *(maxima, totals, mixed, maximum, total, result),
        *(num_spans, num_components),
        SPANS=triton.next_power_of_2(num_spans),
        BLOCK_COMPONENTS=MIX_TILE["BLOCK_COMPONENTS"],
    )
    return Attended(maximum, total, result)


def _chunk(token_bytes: int, heads: int, tile: dict[str, int], device: torch.device) -> int:
    """Tokens of a chunk: what fits, in programs that keep all processors of the card busy to the end."""
    tokens = max(WHOLE, CHUNK_BYTES // token_bytes // WHOLE * WHOLE)
    if device.type != "cuda":
        return tokens
    programs = torch.cuda.get_device_properties(device).multi_processor_count // triton.cdiv(heads, tile["HEADS"])
    wave = max(WHOLE, programs * tile["BLOCK_TOKENS"] // WHOLE * WHOLE)
    return max(1, tokens // wave) * wave if wave <= tokens else tokens


def _rows_side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(-2) == x.shape[-1]) else x.contiguous()
