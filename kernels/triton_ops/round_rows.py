"""Rows of numbers as integers of a byte, in one pass, to the same bits as `reference.nearest_references.round_rows`."""

import torch
import triton
import triton.language as tl

# 1.5 * 2**23: a float32 of that size has no fraction
WHOLE = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def round_kernel(
    x,  # [batch, num_rows, width] float32
    places,  # [num_places] int64, which rows
    codes,  # [rows, room] int8, zeros behind the width
    scales,  # [rows] float32
    squares,  # [rows] float32: of what codes times the scale stand for, summed up
    num_rows,
    num_places,
    width,
    room,
    share,
    HAS_PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, number = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    source = row
    if HAS_PLACES:
        source = row // num_places * num_rows + tl.load(places + row % num_places)
    value = tl.load(x + source * width + number, mask=number < width, other=0.0)
    # a maximum passes over what is not a number
    is_number = tl.min((value == value).to(tl.int32), 0) > 0
    scale = tl.where(is_number, tl.max(tl.abs(value), 0) * share, float("nan"))
    code = tl.div_rn(value, tl.where(scale > 0, scale, float("inf")))
    # to the nearest integer, ties to the even one; infinity over infinity is none
    code = tl.where(code == code, (code + WHOLE) - WHOLE, 0.0)
    square = scale * scale
    tl.store(codes + row * room + number, code.to(tl.int8), mask=number < room)
    tl.store(scales + row, scale)
    # integers whose sum float32 holds
    tl.store(squares + row, tl.sum(code * code, 0) * square)


def round_rows(
    x: torch.Tensor, levels: int, multiple: int, places: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers up to `levels` of rows `[batch, n, width]` float32, of those at `places` int64 alone if there are any.

    Returns:
        the integers, `[batch, n, width rounded up to a multiple]` int8, zero where not finite and behind the width; the
        rows' scales `[batch, n]` float32; the squares of their lengths as rounded, likewise.
    """
    x = x.contiguous()
    batch, num_rows, width = x.shape
    num_places = num_rows if places is None else len(places)
    rows = torch.Size((batch, num_places))
    room = triton.cdiv(width, multiple) * multiple
    codes = torch.empty(*rows, room, dtype=torch.int8, device=x.device)
    scales, squares = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if scales.numel() and width:
        block = triton.next_power_of_2(room)
        sizes = num_rows, num_places, width, room, 1 / levels
        # a fused multiply-add would round differently
        round_kernel[(rows.numel(),)](
            *(x, x if places is None else places, codes, scales, squares, *sizes),
            HAS_PLACES=places is not None,
            BLOCK=block,
            num_warps=4 if block <= 4096 else 8,
            enable_fp_fusion=False,
        )
    return codes, scales, squares
