"""Compressors as the authors of DeltaKV publish them (arXiv 2602.08005), read as ours.

A published folder is `config.json`, the base model's config with fields of the compressor among them, and
safetensors with `model.layers.N.self_attn.compress_down.*` and `compress_up.*`. Fields have had several names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ..errors import CompressorError
from .base_model import describe_model
from .folder import CONFIG, FORMAT
from .layer_tensors import LayerTensors
from .learned_tensors import FLOATING, read_network

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSOR = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.self_attn\.compress_(down|up)\.(.+)")
# what each setting is called, newest name first
LATENT_WIDTH = ("deltakv_latent_dim", "kv_compressed_size")
TOP_K = ("deltakv_neighbor_count", "k_neighbors", "seq_chunk_size")
RATIO = ("deltakv_center_ratio", "cluster_ratio")
NBITS = ("deltakv_latent_quant_bits", "kv_quant_bits")
GROUP_SIZE = ("deltakv_latent_quant_group_size", "kv_quant_group_size")
FULL_LAYERS = ("full_attention_layers", "full_attn_layers")
# what a compressor must have been trained with to be what this package computes
REQUIRED = {
    "recon_mode": "delta_in_latent",
    "split_kv": False,
    "collect_kv_before_rope": True,
    "cluster_metric": "l2",
    "cluster_on_kv": True,
    "cluster_soft_assignment": False,
}


def is_published(path: Path) -> bool:
    """Whether the folder's config is that of a compressor as the authors publish it."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict) or config.get("format") == FORMAT:
        return False
    return any(name in config for name in LATENT_WIDTH) and "model_type" in config


def weight_files(fetch: Callable[[str], object], path: Path) -> list[str]:
    """Names of the safetensors of a published folder.

    Args:
        fetch: brings a file of the folder to `path`, raising if there is none.
        path: the folder.
    """
    try:
        fetch(WEIGHTS)
        return [WEIGHTS]
    except Exception as missing:
        try:
            fetch(INDEX)
        except Exception:
            raise missing from None
    try:
        names = set(json.loads((path / INDEX).read_bytes())["weight_map"].values())
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
            raise ValueError("a name that is no safetensors file of the folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressorError(
            f"`{INDEX}` in {path} must map tensors to files, got {error}. Download it again."
        ) from error
    for name in sorted(names):
        fetch(name)
    return sorted(names)


