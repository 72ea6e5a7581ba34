"""Scores of tokens from the beginning of their codes, to tell which are worth reading whole: the specification."""

from __future__ import annotations

import torch

from .reconstruct_and_attend import KeyMap, References, Rotation, Vectors, score_codes


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
    """Products of queries with keys made of the components that `vectors` names: the leading ones.

    Args:
        query, codes, vectors, key_map, references, rotation, slots, slot_map, lengths, scale: as for
            `reconstruct_and_attend`.

    Returns:
        `[batch, heads, queries, n]` float32, -inf behind a row's length.
    """
    return score_codes(query, codes, vectors, key_map, references, rotation, slots, slot_map, lengths, scale)[0]
