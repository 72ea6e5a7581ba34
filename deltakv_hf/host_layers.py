"""What this package does to the host's own layers (sliding window, linear, hybrid) that stand beside ours."""

from __future__ import annotations

import torch

from .errors import CacheStateError
from .hf_compat import CacheLayerMixin
from .static_window import StaticWindowLayer


def tensors(layer: object) -> list[torch.Tensor]:
    """Tensors that a layer of the host holds."""
    return layer.tensors() if isinstance(layer, StaticWindowLayer) else _tensors(vars(layer))


def growing(layer: object) -> object:
    """The layer as the host has it: itself, or what a window of fixed size holds as a growing one."""
    return layer.to_growing() if isinstance(layer, StaticWindowLayer) else layer


def put(layers: list[object], layer_idx: int, layer: object) -> None:
    """Sets a layer; a window of fixed size stays where it is and becomes what `layer` is."""
    if isinstance(layers[layer_idx], StaticWindowLayer):
        layers[layer_idx].take(layer)
    else:
        layers[layer_idx] = layer


def _tensors(value: object) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    return [t for item in value.values() for t in _tensors(item)] if isinstance(value, dict) else []


def crop(layers: list[object], columns: int, keep: int) -> None:
    """Takes `layers` back to `keep` columns, or leaves all of them as they were and raises.

    The host's `crop` silently keeps too little of a window, or all of a recurrent state, when it is asked to go back
    further than it has recorded; here that is an error.

    Args:
        columns: columns that layers hold which do not know their own length.
        keep: columns that stay.
    """
    before = [_snapshot(layer) for layer in layers]
    try:
        for layer in layers:
            _crop(layer, columns, keep)
    except BaseException as error:
        for layer, attributes in zip(layers, before, strict=True):
            vars(layer).update(attributes)
        if isinstance(error, RuntimeError) and not isinstance(error, CacheStateError):
            raise CacheStateError(
                f"`crop` must be possible in every layer, but one of the host refused: {error}"
            ) from error
        raise


def _snapshot(layer: object) -> dict[str, object]:
    # the host replaces tensors when it crops, but sets them in its dicts
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}


def _crop(layer: object, columns: int, keep: int) -> None:
    has_length = isinstance(layer, CacheLayerMixin)
    if has_length and not layer.is_initialized:
        # nothing is stored in a layer that reads the keys of another
        return
    length = layer.get_seq_length() if has_length else columns
    recording = getattr(layer, "record_past", False)
    if length < keep:
        raise CacheStateError(
            f"`crop` must leave no more than the {length} columns that every layer holds, got {keep}: a forward was "
            "broken off. Crop further, or call `cache.reset()`."
        )
    if length > keep and any(getattr(layer, "is_recurrent_states_initialized", {}).values()):
        raise CacheStateError(
            f"`crop` can't take a recurrent layer back, got {length - keep} columns to remove: {type(layer).__name__} "
            "keeps its last state alone. Use `copy.deepcopy(cache)` before the tokens are fed."
        )
    if length > keep or recording:
        layer.crop(keep - length)
    window = getattr(layer, "sliding_window", None)
    if has_length and window is not None and layer.keys.shape[-2] < min(keep, window - 1):
        raise CacheStateError(
            f"`crop` must stay within what a sliding-window layer has kept, got {length - keep} columns to remove: its "
            f"window of {window} would lack older tokens. Use `copy.deepcopy(cache)` before the tokens are fed."
        )
