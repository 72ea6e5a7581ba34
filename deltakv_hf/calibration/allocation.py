"""Bytes to components: groups of components that share a byte, chosen over all layers at once.

What a group of `size` components from `start` loses at one byte is measured at a few places and interpolated. Then a
shortest path cuts each layer's components into groups, small ones first, at one price of a byte for all layers, so the
last byte buys the same everywhere (reverse water-filling, in bytes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .vectors import assign, fit_vectors

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96)
PLACES = 7
SAMPLES = 3072
ITERATIONS = 6


@dataclass(frozen=True)
class LossTable:
    """Expected squared error of one row (a layer, or a split of it).

    Attributes:
        energy: `[components + 1]`, energy of the first components.
        shares: by size, `[components - size + 1]`: what is left of a group's energy at one byte, by its start.
    """

    energy: np.ndarray
    shares: dict[int, np.ndarray]

    @property
    def num_components(self) -> int:
        return len(self.energy) - 1

    def losses(self, size: int) -> np.ndarray:
        """Squared error of a group at one byte, by its start."""
        return self.shares[size] * (self.energy[size:] - self.energy[:-size])


def measure_losses(components: torch.Tensor, generator: torch.Generator) -> LossTable:
    """What one byte leaves of groups of `components` `[samples, components]`, float32, ordered by energy."""
    count = min(SAMPLES, len(components) * 2 // 3)
    order = torch.randperm(len(components), generator=generator)[: count * 3 // 2].to(components.device)
    fitted, other = components[order[:count]], components[order[count:]]
    width = components.shape[1]
    shares = {}
    for size in (size for size in SIZES if size <= width):
        # denser where components are large and differ
        starts = sorted({round((width - size) * (place / (PLACES - 1)) ** 2) for place in range(PLACES)})
        groups = torch.stack([fitted[:, start : start + size] for start in starts])
        checked = torch.stack([other[:, start : start + size] for start in starts])
        _, distance = assign(checked, fit_vectors(groups, ITERATIONS, generator))
        left = distance.double().sum(1) / checked.double().square().sum((1, 2)).clamp_min(1e-300)
        logarithms = left.clamp(1e-9, 1.0).log().cpu().numpy()
        shares[size] = np.exp(np.interp(np.arange(width - size + 1), starts, logarithms))
    energy = components.double().square().mean(0).cumsum(0).cpu().numpy()
    return LossTable(np.concatenate([[0.0], energy]), shares)


@dataclass(frozen=True)
class Cut:
    """Groups of a row at one price.

    Attributes:
        groups: `(start, size)` in order, sizes never smaller than those before.
        loss: expected squared error, components left out included.
    """

    groups: list[tuple[int, int]]
    loss: float

    @property
    def num_bytes(self) -> int:
        return len(self.groups)

    def runs(self) -> list[tuple[int, int, int]]:
        """`(start, size, groups)` of each stretch of groups of one size."""
        runs: list[tuple[int, int, int]] = []
        for start, size in self.groups:
            if runs and runs[-1][1] == size:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((start, size, 1))
        return runs


def cut(tables: list[LossTable], price: float) -> list[Cut]:
    """The cheapest groups of every row, where a byte costs `price` of squared error."""
    cuts: dict[int, Cut] = {}
    for width in {table.num_components for table in tables}:
        rows = [row for row, table in enumerate(tables) if table.num_components == width]
        cuts |= zip(rows, _cut_equal([tables[row] for row in rows], price), strict=True)
    return [cuts[row] for row in range(len(tables))]


def _cut_equal(tables: list[LossTable], price: float) -> list[Cut]:
    """The same for rows of as many components, which go through one search together."""
    width = tables[0].num_components
    energy = np.stack([table.energy for table in tables])
    best = np.full_like(energy, np.inf)
    best[:, 0] = 0.0
    taken = {}
    for size in tables[0].shares:
        cost = np.stack([table.losses(size) for table in tables]) + price
        taken[size] = np.zeros(best.shape, dtype=bool)
        for end in range(size, width + 1):
            with_group = best[:, end - size] + cost[:, end - size]
            better = with_group < best[:, end]
            taken[size][:, end] = better
            best[:, end] = np.where(better, with_group, best[:, end])
    total = best + (energy[:, -1:] - energy)
    ends = total.argmin(axis=1)
    return [_trace(row, int(end), taken, total[row, end], price) for row, end in enumerate(ends)]


def _trace(row: int, end: int, taken: dict[int, np.ndarray], total: float, price: float) -> Cut:
    groups = []
    for size in reversed(taken):
        while end > 0 and taken[size][row, end]:
            groups.append((end - size, size))
            end -= size
    return Cut(groups[::-1], float(total - price * len(groups)))


def cut_to_budget(tables: list[LossTable], num_bytes: float) -> list[Cut]:
    """The best groups of at most `num_bytes` in all rows together."""
    return search_price(lambda price: cut(tables, price), lambda cuts: sum(c.num_bytes for c in cuts), num_bytes)


def search_price(solve, size, budget: float):
    """`solve(price)` at the lowest price whose `size(...)` is within `budget`."""
    low, high = -200.0, 40.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if size(solve(2.0**middle)) > budget else (low, middle)
    return solve(2.0**high)
