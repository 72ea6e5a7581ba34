"""`analyse` on tensor cores: a number is the sum of two in float16, which carry 22 bits of it.

A component is summed in one order whatever the shape, so a token gets the same numbers in any company.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .capability import capability

SPLIT_WIDTH = 1024
# components come in multiples of it
WHOLE = 16


@triton.jit
def power_of_two(most):
    """What brings the power of two below a token's largest number to 2**14, nearly as much as float16 holds."""
    scale = most.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(scale, 0x10000000).to(tl.float32, bitcast=True) * 6.103515625e-05


@triton.jit
def split_kernel(
    tokens,  # [tokens, width] float32
    mean,  # [width] float32
    weights,  # [width] float32
    parts,  # [tokens, 2, room] float16, whose sum times the scale is a number; zero behind the last
    scales,  # [tokens] float32, powers of two
    width,
    room,
    BLOCK_WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        place = start + tl.arange(0, BLOCK_WIDTH)
        is_number = place < width
        x = tl.load(tokens + token * width + place, mask=is_number, other=0.0)
        x = x - tl.load(mean + place, mask=is_number, other=0.0)
        most = tl.maximum(most, tl.abs(x * tl.load(weights + place, mask=is_number, other=0.0)))
    scale = power_of_two(tl.max(most, 0))
    tl.store(scales + token, scale)
    for start in range(0, room, BLOCK_WIDTH):
        place = start + tl.arange(0, BLOCK_WIDTH)
        is_number = place < width
        x = tl.load(tokens + token * width + place, mask=is_number, other=0.0)
        x = x - tl.load(mean + place, mask=is_number, other=0.0)
        x = x * tl.load(weights + place, mask=is_number, other=0.0) / scale
        high = x.to(tl.float16)
        out = parts + token * 2 * room + place
        tl.store(out, high, mask=place < room)
        tl.store(out + room, (x - high.to(tl.float32)).to(tl.float16), mask=place < room)


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_kernel(
    parts,  # [tokens, PARTS, room] float16
    scales,  # [tokens] float32
    inverse,  # [width, stride] float16
    components,  # [tokens, components] float32
    num_tokens,
    num_components,
    stride,  # of rows of `inverse`, whose numbers behind the last component are read as well
    width,
    room,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COMPONENTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # programs that run at the same time share tokens
    component = tl.program_id(0) * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_component, is_token = component < num_components, token < num_tokens
    # what lies behind the last is not stored
    numbers = parts + tl.where(is_token, token, 0).to(tl.int64)[:, None] * PARTS * room
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_COMPONENTS], tl.float32)
    for start in range(0, PARTS * room, BLOCK_WIDTH):
        place = start + tl.arange(0, BLOCK_WIDTH)
        number = tl.load(numbers + place[None, :])
        if PARTS == 2:
            place = place - tl.where(start < room, 0, room)
        matrix = inverse + place[:, None] * stride + component[None, :]
        matrix = tl.load(matrix, mask=(place < width)[:, None] & (component < stride)[None, :], other=0.0)
        sums = tl.dot(number, matrix, sums)
    scale = tl.load(scales + token, mask=is_token, other=0.0)
    place = components + token.to(tl.int64)[:, None] * num_components + component[None, :]
    tl.store(place, sums * scale[:, None], mask=is_token[:, None] & is_component[None, :])


def tile(capability: int) -> dict[str, int]:
    """Tokens, components and numbers of a token in a tile, for a card of that compute capability."""
    if capability in (90, 100):
        tokens, components, warps, stages = 128, 256, 8, 3
    elif capability >= 80:
        tokens, components, warps, stages = 128, 128, 8, 3
    else:
        tokens, components, warps, stages = 64, 128, 4, 2
    tile = {"BLOCK_TOKENS": tokens, "BLOCK_COMPONENTS": components, "BLOCK_WIDTH": 64 if capability >= 80 else 32}
    return tile | {"num_warps": warps, "num_stages": stages}


def analyse(tokens: torch.Tensor, mean: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """See `reference.analyse`."""
    *shape, width = tokens.shape
    room = room_of(width, tokens.device)
    parts = torch.empty(*shape, 2, room, dtype=torch.float16, device=tokens.device)
    scales = torch.empty(shape, dtype=torch.float32, device=tokens.device)
    if scales.numel():
        arguments = tokens.contiguous(), mean, weights, parts, scales, width, room
        split_kernel[(scales.numel(),)](*arguments, BLOCK_WIDTH=SPLIT_WIDTH)
    return product(parts, scales, inverse)


def room_of(width: int, device: torch.device) -> int:
    """Places of a token of `width` numbers: whole tiles."""
    block = tile(capability(device))["BLOCK_WIDTH"]
    return triton.cdiv(width, block) * block


def product(parts: torch.Tensor, scales: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Components `[batch, n, components]` float32 of tokens that are the sum of `parts`, times their scale.

    Args:
        parts: `[batch, n, 1 or 2, room_of(width)]` float16, zero behind the width.
        scales: `[batch, n]` float32.
        inverse: `[width, components]` float16.
    """
    width, num_components = inverse.shape
    components = scales.new_empty(*scales.shape, num_components)
    if components.numel() == 0:
        return components
    filling = -num_components % WHOLE
    # rows that begin at whole words are read by the word
    inverse = F.pad(inverse, (0, filling)) if filling else inverse.contiguous()
    num_tokens, options = scales.numel(), tile(capability(parts.device))
    grid = triton.cdiv(num_components, options["BLOCK_COMPONENTS"]), triton.cdiv(num_tokens, options["BLOCK_TOKENS"])
    sizes = num_tokens, num_components, inverse.shape[1], width, parts.shape[3]
    multiply_kernel[grid](parts, scales, inverse, components, *sizes, PARTS=parts.shape[2], **options)
    return components
