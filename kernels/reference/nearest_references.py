"""Nearest references of tokens by L2, streamed, in exact integer arithmetic: the specification.

A rounding error that depends on the shape of a matrix product would let the same token choose another reference when
it arrives in another chunk or batch. So tokens and references are first rounded to integers with one scale each, few
enough levels that every dot product is an integer below 2**24. Such sums are exact in float32 (and in TF32 and bf16
tensor cores with float32 accumulation) in any order, hence equal on every device, for every tiling.
"""

import math

import torch

TOKEN_TILE = 1024
REFERENCE_TILE = 1024


def nearest_references(
    tokens: torch.Tensor,
    references: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Finds for each token the `top_k` nearest of the references that it may use.

    Args:
        tokens: `[batch, num_tokens, width]` float32; with `places` any number of them.
        references: `[batch, num_references, width]` float32.
        num_visible: `[batch, num_tokens]` integer; token `t` may use references `0 .. num_visible[t] - 1`. At least
            one; where fewer than `top_k` are visible the nearest is repeated.
        top_k: references per token.
        places: `[num_tokens]` int64, which of `tokens` are meant; None: all.

    Returns:
        `[batch, num_tokens, top_k]` int64, nearest first; among equals the earlier reference wins.
    """
    tokens = tokens if places is None else tokens.index_select(1, places)
    # autocast would round the integer sums to 16 bits
    with torch.autocast(tokens.device.type, enabled=False):
        return _search(tokens, references, num_visible, top_k)


def _search(tokens, references, num_visible, top_k):
    batch, num_tokens, width = tokens.shape
    num_references = references.shape[1]
    levels = num_levels(width)
    reference_codes, reference_scale = round_rows(references, levels)
    square = (reference_codes * reference_codes).sum(-1) * (reference_scale * reference_scale)
    found = torch.empty(batch, num_tokens, top_k, dtype=torch.int64, device=tokens.device)
    for start in range(0, num_tokens, TOKEN_TILE):
        codes, scale = round_rows(tokens[:, start : start + TOKEN_TILE], levels)
        visible = num_visible[:, start : start + TOKEN_TILE, None]
        best = tokens.new_full((*codes.shape[:2], top_k), torch.inf)
        best_idx = torch.zeros(best.shape, dtype=torch.int64, device=tokens.device)
        for first in range(0, num_references, REFERENCE_TILE):
            tile = slice(first, first + REFERENCE_TILE)
            dot = codes @ reference_codes[:, tile].transpose(1, 2)
            # |x - r|^2 without |x|^2, which is the same for every reference of a token
            distance = square[:, None, tile] - (dot * scale[..., None]) * (2 * reference_scale[:, None, tile])
            idx = torch.arange(first, first + distance.shape[-1], device=tokens.device)
            # a reference that is not finite is nobody's nearest
            distance = torch.where((idx < visible) & ~distance.isnan(), distance, torch.inf)
            best, best_idx = _merge(best, best_idx, distance, idx.expand_as(distance), top_k)
        # fewer visible than wanted: repeat the nearest
        best_idx = torch.where(best.isfinite(), best_idx, best_idx[..., :1])
        found[:, start : start + TOKEN_TILE] = best_idx
    return found


def num_levels(width: int) -> int:
    """Integers that rows of `width` numbers are rounded to, so few that a dot product stays below 2**24."""
    return min(127, math.isqrt(2**24 // width))


def round_rows(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[.., width]` as integers up to `levels`, in float32, and their scales `[..]`."""
    scale = x.abs().amax(-1) * (1 / levels)
    codes = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0).round_()
    return codes, scale


def _merge(best, best_idx, distance, idx, top_k):
    """Running top-k: keeps the `top_k` smallest of what is known and what a tile adds, in a stable order."""
    if top_k == 1:
        tile_best, place = distance.min(-1, keepdim=True)
        # `min` may return any of several equal places; the first is the specified one
        place = torch.where(distance == tile_best, idx, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
        better = tile_best < best
        return torch.where(better, tile_best, best), torch.where(better, place, best_idx)
    # what is known stands first: the earliest place among equals is the earlier reference
    distance, idx = torch.cat([best, distance], -1), torch.cat([best_idx, idx], -1)
    places = torch.arange(distance.shape[-1], device=distance.device)
    # few passes are far faster than a stable sort
    nearest, order = [], []
    for _ in range(top_k):
        nearest.append(distance.amin(-1, keepdim=True))
        order.append(torch.where(distance == nearest[-1], places, len(places) - 1).amin(-1, keepdim=True))
        distance.scatter_(-1, order[-1], torch.inf)
    return torch.cat(nearest, -1), idx.gather(-1, torch.cat(order, -1))
