"""`residuals` in one pass, to the same bits as the reference."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens", "num_places", "num_references"])
def residual_kernel(
    tokens,  # [batch, num_tokens, width] float32
    places,  # [num_places] int64
    references,  # [batch, num_references, width] float32
    reference_idx,  # [batch, num_places] int16, unsigned
    prediction,  # [width] float32
    residuals,  # [batch, num_places, width] float32
    num_tokens,
    num_places,
    num_references,
    width,
    BLOCK: tl.constexpr,
):
    place, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_number = number < width
    idx = tl.load(reference_idx + row * num_places + place).to(tl.int32) & 0xFFFF
    reference = references + (row * num_references + idx) * width
    token = tokens + (row * num_tokens + tl.load(places + place)) * width
    predicted = tl.load(reference + number, mask=is_number) * tl.load(prediction + number, mask=is_number)
    left = tl.load(token + number, mask=is_number) - predicted
    tl.store(residuals + (row * num_places + place) * width + number, left, mask=is_number)


def residuals(
    tokens: torch.Tensor,
    places: torch.Tensor,
    references: torch.Tensor,
    reference_idx: torch.Tensor,
    prediction: torch.Tensor,
) -> torch.Tensor:
    """See `reference.residuals`."""
    (batch, num_tokens, width), num_places = tokens.shape, places.shape[0]
    made = tokens.new_empty(batch, num_places, width)
    if made.numel():
        arguments = [part.contiguous() for part in (tokens, places, references, reference_idx, prediction)]
        # a fused multiply-add would round differently from the reference
        residual_kernel[(num_places, triton.cdiv(width, BLOCK), batch)](
            *(*arguments, made, num_tokens, num_places, references.shape[1], width),
            BLOCK=BLOCK,
            enable_fp_fusion=False,
        )
    return made
