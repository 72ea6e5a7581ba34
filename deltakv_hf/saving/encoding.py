"""What attributes of cache layers are made of, as JSON and named tensors, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass

import torch

from ..errors import CacheStateError


def encode(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """`value` as JSON; its tensors are put into `tensors` under names that begin with `name`.

    Args:
        value: None, a bool, an int, a tensor, a dtype, a device, or a dict or dataclass of such.

    Raises:
        CacheStateError: anything else.
    """
    if value is None or type(value) in (bool, int):
        return value
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors[name] = value
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if type(value) is dict and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if is_dataclass(value):
        held = {f.name: encode(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}
        return {"class": type(value).__name__, "fields": held}
    raise CacheStateError(
        f"{name} of the cache must be a tensor, a number or a dict of such to be saved, got a {type(value).__name__}."
    )


def decode(
    record: object,
    take: Callable[[str, torch.device], torch.Tensor],
    place: Callable[[torch.device], torch.device],
    classes: dict[str, type] | None = None,
) -> object:
    """What `encode` was given.

    Args:
        take: function `(name, device when saved) -> tensor`.
        place: function from a device when saved to the one now.
        classes: dataclasses by name.
    """
    if not isinstance(record, dict):
        return record
    if "tensor" in record:
        return take(record["tensor"], torch.device(record["device"]))
    if "dtype" in record:
        return getattr(torch, record["dtype"])
    if "device" in record:
        return place(torch.device(record["device"]))
    if "dict" in record:
        return {key: decode(item, take, place, classes) for key, item in record["dict"]}
    made = (classes or {}).get(record["class"])
    if made is None or {f.name for f in fields(made)} != record["fields"].keys():
        raise CacheStateError(
            f"the saved cache must hold the tensors of {' and '.join(classes or {})} as this version of deltakv_hf "
            f"knows them, got {record['class']} with {', '.join(record['fields'])}. Save the cache again with this "
            "version and the same compressor."
        )
    return made(**{name: decode(item, take, place, classes) for name, item in record["fields"].items()})
