"""`reconstruct_and_attend` by way of a chunk of components that stays in the L2 cache of a GPU.

Softmax is put together from spans of tokens, each relative to its own maximum.
"""

import torch
import triton

from ..reference.attend import Attended
from ..reference.reconstruct_and_attend import KeyMap, References, Rotation, ValueMap, Vectors
from .attend_kernels import mix_kernel
from .decoding import WHOLE, Decoder
from .merge_kernels import before_of, finish_kernel, project_kernel
from .scoring import FEWEST_ROWS, Scorer

# spans of a chunk with sums of their own, over all rows, and the fewest tokens of one
MOST_SPANS, SPAN = 8, 256
# queries that are multiplied at once
MOST_ROWS = 64
MIX_TILE = {"BLOCK_TOKENS": 64, "BLOCK_COMPONENTS": 128, "num_warps": 8}
PROJECT_VALUES = 128


def mix_stages(dtype: torch.dtype) -> int:
    """How many tiles of components `mix` loads ahead: what the smallest cards have room for."""
    return 2 if dtype == torch.float32 else 3


def reconstruct_and_attend(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    value_map: ValueMap,
    references: References | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """See `reference.reconstruct_and_attend`."""
    decode = Decoder(codes, vectors, references, slots, slot_map)
    score = Scorer(query, decode, key_map, rotation, mask, slots, lengths, scale)
    batch, heads, num_queries, _ = query.shape
    rows, num_components, width, room, new = score.rows, decode.num_components, decode.width, score.room, decode.new
    row_block = min(MOST_ROWS, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
    row_blocks, blocks = triton.cdiv(rows, row_block), width // MIX_TILE["BLOCK_COMPONENTS"]
    num_spans = max(1, min(MOST_SPANS // batch, room // SPAN))
    span = triton.cdiv(room, num_spans * WHOLE) * WHOLE

    components, scores = new(batch, room, width, dtype=decode.dtype), new(score.parts, batch, rows, room)
    maxima, totals = (new(blocks, num_spans, batch, rows) for _ in range(2))
    mixed = new(num_spans, batch, rows, num_components)
    for chunk, (first, count) in enumerate(decode.chunks(room)):
        decode(first, count, components)
        score(first, count, components, scores)
        mix_kernel[(num_spans, blocks, batch * row_blocks)](
            *(scores, components, maxima, totals, mixed),
            *(chunk, span, count, num_components, width, rows, room, row_blocks),
            PARTS=score.parts,
            ROWS=row_block,
            num_stages=mix_stages(decode.dtype),
            **MIX_TILE,
        )

    value_dim, spans = value_map.matrix.shape[-1], triton.next_power_of_2(num_spans)
    parts = new(blocks, batch * rows, value_dim)
    row_block = min(MOST_ROWS, max(FEWEST_ROWS, triton.next_power_of_2(num_queries)))
    blocks_of_values = triton.cdiv(value_dim, PROJECT_VALUES)
    project_kernel[(blocks, blocks_of_values * triton.cdiv(num_queries, row_block), batch * heads)](
        *(maxima, totals, mixed, value_map.matrix.contiguous(), parts),
        *(num_spans, num_components, heads, num_queries),
        SPANS=spans,
        VALUE_DIM=value_dim,
        ROWS=row_block,
        BLOCK_VALUES=PROJECT_VALUES,
        BLOCK_COMPONENTS=MIX_TILE["BLOCK_COMPONENTS"],
    )
    output = new(batch, heads, num_queries, value_dim, dtype=dtype)
    log_total = new(batch, heads, num_queries, 1)
    finish_kernel[(batch * rows,)](
        *(parts, maxima, totals, value_map.scale.contiguous(), value_map.mean.contiguous()),
        *before_of(before),
        *(output, log_total, num_spans, heads, num_queries, blocks),
        HAS_BEFORE=before is not None,
        SPANS=spans,
        BLOCKS=triton.next_power_of_2(blocks),
        VALUE_DIM=value_dim,
        BLOCK_VALUES=triton.next_power_of_2(value_dim),
    )
    return Attended(output, log_total)
