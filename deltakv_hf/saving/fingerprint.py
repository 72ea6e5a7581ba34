"""Whether two models are the same: their configs, and a few bytes of every weight."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import CacheStateError

SAMPLES = 64
# set on a model at will; none of them changes what keys and values are
_FREE_KEYS = {"use_cache", "quantization_config", "initializer_range", "output_router_logits", "router_aux_loss_coef"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe_config(config: PretrainedConfig) -> dict:
    """What of a text config decides about keys and values, as JSON holds it."""
    general = set(PretrainedConfig().to_dict()) | _FREE_KEYS
    held = {
        name: value
        for name, value in config.to_dict().items()
        if name not in general and not name.endswith("token_id") and "dropout" not in name
    }
    held["model_type"] = config.model_type
    return json.loads(json.dumps(held, default=str))


def check_config_equal(saved: dict, running: dict) -> None:
    """Raises `CacheStateError` at the first entry that differs; entries that one version does not know are left out."""
    for name in ("model_type", *saved):
        if name in running and saved[name] != running[name]:
            raise CacheStateError(
                f"`model` must be the model of the saved cache, but its config has {name} = {running[name]!r} and the "
                f"saved one {saved[name]!r}. Load the cache with the model that it was saved with."
            )


def describe_weights(model: nn.Module) -> dict[str, str | None]:
    """`dtype shape hash` of each parameter and persistent buffer by name; None for one whose data is elsewhere (meta).

    A hash covers `SAMPLES` evenly spaced elements. They are gathered on the device and fetched at once.
    """
    weights = {}
    for name, tensor in _weights(model):
        weights.setdefault(id(tensor), (tensor, []))[1].append(name.replace("_orig_mod.", ""))
    rows = {}
    for key, (tensor, _) in weights.items():
        parts = _plain_parts(tensor)
        if not any(part.device.type == "meta" for part in parts):
            rows[key] = [_sample(part) for part in parts]
    fetched = _fetch(rows)
    return {
        name: _describe(tensor, fetched[key]) if key in fetched else None
        for key, (tensor, names) in weights.items()
        for name in names
    }


def check_weights_equal(saved: dict[str, str | None], running: dict[str, str | None]) -> None:
    """Raises `CacheStateError` at the first weight that differs or is on one side only; None is equal to everything."""
    for name in [*saved, *running]:
        for side, where in ((saved, "the saved one"), (running, "the model")):
            if name not in side:
                raise CacheStateError(
                    f"`model` must be the model of the saved cache, but {where} has no weight {name!r}. Load the cache "
                    "with the model that it was saved with, adapters and quantisation included."
                )
        if None not in (saved[name], running[name]) and saved[name] != running[name]:
            raise CacheStateError(
                f"`model` must have the weights of the saved cache's model, but {name!r} is {running[name]} and the "
                f"saved one {saved[name]} (dtype, shape, hash). Load the cache with the model that it was saved with."
            )


def _weights(model: nn.Module):
    # tied weights under each of their names: splitting a model over devices unties them
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors inside a quantised one."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _plain_parts(getattr(tensor, name))]
    return [tensor]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Bits of evenly spaced elements as `[n]` int64, on the device; strides do not matter."""
    bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = bits.view(_INTEGERS[bits.element_size()])
    if bits.numel() < SAMPLES:
        return bits.reshape(-1).long()
    return bits[_places(bits.shape, bits.device)].long()


@lru_cache(maxsize=64)
def _places(shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, ...]:
    flat = torch.arange(SAMPLES) * (shape.numel() - 1) // (SAMPLES - 1)
    return tuple(axis.to(device) for axis in torch.unravel_index(flat, shape))


def _fetch(rows: dict[int, list[torch.Tensor]]) -> dict[int, list[torch.Tensor]]:
    """The same on the CPU, with one transfer from each device."""
    devices = {}
    for parts in rows.values():
        for part in parts:
            devices.setdefault(part.device, []).append(part)
    arrived = {}
    for parts in devices.values():
        host = torch.cat(parts).cpu().split([len(part) for part in parts])
        arrived.update((id(part), copy) for part, copy in zip(parts, host, strict=True))
    return {key: [arrived[id(part)] for part in parts] for key, parts in rows.items()}


def _describe(tensor: torch.Tensor, samples: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.numpy())
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} [{shape}] {digest.hexdigest()[:16]}"
