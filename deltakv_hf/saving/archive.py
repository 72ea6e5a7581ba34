"""The container of a saved cache: one safetensors file that says what it is and that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CacheStateError, InvalidOptionError
from ..files import replacing

FORMAT = "deltakv-cache"
VERSION = "1"


def write_archive(path: str | os.PathLike, content: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes `content` (what JSON can hold) and `tensors` (any dtype and device) to `path`, whole or not at all."""
    path = _path(path)
    if path.is_dir():
        raise InvalidOptionError(f"`path` must name a file, got the folder {str(path)!r}: add a file name.")
    tensors = _apart(tensors)
    text = json.dumps(content)
    digest = _digest(text, tensors)
    metadata = {"format": FORMAT, "version": VERSION, "content": text, "sha256": digest}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_archive(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """The content and the CPU tensors of `path`; the tensors may be views of the file.

    Raises:
        InvalidOptionError: no such file.
        CacheStateError: not a saved cache, of another format version, cut off or changed since it was written.
    """
    path = _path(path)
    if not path.is_file():
        raise InvalidOptionError(f"`path` must be a file that `cache.save` wrote, got {str(path)!r}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CacheStateError(
            f"`path` must be a whole file that `cache.save` wrote, got {str(path)!r}: it is cut off, damaged or no "
            f"safetensors file ({error}). Save the cache again."
        ) from error
    if _digest(metadata.get("content", ""), tensors) != metadata.get("sha256"):
        raise CacheStateError(
            f"`path` must be as `cache.save` wrote it, got {str(path)!r}, whose checksum differs: it was damaged or "
            "changed. Save the cache again."
        )
    return json.loads(metadata["content"]), tensors


def _path(path: str | os.PathLike) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InvalidOptionError(f"`path` must be the path of a file, got {path!r}.")
    return Path(path)


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise CacheStateError(
            f"`path` must be a file that `cache.save` wrote, got {str(path)!r}, a safetensors file of something else."
        )
    if metadata.get("version") != VERSION:
        raise CacheStateError(
            f"`path` must be of format version {VERSION}, got {str(path)!r} of version {metadata.get('version')}: save "
            "the cache again, or use the version of deltakv_hf that wrote it."
        )


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, no two in the same memory (safetensors refuses that); copies only what it must."""
    apart, taken = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
