"""The model that a compressor was made for: how it is described, and whether another one will do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from ..attach import unwrap
from ..errors import CompressorError
from ..support import rope_parameters

# what some configs have on top: each decides what keys and values are
FLAGS = (
    *("attention_bias", "use_attention_bias", "qkv_bias", "use_qkv_bias", "clip_qkv"),
    *("use_qk_norm", "qk_norm_type", "qk_layernorm"),
    *("no_rope_layers", "layer_rope_theta", "rope_interleave"),
    *("num_kv_shared_layers", "attention_k_eq_v", "global_head_dim", "num_global_key_value_heads"),
)
# what the layers of a config that is not the same for all have of their own (Gemma 4)
PER_LAYER = "per_layer_config"
MISSING = object()


def describe_model(model: nn.Module | PretrainedConfig) -> dict:
    """What a compressor notes about its model, as JSON holds it.

    Returns:
        `id` (on the Hub; of a local folder its name alone; None if unknown), `revision` (the commit that it was loaded
        from, or None) and `architecture`: the fields of the text config that decide what keys and values are.

    Raises:
        UnsupportedModelError: `model` holds no transformers model.
    """
    config = model if isinstance(model, PretrainedConfig) else unwrap(model).config
    architecture = _architecture(config.get_text_config(decoder=True))
    return {
        "id": _public_id(config.name_or_path),
        "revision": getattr(config, "_commit_hash", None),
        "architecture": json.loads(json.dumps(architecture, default=str)),
    }


def check_model(saved: dict, model: nn.Module | PretrainedConfig) -> None:
    """Checks that `model` has the architecture that `saved` (by `describe_model`) notes; warns if it is another model.

    An entry that only one version of transformers knows is not compared.

    Raises:
        CompressorError: the architecture differs; the message names every field with both values.
    """
    running = describe_model(model)
    wanted, given = saved.get("architecture") if isinstance(saved, dict) else None, running["architecture"]
    if not isinstance(wanted, dict) or not given.keys() - {*FLAGS, PER_LAYER} <= wanted.keys():
        raise CompressorError(
            '`config` must say in "model" what model the compressor was made for, and does not: its config.json was '
            "changed. Download it again or make it again."
        )
    differing = [name for name in given if name in wanted and wanted[name] != given[name]]
    if differing:
        fields = "; ".join(f"{name} is {given[name]!r}, not {wanted[name]!r}" for name in differing)
        raise CompressorError(
            f"`model` must be built like {saved.get('id') or 'the model'} that the compressor was made for, got "
            f"{running['id'] or 'another one'}: {fields}. Take a compressor that was made for this model, or make one."
        )
    if not _same(saved, running):
        names = [f"{one.get('id')} ({one.get('revision') or 'revision unknown'})" for one in (saved, running)]
        warnings.warn(
            f"the compressor was made for {names[0]}, and the model is {names[1]}. A fine-tune of the same base "
            "usually works; measure it. To silence this: "
            "warnings.filterwarnings('ignore', message='the compressor was made').",
            stacklevel=2,
        )


def _architecture(config: PretrainedConfig) -> dict:
    heads, width = _field(config, "num_attention_heads"), _field(config, "hidden_size")
    fields = {
        "model_type": config.model_type,
        "num_hidden_layers": _field(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(config, "num_key_value_heads") or heads,
        "head_dim": _field(config, "head_dim") or (width // heads if width and heads else None),
        "hidden_size": width,
        "layer_types": _field(config, "layer_types"),
        "rope": [
            {name: value for name, value in sorted(one.items()) if value is not None} for one in rope_parameters(config)
        ],
    }
    flags = {name: _field(config, name, MISSING) for name in FLAGS}
    flags[PER_LAYER] = config.to_dict().get(PER_LAYER) or MISSING
    return fields | {name: value for name, value in flags.items() if value is not MISSING}


def _field(config: PretrainedConfig, name: str, default: object = None) -> object:
    try:
        return getattr(config, name, default)
    except RuntimeError:
        # not readable where layers differ in it: what most have; `PER_LAYER` says which ones have something else
        return config.to_dict().get(name, default)


def _public_id(name: str) -> str | None:
    """A path says where a file is on this machine, which is nobody's business; its last part is enough."""
    local = name.count("/") > 1 or name.startswith((".", "~", "/")) or "\\" in name or Path(name).exists()
    return (Path(name.replace("\\", "/")).expanduser().resolve().name if local and name else name) or None


def _same(saved: dict, running: dict) -> bool:
    """Whether nothing says that they are two models; a local folder may be a copy of the repository of its name."""
    ids = saved.get("id"), running["id"]
    if None in ids:
        return True
    if not all("/" in one for one in ids):
        ids = tuple(one.split("/")[-1] for one in ids)
    revisions = {saved.get("revision"), running["revision"]} - {None}
    return ids[0] == ids[1] and len(revisions) < 2
