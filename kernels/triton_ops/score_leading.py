"""`score_leading`: a chunk of tokens decoded, then scored by all heads."""

import torch
import triton

from ..reference.reconstruct_and_attend import KeyMap, References, Rotation, Vectors
from .capability import capability
from .decoding import WHOLE, Decoder
from .lead_kernels import lead_kernel
from .scoring import half_of, rotation_inputs

# queries of a head that are multiplied at once; tensor cores take no fewer
QUERIES = 16


def tile(half: int, num_components: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Tokens and components of a tile, and warps.

    Args:
        half: half a head's numbers, a power of two.
        num_components: of a token.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    tokens, most, warps = (128 if half <= 64 else 64), 64, 8
    if dtype == torch.float32 or capability < 80:
        tokens, most, warps = 32, 32, 4
    components = min(most, max(16, triton.next_power_of_2(num_components)))
    return {"BLOCK_TOKENS": tokens, "BLOCK_COMPONENTS": components, "num_warps": warps, "num_stages": 1}


def score_leading(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    references: References | None = None,
    rotation: Rotation | None = None,
    slots: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """See `reference.score_leading`."""
    batch, heads, num_queries, head_dim = query.shape
    decode = Decoder(codes, vectors, references, slots, slot_map)
    num_tokens, query = decode.num_tokens, query.contiguous()
    # it is small, and pairs of keys are not split then
    matrix = key_map.matrix.unflatten(-1, (heads, -1, 2)).movedim(-1, 1).contiguous()
    cos, sin, positions, pairs, angle_stride, interleaved = rotation_inputs(rotation, slots, query)
    half = half_of(head_dim)
    options = tile(half, decode.num_components, decode.dtype, capability(decode.device))
    room = decode.room(1, options["BLOCK_TOKENS"])
    components = decode.new(batch, room, decode.width, dtype=decode.dtype)
    score_room = triton.cdiv(num_tokens, WHOLE) * WHOLE
    scores = decode.new(batch, heads, num_queries, score_room)
    for first, count in decode.chunks(room):
        decode(first, count, components)
        lead_kernel[(triton.cdiv(count, options["BLOCK_TOKENS"]), triton.cdiv(num_queries, QUERIES), batch)](
            *(query, components, matrix, *key_map[1:], cos, sin, positions, lengths, scores),
            *(scale, first, num_tokens, decode.num_components, decode.width, room, score_room),
            *(heads, num_queries, head_dim // 2, pairs, angle_stride),
            HAS_POSITIONS=positions is not None,
            HAS_LENGTHS=lengths is not None,
            INTERLEAVED=interleaved,
            HALF=half,
            QUERIES=QUERIES,
            **options,
        )
    return scores[..., :num_tokens]
