"""`reconstruct_and_attend` by way of a chunk of components that stays in the L2 cache of a GPU.

Softmax is put together from spans of tokens, each relative to its own maximum.
"""

import torch
import triton

from ..reference.attend import Attended
from ..reference.reconstruct_and_attend import KeyMap, References, Vectors
from .attend_kernels import merge_kernel, mix_kernel
from .scoring import FEWEST_ROWS, WHOLE, Scorer

# spans of a chunk with sums of their own, over all rows, and the fewest tokens of one
MOST_SPANS, SPAN = 8, 256
MIX_TILE = {"BLOCK_TOKENS": 64, "BLOCK_COMPONENTS": 128, "num_warps": 8}


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
    score = Scorer(query, codes, vectors, key_map, references, angles, mask, slots, positions, lengths)
    batch, heads, num_queries, _ = query.shape
    rows, num_components, width, room = score.rows, score.num_components, score.width, score.room
    row_block = min(64, max(FEWEST_ROWS, triton.next_power_of_2(rows)))
    row_blocks, blocks = triton.cdiv(rows, row_block), width // MIX_TILE["BLOCK_COMPONENTS"]
    num_spans = max(1, min(MOST_SPANS // batch, room // SPAN))
    span = triton.cdiv(room, num_spans * WHOLE) * WHOLE

    components, scores = score.new_components(), score.new(score.parts, batch, rows, room)
    maxima, totals = (score.new(blocks, num_spans, batch, rows) for _ in range(2))
    mixed = score.new(num_spans, batch, rows, num_components)
    for chunk, (first, count) in enumerate(score.chunks()):
        score(first, count, components, scores)
        mix_kernel[(num_spans, blocks, batch * row_blocks)](
            *(scores, components, maxima, totals, mixed),
            *(chunk, span, count, num_components, width, rows, room, row_blocks),
            PARTS=score.parts,
            ROWS=row_block,
            num_stages=mix_stages(score.dtype),
            **MIX_TILE,
        )
    maximum, total, result = (score.new(batch, heads, num_queries, size) for size in (1, 1, num_components))
    merge_kernel[(batch * rows, blocks)](
        *(maxima, totals, mixed, maximum, total, result),
        *(num_spans, num_components),
        SPANS=triton.next_power_of_2(num_spans),
        BLOCK_COMPONENTS=MIX_TILE["BLOCK_COMPONENTS"],
    )
    return Attended(maximum, total, result)
