"""Asymmetric group quantisation to packed unsigned integers: the specification.

One byte holds `8 // nbits` codes. The last axis is cut into `8 // nbits` equal consecutive segments; byte `j` holds
element `j` of segment 0 in its lowest bits, of segment 1 in the next, and so on. For [K;V] joined and 4 bits, the low
nibbles are therefore K and the high nibbles V, and unpacking is a mask and a shift with no interleaving.
"""

import math

import torch


def quantize(x: torch.Tensor, nbits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises groups of the last axis between their minimum and maximum and packs the codes.

    Every step is elementwise, a minimum or a maximum, so the bytes of a token do not depend on the tokens beside it.

    Args:
        x: `[..., width]` float32; `group_size` and `8 // nbits` divide `width`.
        nbits: 2, 4 or 8.
        group_size: numbers that share a scale and a minimum.

    Returns:
        codes `[..., width * nbits // 8]` uint8, and scale and minimum of each group side by side,
        `[..., width // group_size, 2]` float16. A group that is not finite, or beyond float16,
        reads back as NaN: to be seen rather than to be wrong by little.
    """
    groups = x.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    # times a constant: GPUs divide by a scalar that way, and all devices must agree
    scale = (high - low) * (1 / (2**nbits - 1))
    levels = torch.stack([scale, low], dim=-1).half()
    levels = torch.where(levels.isfinite().all(-1, keepdim=True), levels, torch.nan)
    # codes are chosen for the rounded levels, which are all that a reader has
    step, bottom = levels.float().unsqueeze(-1).unbind(-2)
    codes = torch.where(step > 0, (groups - bottom) / step, 0.0).round_().clamp_(0, 2**nbits - 1)
    return pack(codes.to(torch.uint8).flatten(-2), nbits), levels


def dequantize(
    codes: torch.Tensor, levels: torch.Tensor, nbits: int, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Inverse of `quantize`: codes `[..., bytes]`, levels `[..., groups, 2]` -> `[..., width]` float32.

    Args:
        scratch: 1-D float32 to hold the result.
    """
    numbers = take(scratch, (*codes.shape[:-1], codes.shape[-1] * 8 // nbits), codes.device)
    for field, part in zip(unpack(codes, nbits), numbers.chunk(8 // nbits, dim=-1), strict=True):
        part.copy_(field)
    scale, low = levels.float().unsqueeze(-1).unbind(-2)
    # two operations rather than a fused one, whose rounding may differ between the ends and the middle of a tensor
    numbers.unflatten(-1, (levels.shape[-2], -1)).mul_(scale).add_(low)
    return numbers


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Codes `[..., width]` uint8 below `2**nbits` -> packed bytes `[..., width * nbits // 8]` uint8."""
    fields = codes.chunk(8 // nbits, dim=-1)
    packed = fields[0].clone()
    for place, field in enumerate(fields[1:], start=1):
        packed |= field << (place * nbits)
    return packed


def unpack(packed: torch.Tensor, nbits: int) -> list[torch.Tensor]:
    """Packed bytes `[..., bytes]` uint8 -> the `8 // nbits` segments of codes, each `[..., bytes]` uint8."""
    if nbits == 8:
        return [packed]
    return [(packed >> place) & (2**nbits - 1) for place in range(0, 8, nbits)]


def take(scratch: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The beginning of 1-D `scratch` seen as `shape`, or new memory."""
    if scratch is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    return scratch[: math.prod(shape)].view(shape)
