"""From a `DynamicCache` to ours and back."""

from __future__ import annotations

import copy

import torch

from . import host_layers
from .attach import LayerProbe
from .errors import InvalidOptionError, UnsupportedModelError
from .hf_compat import DynamicCache, DynamicLayer
from .layer import DeltaKVLayer


def to_dynamic(cache) -> DynamicCache:
    """A `DynamicCache` with the decoded tokens of `cache`; layers of the host are copied."""
    dynamic = DynamicCache(config=cache.model_config)
    for layer_idx, layer in enumerate(cache.layers):
        if not isinstance(layer, DeltaKVLayer):
            dynamic.layers[layer_idx] = copy.deepcopy(host_layers.growing(layer))
        elif layer.is_initialized:
            keys, values = layer.dequantize()
            dynamic.layers[layer_idx].lazy_initialization(keys, values)
            dynamic.layers[layer_idx].keys, dynamic.layers[layer_idx].values = keys, values
    return dynamic


def fill(cache, dynamic: DynamicCache, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
    """Feeds the tokens of `dynamic` to the empty `cache`, as the forward that made them would have done.

    Args:
        attention_mask: `[batch, columns]`, 0 where `dynamic` holds padding.
        position_ids: `[1 or batch, columns]`; None counts the real tokens of each row.
    """
    if not isinstance(dynamic, DynamicCache):
        raise InvalidOptionError(f"`cache` must be a DynamicCache, got {type(dynamic).__name__}.")
    layers = list(dynamic.layers)
    if len(layers) != len(cache.layers):
        raise InvalidOptionError(
            f"`cache` must have one layer for each of the model's {len(cache.layers)}, got {len(layers)}."
        )
    batch, columns = _size(layers)
    for name, given, rows in (("attention_mask", attention_mask, {batch}), ("position_ids", position_ids, {1, batch})):
        if given is not None and not torch.is_tensor(given):
            raise InvalidOptionError(f"`{name}` must be a tensor or None, got a {type(given).__name__}.")
        if given is not None and (given.ndim != 2 or given.shape[0] not in rows or given.shape[1] != columns):
            raise InvalidOptionError(
                f"`{name}` must have the shape {(batch, columns)} of the tokens in `cache`, got {tuple(given.shape)}."
            )
    if position_ids is None and attention_mask is None:
        position_ids = torch.arange(columns)[None]
    elif position_ids is None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    _check_shapes(cache, layers)
    if cache.own_layers:
        cache._ledger.note_mask(attention_mask, outermost=True)
    made = {}
    for layer_idx, (layer, source) in enumerate(zip(cache.layers, layers, strict=True)):
        if not isinstance(layer, DeltaKVLayer):
            _fill_host_layer(cache, layer_idx, source)
            continue
        if cache._probes:
            layer.receive_tables(*_tables(cache._probes[layer_idx], position_ids, made, layer_idx))
        cache.update(source.keys, source.values, layer_idx)


def _size(layers: list) -> tuple[int, int]:
    held = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    lengths = {layer.get_seq_length() for layer in held}
    if len(lengths) != 1 or lengths == {0}:
        raise InvalidOptionError(
            f"`cache` must hold the tokens of a prompt, the same in every layer, got lengths {sorted(lengths)}."
        )
    return held[0].keys.shape[0], lengths.pop()


def _check_shapes(cache, layers: list) -> None:
    for layer_idx, probe in cache._probes.items():
        keys = getattr(layers[layer_idx], "keys", None)
        if keys is not None and (keys.shape[1], keys.shape[3]) != probe.key_shape:
            raise InvalidOptionError(
                f"`cache` must hold {probe.key_shape[0]} heads of {probe.key_shape[1]} numbers in layer {layer_idx}, "
                f"as the model has, got {keys.shape[1]} of {keys.shape[3]}: it is of another model."
            )


def _fill_host_layer(cache, layer_idx: int, source: object) -> None:
    layer = cache.layers[layer_idx]
    if type(source) is type(host_layers.growing(layer)):
        host_layers.put(cache.layers, layer_idx, copy.deepcopy(source))
    elif type(source) is DynamicLayer and source.is_initialized and hasattr(layer, "update"):
        # a `DynamicCache` made without a config keeps every token of every layer
        layer.update(source.keys, source.values)
    else:
        raise InvalidOptionError(
            f"layer {layer_idx} of `cache` must be a {type(layer).__name__}, got {type(source).__name__}. Make it with "
            "`DynamicCache(config=model.config)`."
        )


def _tables(probe: LayerProbe, position_ids: torch.Tensor, made: dict, layer_idx: int) -> tuple[torch.Tensor, ...]:
    if probe.form is None:
        return ()
    if probe.rotary is None:
        raise UnsupportedModelError(
            f"`from_dynamic` needs a rotary module that can be called, but layer {layer_idx} of the model makes its "
            "tables itself. Run the prompt through the model with `DeltaKVCache(model)`."
        )
    # layers of one type are handed the same tensors, as in a forward
    key = id(probe.rotary)
    if key not in made:
        made[key] = probe.rotary.tables(position_ids)
    return made[key]
