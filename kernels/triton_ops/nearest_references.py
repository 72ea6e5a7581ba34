"""`nearest_references` in one kernel that never writes the matrix of distances, to the same bits as the reference.

Rows are integers of a byte, so dot products are exact: on int8 tensor cores, or where Triton has none (sm_75) in
float16, summed in float32. A call finds the nearest reference of each token beyond the ones already found, so `top_k`
calls find them all, nearest first and the earlier one among equals.
"""

import torch
import triton
import triton.language as tl

from ..reference.nearest_references import num_levels
from .capability import capability
from .round_rows import round_rows

# numbers of a row that are read at once
BLOCK_WIDTH = 128
# as many as keep a GPU busy, and the fewest references of one
PROGRAMS, LEAST_PART = 256, 256


@triton.jit(do_not_specialize=["num_tokens", "num_references", "part_size"])
def nearest_kernel(
    codes,  # [batch, num_tokens, width] int8, whole tiles of numbers in a row
    scales,  # [batch, num_tokens] float32
    reference_codes,  # [batch, num_references, width] int8
    reference_scales,  # [batch, num_references] float32, twice the scale
    squares,  # [batch, num_references] float32
    num_visible,  # [batch, num_tokens] int32
    known_distances,  # [batch, num_tokens] float32: of the reference found before
    known_found,  # [batch, num_tokens] int32, its number
    distances,  # [parts, batch, num_tokens] float32: of the next one in each part of the references
    found,  # [parts, batch, num_tokens] int32, its number
    num_tokens,
    num_references,
    part_size,
    width,
    IS_FIRST: tl.constexpr,
    IN_BYTES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_REFERENCES: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    place = row * num_tokens + tokens
    scale = tl.load(scales + place, mask=is_token, other=0.0)
    visible = tl.load(num_visible + place, mask=is_token, other=0)
    if not IS_FIRST:
        known_distance = tl.load(known_distances + place, mask=is_token, other=float("inf"))
        known = tl.load(known_found + place, mask=is_token, other=0)
    best = tl.full([BLOCK_TOKENS], float("inf"), tl.float32)
    best_idx = tl.zeros([BLOCK_TOKENS], tl.int32)
    # no token of the tile may use references beyond
    last = tl.minimum(tl.minimum(num_references, tl.max(visible, 0)), (part + 1) * part_size)
    for first in range(part * part_size, last, BLOCK_REFERENCES):
        idx = first + tl.arange(0, BLOCK_REFERENCES)
        is_reference = idx < num_references
        dot = tl.zeros([BLOCK_TOKENS, BLOCK_REFERENCES], tl.int32 if IN_BYTES else tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            numbers = start + tl.arange(0, BLOCK_WIDTH)
            x = tl.load(
                codes + place[:, None] * width + numbers[None, :],
                mask=is_token[:, None],
                other=0,
            )
            r = tl.load(
                reference_codes + (row * num_references + idx)[None, :] * width + numbers[:, None],
                mask=is_reference[None, :],
                other=0,
            )
            if IN_BYTES:
                dot = tl.dot(x, r, dot, out_dtype=tl.int32)
            else:
                dot = tl.dot(x.to(tl.float16), r.to(tl.float16), dot)
        square = tl.load(squares + row * num_references + idx, mask=is_reference, other=0.0)
        twice = tl.load(reference_scales + row * num_references + idx, mask=is_reference, other=0.0)
        distance = square[None, :] - (dot.to(tl.float32) * scale[:, None]) * twice[None, :]
        # a reference that is not finite is nobody's nearest
        fits = (idx[None, :] < visible[:, None]) & (distance == distance)
        if not IS_FIRST:
            is_later = (distance == known_distance[:, None]) & (idx[None, :] > known[:, None])
            fits = fits & ((distance > known_distance[:, None]) | is_later)
        distance = tl.where(fits, distance, float("inf"))
        tile_best = tl.min(distance, 1)
        tile_idx = tl.min(tl.where(distance == tile_best[:, None], idx[None, :], num_references), 1)
        is_better = tile_best < best
        best_idx = tl.where(is_better, tile_idx, best_idx)
        best = tl.where(is_better, tile_best, best)
    place += part * tl.num_programs(2) * num_tokens
    tl.store(distances + place, best, mask=is_token)
    tl.store(found + place, best_idx, mask=is_token)


def nearest_references(
    tokens: torch.Tensor,
    references: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.nearest_references`."""
    batch, num_tokens, width = tokens.shape
    num_tokens = num_tokens if places is None else len(places)
    num_references = references.shape[1]
    found = torch.zeros(top_k, batch, num_tokens, dtype=torch.int32, device=tokens.device)
    if num_tokens == 0:
        return found.permute(1, 2, 0).long()
    levels = num_levels(width)
    codes, scales, _ = round_rows(tokens, levels, BLOCK_WIDTH, places)
    reference_codes, reference_scales, squares = round_rows(references, levels, BLOCK_WIDTH)
    distances = torch.empty(top_k, batch, num_tokens, dtype=torch.float32, device=tokens.device)
    visible = num_visible.expand(batch, -1).to(torch.int32).contiguous()
    arguments = codes, scales, reference_codes, 2 * reference_scales, squares, visible
    card = capability(tokens.device)
    options = {"IN_BYTES": card >= 80} | tile(card)
    blocks = triton.cdiv(num_tokens, options["BLOCK_TOKENS"])
    # few tokens: several programs share the references of each
    part_size = triton.cdiv(num_references, max(1, PROGRAMS // (blocks * batch)))
    part_size = max(LEAST_PART, triton.cdiv(part_size, options["BLOCK_REFERENCES"]) * options["BLOCK_REFERENCES"])
    parts = triton.cdiv(num_references, part_size)
    part_distances = distances.new_empty(parts, batch, num_tokens)
    part_found = found.new_empty(parts, batch, num_tokens)
    for k in range(top_k):
        sizes = num_tokens, num_references, part_size, arguments[0].shape[-1]
        known = distances[max(k - 1, 0)], found[max(k - 1, 0)]
        if parts == 1:
            part_distances, part_found = distances[k], found[k]
        # a fused multiply-add would round distances differently from the reference
        nearest_kernel[(blocks, parts, batch)](
            *(*arguments, *known, part_distances, part_found, *sizes),
            IS_FIRST=k == 0,
            **options,
            enable_fp_fusion=False,
        )
        if parts > 1:
            torch.amin(part_distances, 0, out=distances[k])
            # the first of equals
            torch.amin(torch.where(part_distances == distances[k], part_found, num_references), 0, out=found[k])
    if top_k > 1:
        # fewer visible than wanted: repeat the nearest
        found = torch.where(distances.isfinite(), found, found[0])
    return found.permute(1, 2, 0).long()


def tile(capability: int) -> dict[str, int]:
    """Tokens, references and numbers of a row in a tile, for a card of that compute capability."""
    if capability < 80:
        return {"BLOCK_TOKENS": 64, "BLOCK_REFERENCES": 64, "BLOCK_WIDTH": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_TOKENS": 64, "BLOCK_REFERENCES": 128, "BLOCK_WIDTH": BLOCK_WIDTH, "num_warps": 4, "num_stages": 3}
