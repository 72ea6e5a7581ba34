"""What references leave of tokens: the specification."""

from __future__ import annotations

import torch

from .reconstruct import predict


def residuals(
    tokens: torch.Tensor,
    places: torch.Tensor,
    references: torch.Tensor,
    reference_idx: torch.Tensor,
    prediction: torch.Tensor,
) -> torch.Tensor:
    """Tokens less their reference times `prediction`.

    Args:
        tokens: `[batch, n, numbers]` float32.
        places: `[m]` int64, which of them.
        references: `[batch, num_references, numbers]` float32.
        reference_idx: `[batch, m, 1]` int16 holding unsigned 16-bit numbers, one reference for each.
        prediction: `[numbers]` float32.

    Returns:
        `[batch, m, numbers]` float32.
    """
    # multiplied before it is subtracted: a fused operation would round differently
    return tokens.index_select(1, places).sub_(predict(references, reference_idx).mul_(prediction))
