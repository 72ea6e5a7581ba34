"""From components, in the order in which a codebook's vectors are read, to keys and values of one layer."""

from __future__ import annotations

from .compressor import Transform
from .compressor.vectors import TokenVectors
from .dispatch import KeyMap, ValueMap
from .rope import RopeForm


def make_maps(
    transform: Transform, coded: TokenVectors, heads: int, head_dim: int, form: RopeForm | None, pairs: int
) -> tuple[KeyMap, ValueMap]:
    """The maps of `coded`.

    Args:
        heads, head_dim: of keys.
        form, pairs: how keys are rotated, and how many pairs of a head; None: they are not.
    """
    key_width, basis, scale = heads * head_dim, transform.basis[coded.order], coded.largest / transform.weights
    keys = basis[:, :key_width], scale[:key_width], transform.mean[:key_width]
    if form is not None:
        keys = (form.paired(part.unflatten(-1, (heads, -1)), pairs).flatten(-2) for part in keys)
    values = basis[:, key_width:].unflatten(-1, (heads, -1)).transpose(0, 1).contiguous()
    rest = (part[key_width:].unflatten(-1, (heads, 1, -1)) for part in (scale, transform.mean))
    return KeyMap(*keys), ValueMap(values, *rest)
