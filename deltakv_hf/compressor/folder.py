"""A compressor folder: `config.json` says what it is, `compressor.safetensors` holds its tensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import CompressorError, InvalidOptionError
from ..files import replacing_folder

CONFIG = "config.json"
TENSORS = "compressor.safetensors"
FORMAT = "deltakv-compressor"
VERSION = 1
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def write_folder(
    path: str | os.PathLike,
    config: dict,
    tensors: Mapping[str, torch.Tensor],
    extra: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a compressor folder, whole or not at all; one that is at `path` is replaced. Equal input, equal bytes.

    Args:
        path: where; nothing, an empty folder or a compressor folder may be there.
        config: what JSON can hold; `format`, `version` and `sha256` are set here.
        tensors: of any shape and device, in one of `DTYPES`.
        extra: further files by name (README.md, report.json, pictures).

    Raises:
        InvalidOptionError: something in `config`, `tensors` or `extra` cannot be written.
        CompressorError: something else is at `path`, or it cannot be written there. Nothing was changed.
    """
    path = Path(path)
    check_place(path)
    files = {**_extra_files(extra or {}), TENSORS: _tensor_bytes(tensors)}
    header = {"format": FORMAT, "version": VERSION, "sha256": {TENSORS: _sha256(files[TENSORS])}}
    # the last file to come is the one that makes the folder a compressor
    files[CONFIG] = _config_bytes({**config, **header})
    try:
        with replacing_folder(path) as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
    except OSError as error:
        raise CompressorError(
            f"`path` must be a place where a folder can be written, got {str(path)!r}: {error}. What was there is "
            "unchanged; make room or choose another place."
        ) from error


def read_folder(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the CPU tensors of a compressor folder, after all checks. Nothing in it is executed.

    Raises:
        CompressorError: a file is missing, cut off, changed, of something else or of another format version.
    """
    path = Path(path)
    config = read_config(path)
    content = _file_bytes(path, TENSORS)
    expected = config["sha256"][TENSORS]
    if _sha256(content) != expected:
        raise _broken(
            path,
            f"{TENSORS} does not match its checksum (sha256 is {_sha256(content)[:12]}..., {CONFIG} says "
            f"{expected[:12]}...), so it was {'changed' if _is_safetensors(content) else 'cut off or damaged'}",
        )
    try:
        tensors = load(content)
    except (SafetensorError, KeyError) as error:
        raise _broken(path, f"{TENSORS} is no safetensors file ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise _broken(path, f"tensor {name!r} in {TENSORS} has the dtype {tensor.dtype}, which no compressor uses")
    return config, tensors


def read_config(path: str | os.PathLike) -> dict:
    """The checked `config.json` of a compressor folder; its tensors are not looked at.

    Raises:
        CompressorError: the folder or the file is missing, or it is not the config of a compressor of this version.
    """
    path = Path(path)
    if not path.is_dir():
        raise CompressorError(f"`path` must be a compressor folder, got {str(path)!r}: no such folder.")
    try:
        config = json.loads(_file_bytes(path, CONFIG))
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CompressorError(
            f"`path` must be a compressor folder, got {str(path)!r}, whose {CONFIG} has no "
            f'"format": "{FORMAT}". A model is no compressor: look for one that was made for it.'
        )
    if config.get("version") != VERSION:
        raise CompressorError(
            f"`path` must be a compressor folder of version {VERSION}, got {str(path)!r} of version "
            f"{config.get('version')!r}. Use the version of deltakv-hf that wrote it, or make the compressor again."
        )
    sums = config.get("sha256")
    if not isinstance(sums, dict) or not isinstance(sums.get(TENSORS), str):
        raise _broken(path, f'{CONFIG} has no "sha256" of {TENSORS}')
    return config


def is_compressor(path: Path) -> bool:
    """Whether `path` is a compressor folder of any version, be its tensors whole or not."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def check_place(path: Path, argument: str = "path") -> None:
    """Raises `CompressorError` if a compressor folder may not take the place `path`; errors call it `argument`."""
    if path.exists() and not path.is_dir():
        raise CompressorError(
            f"`{argument}` must name a folder, got {str(path)!r}, which is a file. Choose another place."
        )
    if path.is_dir():
        inside = list(path.iterdir())
        folder = next((entry for entry in inside if entry.is_dir()), None)
        if inside and (folder or not is_compressor(path)):
            why = f"holds the folder {folder.name!r}" if folder else "is no compressor folder"
            raise CompressorError(
                f"`{argument}` must be a new folder or a compressor folder to replace, got {str(path)!r}, which {why}: "
                "it would be lost. Choose another place, or delete it."
            )


def _extra_files(extra: Mapping[str, bytes]) -> dict[str, bytes]:
    for name in extra:
        if Path(name).name != name or name in ("", CONFIG, TENSORS) or name.startswith("."):
            raise InvalidOptionError(
                f"`extra` must map names of further files to bytes, got {name!r}: no paths, no hidden files, not "
                f"{CONFIG} or {TENSORS}."
            )
    return dict(extra)


def _config_bytes(config: dict) -> bytes:
    try:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOptionError(
            f"`config` must hold what JSON can hold (texts, finite numbers, booleans, None, lists, dicts): {error}."
        ) from error


def _tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InvalidOptionError(f"`tensors` must be of dtype {known}, got {name!r} of {tensor.dtype}: convert it.")
    # clones, because safetensors refuses tensors that share memory
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return save({name: tensor.cpu() for name, tensor in own.items()})


def _file_bytes(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise _broken(path, f"{name} is missing or cannot be read ({error.strerror})") from error


def _is_safetensors(content: bytes) -> bool:
    try:
        load(content)
    except (SafetensorError, KeyError):
        return False
    return True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _broken(path: Path, what: str) -> CompressorError:
    return CompressorError(
        f"`path` must be a whole compressor folder, got {str(path)!r}: {what}. Download it again "
        "(`force_download=True`) or make it again."
    )
