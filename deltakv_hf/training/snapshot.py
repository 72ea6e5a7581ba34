"""The state of a training on disk: one file, replaced whole, from which a broken-off training goes on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..compressor.base_model import describe_model
from ..errors import InvalidOptionError
from ..files import replacing
from ..saving.fingerprint import describe_weights

FORMAT = "deltakv-training"


class Snapshot:
    """A file with tensors and a history.

    Args:
        path: the file, or None to keep nothing. A file of anything else is refused and left as it is.
        key: what must be equal for the held to be used.
    """

    def __init__(self, path: str | os.PathLike | None, key: str):
        self.path, self.key = None if path is None else Path(path), key
        if self.path is not None and self.path.exists() and self._metadata() is None:
            raise InvalidOptionError(
                f"`workspace` must be a new file or one of an earlier training, got {str(path)!r}, which is something "
                "else: it would be lost. Choose another place."
            )

    def _metadata(self) -> dict | None:
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        return metadata if metadata.get("format") == FORMAT else None

    def read(self) -> tuple[dict[str, torch.Tensor], dict] | None:
        """CPU tensors and the history of this training; None if there is nothing of it."""
        metadata = None if self.path is None else self._metadata()
        if metadata is None or metadata.get("key") != self.key:
            return None
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["history"])

    def write(self, tensors: dict[str, torch.Tensor], history: dict) -> None:
        """Replaces what is held."""
        if self.path is None:
            return
        metadata = {"format": FORMAT, "key": self.key, "history": json.dumps(history)}
        try:
            with replacing(self.path) as temporary:
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except (OSError, SafetensorError) as error:
            raise InvalidOptionError(
                f"`workspace` must be a file that can be written, got {str(self.path)!r}: {error}. Make room there, or "
                "choose another place."
            ) from error


def snapshot_key(model, compressor, settings, windows: torch.Tensor, held_out: torch.Tensor) -> str:
    """Hash of what decides how a training goes."""
    parts = {
        "settings": asdict(settings),
        "model": describe_model(model),
        "weights": describe_weights(model),
        "compressor": compressor.fingerprint,
        "ids": [windows.flatten().tolist(), held_out.flatten().tolist()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
