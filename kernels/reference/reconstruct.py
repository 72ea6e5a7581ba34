"""Residual + mean of references -> tokens: the specification."""

import torch

from .quantize import dequantize


def predict(references: torch.Tensor, reference_idx: torch.Tensor) -> torch.Tensor:
    """Mean of the chosen references.

    Args:
        references: `[batch, num_references, width]` float32.
        reference_idx: `[batch, num_tokens, top_k]` int16 holding unsigned 16-bit numbers, or int64.

    Returns:
        `[batch, num_tokens, width]` float32.
    """
    batch, num_references, width = references.shape
    idx = reference_idx.to(torch.int32) & 0xFFFF
    if batch > 1:
        idx = idx + torch.arange(batch, device=idx.device, dtype=idx.dtype).view(-1, 1, 1) * num_references
    rows = references.reshape(-1, width)
    total = torch.nn.functional.embedding(idx[..., 0], rows)
    # summed one after the other: the order, and so every bit, is the same for any shape
    for k in range(1, idx.shape[-1]):
        total += torch.nn.functional.embedding(idx[..., k], rows)
    return total if idx.shape[-1] == 1 else total / idx.shape[-1]


def reconstruct(
    residual_codes: torch.Tensor,
    residual_scale: torch.Tensor,
    reference_idx: torch.Tensor,
    references: torch.Tensor,
    nbits: int,
) -> torch.Tensor:
    """Reads tokens back.

    Args:
        residual_codes: `[batch, num_tokens, bytes]` uint8, as packed by `quantize`.
        residual_scale: `[batch, num_tokens, groups]` float16.
        reference_idx: `[batch, num_tokens, top_k]` int16 holding unsigned 16-bit numbers.
        references: `[batch, num_references, width]` float32, decoded.
        nbits: bits per residual number.

    Returns:
        `[batch, num_tokens, width]` float32.
    """
    tokens = dequantize(residual_codes, residual_scale, nbits)
    return tokens.add_(predict(references, reference_idx))