def read_published(path: Path, source: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a published compressor as those of one of our folders. Nothing in it is executed.

    Args:
        source: where it comes from, for messages.

    Raises:
        CompressorError: a file or a tensor is missing or does not fit, settings contradict each other or the tensors,
            or it was trained with something that this package does not compute; the message says what.
    """
    config = json.loads((path / CONFIG).read_bytes())
    reader = _Settings(config, source)
    model_config = _base_config(config, source)
    _check_required(reader, model_config)
    text = model_config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim
    tensors = _rename(_load(path, source), text.num_hidden_layers, source)
    latent_width = reader.integer(LATENT_WIDTH, low=1)
    ratio = reader.number(RATIO)
    if not 0 < ratio <= 0.5:
        raise reader.wrong(RATIO[-1], "above 0 and at most 0.5", ratio)
    nbits = reader.integer(NBITS, default=0)
    group_size = reader.integer(GROUP_SIZE, default=0)
    record = {
        "widths": [width, width],
        # as the authors' code rounds it
        "reference_stride": max(1, int(1 / ratio)),
        "reference_growth": reader.number(("stride_alpha",), default=0.0),
        "top_k": reader.integer(TOP_K, low=1),
        "latent_nbits": nbits,
        "latent_group_size": group_size if group_size > 0 else latent_width,
    }
    for layer_idx in range(text.num_hidden_layers):
        _check_networks(reader, tensors, layer_idx, 2 * width, latent_width)
    return {
        "kind": "learned",
        "model": describe_model(model_config),
        "layers": [record] * text.num_hidden_layers,
        "published": {name: config[name] for name in (*RATIO, *TOP_K, *LATENT_WIDTH, *FULL_LAYERS) if name in config},
    }, tensors


class _Settings:
    """Fields of a published config under any of their names."""

    def __init__(self, config: dict, source: str):
        self.config, self.source = config, source

    def wrong(self, name: str, rule: str, got: object) -> CompressorError:
        return CompressorError(
            f"`{name}` in {CONFIG} of {self.source} must be {rule}, got {got!r}. Take the checkpoint as its authors "
            "published it, or correct its config."
        )

    def find(self, names: tuple[str, ...], default: object = None) -> object:
        found = {name: self.config[name] for name in names if self.config.get(name) is not None}
        if len(set(map(repr, found.values()))) > 1:
            raise self.wrong(next(iter(found)), "the same under all of its names", found)
        value = next(iter(found.values()), default)
        if value is None:
            raise self.wrong(names[0], f"there ({' or '.join(names)}), because it decides what is stored", None)
        return value

    def number(self, names: tuple[str, ...], default: float | None = None) -> float:
        value = self.find(names, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(names[0], "a number", value)
        return float(value)

    def integer(self, names: tuple[str, ...], low: int = -1, default: int | None = None) -> int:
        value = self.find(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.wrong(names[0], f"an integer >= {low}", value)
        return value


def _base_config(config: dict, source: str) -> PretrainedConfig:
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CompressorError(
            f"`model_type` in {CONFIG} of {source} must be a model that transformers knows, got {model_type!r}."
        )
    # a base that was quantised for training leaves its settings here
    return CONFIG_MAPPING[model_type].from_dict({k: v for k, v in config.items() if k != "quantization_config"})


def _check_required(reader: _Settings, model_config: PretrainedConfig) -> None:
    for name, value in REQUIRED.items():
        if reader.config.get(name, value) != value:
            raise CompressorError(
                f"`{name}` in {CONFIG} of {reader.source} must be {value!r}, got {reader.config[name]!r}: such a "
                "compressor computes something that this package does not. Train one of the published form."
            )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    if any(name.endswith((".k_norm", ".k_layernorm")) for name, module in model.named_modules() if _has_weight(module)):
        raise CompressorError(
            f"`model_type` in {CONFIG} of {reader.source} must be a model whose keys are not normalised, got "
            f"{model_config.model_type!r}: its published compressors take keys before their norm, and a cache is "
            "handed keys after it, from which the former cannot be had. A compressor calibrated here takes keys after "
            "their norm and works for such models."
        )


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def _load(path: Path, source: str) -> dict[str, torch.Tensor]:
    def there(name: str) -> None:
        if not (path / name).is_file():
            raise CompressorError(
                f"`id_or_path` must be a whole compressor, got {source!r}, where {name} is missing. Weights as "
                "safetensors are needed; others could run code."
            )

    tensors = {}
    for name in weight_files(there, path):
        try:
            tensors |= load_file(path / name)
        except (SafetensorError, OSError) as error:
            raise CompressorError(
                f"`id_or_path` must be a whole compressor, got {source!r}, whose {name} cannot be read ({error}). "
                "Download it again (`force_download=True`)."
            ) from error
    return tensors


def _rename(tensors: dict[str, torch.Tensor], num_layers: int, source: str) -> dict[str, torch.Tensor]:
    named = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None or int(match[1]) >= num_layers:
            raise CompressorError(
                f"`tensors` of {source} must be compress_down and compress_up of {num_layers} layers, got {name!r}."
            )
        if tensor.dtype not in FLOATING:
            raise CompressorError(f"`{name}` of {source} must be of a 16 or 32 bit floating dtype, got {tensor.dtype}.")
        named[f"layers.{int(match[1])}.{match[2]}.{match[3]}"] = tensor
    return named


def _check_networks(reader: _Settings, tensors: dict, layer_idx: int, width: int, latent_width: int) -> None:
    """Raises unless the networks of a layer are what the config says."""
    layer = LayerTensors(tensors, f"layers.{layer_idx}", reader.source)
    down = read_network(layer, "down", width, latent_width)
    up = read_network(layer, "up", latent_width, width)
    config = reader.config
    for part, network in (("down", down), ("up", up)):
        kind = config.get(f"compressor_{part}_type", "auto")
        if kind == "auto":
            nonlinear = config.get("use_nonlinear_compressor")
            kind = network.kind if nonlinear is None else "mlp_gelu" if nonlinear else "linear"
        if kind != network.kind:
            raise reader.wrong(f"compressor_{part}_type", f"{network.kind!r}, as the tensors are", kind)
        size = config.get(f"compressor_{part}_intermediate_size") or 0
        if size > 0 and network.kind != "linear" and size != network.hidden_width:
            name = f"compressor_{part}_intermediate_size"
            raise reader.wrong(name, f"{network.hidden_width}, as the tensors are", size)
        has_bias = any(name.endswith("bias") for name in network.weights)
        if config.get("compressor_linear_bias", has_bias) != has_bias:
            raise reader.wrong("compressor_linear_bias", f"{has_bias}, as the tensors are", not has_bias)
