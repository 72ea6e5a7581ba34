"""From components, in the order in which a codebook's vectors are read, to keys and values of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import dispatch
from .compressor import Transform
from .compressor.vectors import TokenVectors
from .rope import RopeForm


@dataclass(frozen=True)
class Projection:
    """Maps of one layer for one order of components.

    Attributes:
        key_map: to keys, both numbers of a rotated pair side by side.
        value_map: `[heads, places, value_dim]` float16, to values before they are scaled.
        value_scale, value_mean: `[heads, 1, value_dim]` float32.
    """

    key_map: dispatch.KeyMap
    value_map: torch.Tensor
    value_scale: torch.Tensor
    value_mean: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        return [*self.key_map, self.value_map, self.value_scale, self.value_mean]

    def values(self, seen: dispatch.Attended, in_halves: bool) -> dispatch.Attended:
        """What was seen in components, of values.

        Args:
            in_halves: multiply in float16, as kernels do.
        """
        # components are at most 1, so are their means
        total = seen.total.clamp(min=torch.finfo(torch.float32).tiny)
        mixed = seen.mixed / total
        product = (mixed.half() @ self.value_map).float() if in_halves else mixed @ self.value_map.float()
        return dispatch.Attended(seen.maximum, seen.total, (product * self.value_scale + self.value_mean) * seen.total)


def make_projection(
    transform: Transform, coded: TokenVectors, heads: int, head_dim: int, form: RopeForm | None, pairs: int
) -> Projection:
    """The maps of `coded`.

    Args:
        heads, head_dim: of keys.
        form, pairs: how keys are rotated, and how many pairs of a head; None: they are not.
    """
    key_width, basis, scale = heads * head_dim, transform.basis[coded.order], coded.largest / transform.weights
    keys = basis[:, :key_width], scale[:key_width], transform.mean[:key_width]
    if form is not None:
        keys = (form.paired(part.unflatten(-1, (heads, -1)), pairs).flatten(-2) for part in keys)
    value_map = basis[:, key_width:].unflatten(-1, (heads, -1)).transpose(0, 1).contiguous()
    rest = (part[key_width:].unflatten(-1, (heads, 1, -1)) for part in (scale, transform.mean))
    return Projection(dispatch.KeyMap(*keys), value_map, *rest)
