"""A cache that survives its process: what of it is written, and how it is put together again.

Nothing is coded anew: a file holds the tensors and counts as they are, and the loaded cache goes on bit for bit. Every
check is made before a tensor is used. `archive.py` has the container, `encoding.py` the values in it.
"""

from __future__ import annotations

import os
from dataclasses import asdict

import torch
from transformers import PretrainedConfig

from .. import host_layers
from ..attach import unwrap
from ..errors import CacheStateError, InvalidOptionError
from ..hf_compat import host_version
from ..layer import DeltaKVLayer
from .archive import read_archive, write_archive
from .encoding import encode
from .fingerprint import check_config_equal, check_weights_equal, describe_config, describe_weights
from .prompt import SavedPrompt, make_prompt
from .restoring import (
    Saved,
    class_of,
    layer_devices,
    restore_host_layer,
    restore_ledger,
    restore_own_layer,
    restore_tables,
)


def save(cache, path: str | os.PathLike, input_ids=None, attention_mask=None) -> None:
    """See `DeltaKVCache.save`."""
    ledger = cache._ledger
    cache._check_whole()
    ledger.settle()
    batch_size, columns = _extent(cache)
    own = bool(cache.own_layers)
    prompt = make_prompt(input_ids, attention_mask, batch_size, columns, ledger.padding(), counted=own)
    tensors: dict[str, torch.Tensor] = {}
    content = {
        "cache": type(cache).__name__,
        "host": host_version(),
        "options": asdict(cache.options),
        "compressor": cache.compressor and cache.compressor.fingerprint,
        "config": describe_config(cache.model_config),
        # None for a bare config
        "weights": None if cache._model is None else describe_weights(_alive(cache)),
        "ledger": ledger.counts(),
        "padded": ledger.row_columns is not None,
        "tables": [asdict(tables.form) for tables in cache._registry.tables],
        "layers": [_describe_layer(cache, layer_idx, tensors) for layer_idx in range(len(cache.layers))],
        "prompt": prompt is not None,
    }
    if ledger.row_columns:
        tensors["ledger.row_columns"] = torch.cat(ledger.row_columns)
    tensors |= {f"ledger.{name}": part for name, part in ledger.held().items()}
    for number, tables in enumerate(cache._registry.tables):
        tensors[f"rope.{number}.cos"], tensors[f"rope.{number}.sin"] = tables.cos, tables.sin
    if prompt is not None:
        tensors |= {"prompt.input_ids": prompt.input_ids, "prompt.attention_mask": prompt.attention_mask}
    write_archive(path, content, tensors)


def load(cls, path: str | os.PathLike, model, input_ids, make, compressor):
    """See `DeltaKVCache.load`; `make(options)` gives an empty cache of class `cls` for `model` and `compressor`."""
    content, tensors = read_archive(path)
    saved = Saved(content, tensors)
    if content["cache"] != cls.__name__:
        raise CacheStateError(
            f"`path` must hold a {cls.__name__}, got {os.fspath(path)!r} of a {content['cache']}: call "
            f"`{content['cache']}.load`."
        )
    prompt = None
    if content["prompt"]:
        prompt = SavedPrompt(*(saved.take(f"prompt.{name}").clone() for name in ("input_ids", "attention_mask")))
    if input_ids is not None:
        if prompt is None:
            raise InvalidOptionError(
                f"`input_ids` must be left out for {os.fspath(path)!r}, which was saved without ids to compare with. "
                "Save it with `cache.save(path, input_ids=ids)`."
            )
        prompt.check_begins(input_ids)
    _check_model(content["config"], content["weights"], model)
    _check_compressor(cls.compressor_argument, content["compressor"], compressor)
    cache = make(content["options"])
    cache.saved_prompt = prompt
    devices = layer_devices(cache, content["layers"])
    restore_ledger(cache, saved)
    tables = restore_tables(cache, saved, devices)
    for layer_idx, device in enumerate(devices):
        if isinstance(cache.layers[layer_idx], DeltaKVLayer):
            restore_own_layer(cache, layer_idx, saved, device, tables)
        else:
            restore_host_layer(cache, layer_idx, saved, device)
    saved.check_used_up()
    _extent(cache)
    return cache


def _alive(cache):
    root = cache._model()
    if root is None:
        raise CacheStateError("the model of the cache must be alive while it is saved, but it is gone: keep it.")
    return root


def _extent(cache) -> tuple[int, int]:
    """Rows and columns that the cache has seen; raises if a host layer holds another number of columns."""
    growing = [(i, layer) for i, layer in enumerate(cache.layers) if hasattr(layer, "get_seq_length")]
    if cache.own_layers or not growing:
        batch_size, columns = cache._ledger.batch_size, cache._ledger.columns
    else:
        first = growing[0][1]
        batch_size, columns = first.keys.shape[0] if first.is_initialized else 0, first.get_seq_length()
    for layer_idx, layer in growing:
        if layer.get_seq_length() != columns:
            raise CacheStateError(
                f"every layer must hold the same {columns} columns, but layer {layer_idx} holds "
                f"{layer.get_seq_length()}: a forward was broken off. Call `cache.reset()` and feed the tokens again."
            )
    return batch_size, columns


def _check_model(config: dict, weights: dict | None, model) -> None:
    bare = isinstance(model, PretrainedConfig)
    if bare != (weights is None):
        kind = ("a model", "a bare config") if bare else ("a bare config", "a model")
        raise InvalidOptionError(
            f"`model` must be {kind[0]}, as for the saved cache, got {kind[1]}, a {type(model).__name__}."
        )
    root = model if bare else unwrap(model)
    running = root if bare else root.config
    check_config_equal(config, describe_config(running.get_text_config(decoder=True)))
    if not bare:
        check_weights_equal(weights, describe_weights(root))


def _check_compressor(argument: str, saved: str | None, compressor) -> None:
    given = compressor and compressor.fingerprint
    if saved != given:
        names = [f"the compressor {name[:12]}..." if name else "no compressor" for name in (saved, given)]
        raise CacheStateError(
            f"`{argument}` must be the one of the saved cache, which used {names[0]}, got {names[1]}. Load the cache "
            "with the compressor that it was saved with."
        )


def _describe_layer(cache, layer_idx: int, tensors: dict[str, torch.Tensor]) -> dict:
    layer, name = cache.layers[layer_idx], f"layers.{layer_idx}"
    record = {"class": class_of(layer), "device": str(getattr(layer, "device", None) or "cpu")}
    if not isinstance(layer, DeltaKVLayer):
        return record | {"attributes": encode(dict(vars(host_layers.growing(layer))), name, tensors)}
    tables = [i for i, tables in enumerate(cache._registry.tables) if tables is layer.tables]
    return record | {
        "compressor": type(layer.compressor).__name__,
        "state": encode(layer.state, f"{name}.state", tensors),
        "tables": tables[0] if tables else None,
    }
