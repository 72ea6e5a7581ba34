"""Residual + mean of references -> tokens: the specification."""

import torch

from .quantize import dequantize, take


def predict(references: torch.Tensor, reference_idx: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of the chosen references.

    Args:
        references: `[batch, num_references, width]` float32.
        reference_idx: `[batch, ..., top_k]` int16 holding unsigned 16-bit numbers, or wider.
        scratch: 1-D float32 to hold the result.

    Returns:
        `[batch, ..., width]` float32.
    """
    batch, num_references, width = references.shape
    idx = reference_idx.to(torch.int32) & 0xFFFF
    if batch > 1:
        first_row = torch.arange(batch, device=idx.device, dtype=idx.dtype) * num_references
        idx = idx + first_row.view(-1, *[1] * (idx.ndim - 1))
    rows = references.reshape(-1, width)
    total = take(scratch, (*idx.shape[:-1], width), rows.device)
    torch.index_select(rows, 0, idx[..., 0].flatten(), out=total.view(-1, width))
    # summed one after the other: the order, and so every bit, is the same for any shape
    for k in range(1, idx.shape[-1]):
        total += torch.nn.functional.embedding(idx[..., k], rows)
    return total if idx.shape[-1] == 1 else total.mul_(1 / idx.shape[-1])


def reconstruct(
    residual_codes: torch.Tensor,
    residual_levels: torch.Tensor,
    reference_idx: torch.Tensor,
    references: torch.Tensor,
    nbits: int,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reads tokens back.

    Args:
        residual_codes: `[batch, ..., bytes]` uint8, as packed by `quantize`.
        residual_levels: `[batch, ..., groups, 2]` float16.
        reference_idx: `[batch, ..., top_k]` int16 holding unsigned 16-bit numbers.
        references: `[batch, num_references, width]` float32, decoded.
        nbits: bits per residual number.
        scratch: `[2, at least the numbers of the tokens]` float32 to work in and to hold the result; fresh memory costs
            a CPU more than the arithmetic.

    Returns:
        `[batch, ..., width]` float32.
    """
    first, second = (None, None) if scratch is None else scratch
    tokens = dequantize(residual_codes, residual_levels, nbits, first)
    return tokens.add_(predict(references, reference_idx, second))
