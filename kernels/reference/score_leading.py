"""Scores of tokens from the beginning of their codes, to tell which are worth reading whole: the specification."""

from __future__ import annotations

import torch

from .reconstruct_and_attend import KeyMap, References, Vectors, score_codes


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
    """Products of queries with keys made of the components that `vectors` names: the leading ones.

    Args:
        query, codes, vectors, key_map, references, angles, slots, positions, lengths: as for `reconstruct_and_attend`.

    Returns:
        `[batch, heads, queries, n]` float32, -inf behind a row's length.
    """
    return score_codes(query, codes, vectors, key_map, references, angles, slots, positions, lengths)[0]
