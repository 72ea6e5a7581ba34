"""`score_leading`: the first two kernels of `reconstruct_and_attend`, with all scores kept."""

import math

import torch
import triton

from ..reference.reconstruct_and_attend import KeyMap, References, Vectors
from .scoring import WHOLE, Scorer


def score_leading(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    references: References | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.score_leading`."""
    score = Scorer(query, codes, vectors, key_map, references, angles, None, slots, positions, lengths)
    room = triton.cdiv(score.num_tokens, WHOLE) * WHOLE
    components, scores = score.new_components(), score.new(score.parts, score.batch, score.rows, room)
    for first, count in score.chunks():
        score(first, count, components, scores[..., first:])
    scores = (scores[0] if score.parts == 1 else scores.sum(0)).unflatten(1, query.shape[1:3])
    # they were powers of two
    return scores[..., : score.num_tokens].mul_(math.log(2))
