"""Symmetric group quantisation to packed signed integers: the specification.

One byte holds `8 // nbits` codes. The last axis is cut into `8 // nbits` equal consecutive segments; byte `j` holds
element `j` of segment 0 in its lowest bits, of segment 1 in the next, and so on. For [K;V] joined and 4 bits, the low
nibbles are therefore K and the high nibbles V, and unpacking is two shifts with no interleaving.
"""

import torch


def quantize(x: torch.Tensor, nbits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises groups of the last axis and packs the codes.

    Every step is elementwise or a maximum, so the bytes of a token do not depend on the tokens beside it.

    Args:
        x: `[..., width]` float32; `group_size` and `8 // nbits` divide `width`.
        nbits: 2, 4 or 8.
        group_size: numbers per scale.

    Returns:
        codes `[..., width * nbits // 8]` uint8, scale `[..., width // group_size]` float16.
    """
    top = 2 ** (nbits - 1) - 1
    groups = x.unflatten(-1, (-1, group_size))
    # a non-finite input must not turn into finite numbers: its scale is NaN and so is what is read back
    peak = groups.abs().amax(-1)
    scale = torch.where(peak.isfinite(), (peak / top).clamp(max=torch.finfo(torch.float16).max), torch.nan)
    scale = scale.to(torch.float16)
    step = scale.float().unsqueeze(-1)
    codes = torch.where(step > 0, groups / step, 0.0).round_().clamp_(-top - 1, top).to(torch.int8).flatten(-2)
    return pack(codes, nbits), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, nbits: int) -> torch.Tensor:
    """Inverse of `quantize`: codes `[..., bytes]`, scale `[..., groups]` -> `[..., width]` float32."""
    numbers = unpack(codes, nbits).to(torch.float32)
    numbers.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.unsqueeze(-1))
    return numbers


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Signed codes `[..., width]` int8 -> packed bytes `[..., width * nbits // 8]` uint8."""
    if nbits == 8:
        return codes.view(torch.uint8)
    fields = (codes.view(torch.uint8) & (2**nbits - 1)).chunk(8 // nbits, dim=-1)
    packed = fields[0].clone()
    for place, field in enumerate(fields[1:], start=1):
        packed |= field << (place * nbits)
    return packed


def unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """Packed bytes `[..., bytes]` uint8 -> signed codes `[..., bytes * 8 // nbits]` int8."""
    if nbits == 8:
        return packed.view(torch.int8)
    # shifting a field to the top of the byte and back down carries its sign along
    places = range(8 // nbits)
    return torch.cat([(packed << (8 - nbits * (p + 1))).view(torch.int8) >> (8 - nbits) for p in places], dim=-1)
