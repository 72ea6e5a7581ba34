"""A layer's `Learned` as tensors of a compressor folder.

Per layer `down.*` and `up.*`, by the names of `kernels/reference/feed_forward.py`, floating; the record of the layer in
`config.json` says the rest.
"""

from __future__ import annotations

import torch

from ..dispatch import LINEAR_MAPS
from ..references import Lattice
from .layer_tensors import LayerTensors
from .learned import Learned, Network

FLOATING = (torch.bfloat16, torch.float16, torch.float32)


def read_learned(tensors: dict[str, torch.Tensor], record: dict, layer_idx: int, source: str) -> Learned:
    """The networks of a layer.

    Args:
        record: the layer's entry in `config.json`: `widths` (of K and V), `reference_stride`, `reference_growth`,
            `top_k`, `latent_nbits`, `latent_group_size`.
        source: where it comes from, for messages.

    Raises:
        CompressorError: a tensor is missing, or shapes, dtypes and the record do not fit together.
    """
    reader = LayerTensors(tensors, f"layers.{layer_idx}", source)
    names = "reference_stride", "top_k", "latent_nbits", "latent_group_size"
    try:
        width = sum(int(n) for n in record["widths"])
        stride, top_k, nbits, group_size = (int(record[name]) for name in names)
        growth = float(record["reference_growth"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise reader.wrong(
            f"widths, reference_growth, {', '.join(names)}", f"an entry without them ({error})"
        ) from error
    if stride < 2 or not 0 <= growth < float("inf") or not 1 <= top_k <= 16:
        raise reader.wrong("a stride of at least 2, a growth from 0, and 1 to 16 references", (stride, growth, top_k))
    down = read_network(reader, "down", width, None)
    up = read_network(reader, "up", down.out_width, width)
    for part, network in (("down", down), ("up", up)):
        if not all(weight.isfinite().all() for weight in network.weights.values()):
            raise reader.wrong(f"finite numbers in `{part}`", "others")
    fits = group_size >= 1 and down.out_width % group_size == 0 and down.out_width * nbits % 8 == 0
    if nbits not in (0, 2, 4, 8) or (nbits and not fits):
        rule = f"latents of {down.out_width} numbers in 0, 2, 4 or 8 bits, whole groups and whole bytes"
        raise reader.wrong(rule, f"{nbits} bits in groups of {group_size}")
    return Learned(down, up, Lattice(stride, growth), top_k, nbits, group_size)


def read_network(reader: LayerTensors, part: str, in_width: int, out_width: int | None) -> Network:
    """The network `part`, its kind told by the names of its tensors."""
    prefix = f"{reader.name}.{part}."
    names = {name.removeprefix(prefix) for name in reader.tensors if name.startswith(prefix)}
    weighted = {name.removesuffix("weight") for name in names if name.endswith("weight")}
    kind = next((kind for kind, maps in LINEAR_MAPS.items() if set(maps) == weighted), None)
    if kind is None or names - {f"{one}{end}" for one in LINEAR_MAPS[kind] for end in ("weight", "bias")}:
        raise reader.wrong(f"`{part}` as one of {', '.join(LINEAR_MAPS)}", f"the tensors {', '.join(sorted(names))}")
    weights, wanted = {}, in_width
    for place, one in enumerate(LINEAR_MAPS[kind]):
        is_last = place == len(LINEAR_MAPS[kind]) - 1
        weight = reader.take(f"{part}.{one}weight", FLOATING, (out_width if is_last else None, wanted))
        weights[f"{one}weight"] = weight
        if f"{one}bias" in names:
            weights[f"{one}bias"] = reader.take(f"{part}.{one}bias", FLOATING, (weight.shape[0],))
        halves = kind == "mlp_swiglu" and not is_last
        if 0 in weight.shape or (halves and weight.shape[0] % 2):
            raise reader.wrong(f"`{part}` with numbers inside, and two halves for SwiGLU", tuple(weight.shape))
        wanted = weight.shape[0] // 2 if halves else weight.shape[0]
    return Network(kind, weights)
