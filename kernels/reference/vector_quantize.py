"""Vector quantisation with one byte a group of components, searched in exact integers: the specification.

A run is a stretch of consecutive components cut into groups of `size`; each group has a codebook of 256 vectors and
takes one byte of a token. Codebooks are integers on a grid of their own. A token is rounded to the same grid before
the search, so every distance is an integer below 2**24: exact in float32 (and with TF32 inputs) in any order, on any
device, for any tiling. Among equally near vectors the first wins.
"""

import math
from itertools import groupby
from typing import NamedTuple

import torch

# tokens searched at once, on a GPU more; a distance is kept for each of 256 vectors of every group
TOKEN_TILE = {"cpu": 512, "cuda": 4096}
# places of a vector that a kernel multiplies which are not for its numbers
CONSTANT_PLACES = 8
# a kernel moves distances up by 2**23 + size * limit**2, made a whole number of these
OFFSET_STEP = 8192


def grid_limit(size: int) -> int:
    """Largest integer of a codebook of vectors of `size` numbers: |c|^2 + 2|x c| stays below 2**24."""
    # beyond 3 numbers the cells are far wider than a 127th of the range, and a byte is enough to hold them
    return 127 if size > 3 else min(2047, math.isqrt(2**24 // (3 * size)) - 1)


class Groups(NamedTuple):
    """Groups of all runs, for a kernel that takes those of one class at once.

    Attributes:
        table: `[entries]` int16, vectors of one group after the other.
        first_component, first_entry, size, byte_idx: `[groups]` int32.
        step, limit: `[groups]` float32, the grid's.
        group_idx: `[components up to the last coded]` int32, the group of each component; -1 where there is none.
        first_place: `[groups]` int32, places of a vector of all groups before.
        num_places: of all groups.
        classes: first group, number of groups, and places of a vector that a kernel multiplies: 16, 32, 64, ..
        is_near: whether every point of every grid has a vector so near that a kernel's distance to it is exact.
    """

    table: torch.Tensor
    first_component: torch.Tensor
    first_entry: torch.Tensor
    size: torch.Tensor
    byte_idx: torch.Tensor
    step: torch.Tensor
    limit: torch.Tensor
    group_idx: torch.Tensor
    first_place: torch.Tensor
    num_places: int
    classes: list[tuple[int, int, int]]
    is_near: bool


def group_runs(starts: list[int], tables: list[torch.Tensor], steps: list[torch.Tensor]) -> Groups:
    """The groups of runs, as given to `vector_quantize`."""
    rows, entry, byte = [], 0, 0
    for start, table in zip(starts, tables, strict=True):
        groups, _, size = table.shape
        for group in range(groups):
            place = start + group * size, entry + group * 256 * size
            rows.append((_num_places(size), *place, size, byte + group, grid_limit(size)))
        entry, byte = entry + table.numel(), byte + groups
    rows.sort()
    classes, place = [], 0
    for num_places, members in groupby(rows, lambda row: row[0]):
        classes.append((place, len(list(members)), num_places))
        place += classes[-1][1]
    device = steps[0].device if steps else None
    columns = torch.tensor(rows, dtype=torch.int32).view(-1, 6)[:, 1:].T.contiguous().to(device)
    byte_idx, limits = columns[3:]
    step = torch.cat(steps)[byte_idx.long()] if steps else limits.float()
    table = torch.cat([part.flatten().short() for part in tables]) if tables else limits.short()
    group_idx = torch.full((max((row[1] + row[3] for row in rows), default=0),), -1, dtype=torch.int32)
    for group, row in enumerate(rows):
        group_idx[row[1] : row[1] + row[3]] = group
    num_places = torch.tensor([row[0] for row in rows], dtype=torch.int32)
    first_place = (num_places.cumsum(0) - num_places).int().to(device)
    return Groups(
        *(table, *columns[:4], step, limits.float(), group_idx.to(device), first_place, int(num_places.sum())),
        *(classes, all(map(_is_near, tables))),
    )


def _num_places(size: int) -> int:
    """Of a vector of `size` numbers, as many as one kernel takes of many sizes."""
    return max(16, 1 << (size + CONSTANT_PLACES - 1).bit_length())


def _is_near(table: torch.Tensor) -> bool:
    """Whether some vector of each group, `[groups, 256, size]`, is near to all of the grid; see `Groups`."""
    size = table.shape[2]
    limit = grid_limit(size)
    offset = 2**23 + OFFSET_STEP * (size * limit**2 // OFFSET_STEP + 1)
    sizes = table.abs().double()
    # |c|^2 - 2xc is no more
    most = sizes.square().sum(-1) + 2 * limit * sizes.sum(-1)
    return bool((most.amin(-1) + offset < 2**24).all())


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    groups: Groups | None = None,
) -> torch.Tensor:
    """Finds the nearest vector of each group.

    Args:
        x: `[batch, tokens, components]` float32.
        starts: first component of each run.
        tables: of each run, `[groups, 256, size]` integers up to `grid_limit(size)`.
        steps: of each run, `[groups]` float32, the width of the grid.
        groups: what `group_runs` makes of them, if it was made before; a kernel reads it.

    Returns:
        `[batch, tokens, bytes]` uint8, one byte a group, runs one after the other.
    """
    tile_size = TOKEN_TILE.get(x.device.type, TOKEN_TILE["cpu"])
    codes = x.new_empty(*x.shape[:2], sum(len(step) for step in steps), dtype=torch.uint8)
    place = 0
    # autocast would round the integers to 16 bits
    with torch.autocast(x.device.type, enabled=False):
        for start, table, step in zip(starts, tables, steps, strict=True):
            groups, _, size = table.shape
            vectors = table.float().transpose(1, 2)
            square = vectors.square().sum(1).unsqueeze(1)
            for first in range(0, x.shape[1], tile_size):
                tile = x[:, first : first + tile_size, start : start + groups * size]
                on_grid = _to_grid(tile.unflatten(-1, (groups, size)), step, grid_limit(size))
                flat = on_grid.flatten(0, 1).transpose(0, 1)
                # |x - c|^2 without |x|^2, which is the same for every vector
                distance = torch.baddbmm(square, flat, vectors, alpha=-2)
                found = distance.argmin(-1).transpose(0, 1).unflatten(0, tile.shape[:2])
                codes[:, first : first + tile_size, place : place + groups] = found
            place += groups
    return codes


def vector_dequantize(
    codes: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    scale: torch.Tensor,
    scratch: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> torch.Tensor:
    """Inverse of `vector_quantize`; components outside of every run are zero.

    Args:
        codes: `[batch, ..., bytes]` uint8.
        starts: first component of each run, ascending; runs do not overlap.
        tables: of each run, `[groups, 256, size]` integers.
        scale: `[components]` float32, the step of the group that holds each.
        scratch: 1-D float32 to hold the result.
        groups: as for `vector_quantize`.

    Returns:
        `[batch, ..., components]` float32.
    """
    shape = (*codes.shape[:-1], len(scale))
    out = codes.new_empty(shape, dtype=torch.float32) if scratch is None else scratch[: math.prod(shape)].view(shape)
    # one pass over the bytes: a conversion for each run costs a CPU more than picking
    first_rows = [torch.arange(0, 256 * len(table), 256, device=codes.device, dtype=torch.int32) for table in tables]
    idx = codes.to(torch.int32).add_(torch.cat(first_rows)) if tables else codes
    place, covered = 0, 0
    for start, table in zip(starts, tables, strict=True):
        groups, _, size = table.shape
        picked = table.view(-1, size).index_select(0, idx[..., place : place + groups].flatten())
        out[..., covered:start] = 0
        covered, place = start + groups * size, place + groups
        out[..., start:covered] = picked.view(*shape[:-1], groups * size)
    out[..., covered:] = 0
    return out.mul_(scale)


def _to_grid(x: torch.Tensor, step: torch.Tensor, limit: int) -> torch.Tensor:
    # one division a group
    return (x * (1 / step).unsqueeze(-1)).round_().clamp_(-limit, limit)
