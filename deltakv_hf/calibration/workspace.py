"""What a calibration has seen so far, on disk: a run that was broken off goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InvalidOptionError
from ..files import replacing, write_atomically

STATE = "calibration.json"
# all that a workspace holds, and what a crash leaves of writing it
OWN = re.compile(r"\.?(calibration\.json|(sensitivity|window-\d+)\.safetensors)(\.[0-9a-f]{16})?")


class Workspace:
    """Tokens of every window that was read (16 bits a number) and the sum of squared gradients.

    Args:
        path: a folder of its own; made if it is not there. What it holds of another calibration is removed; if it
            holds anything else, it is refused and left as it is.
        key: what must be equal for the held to be used: settings, windows, model.
    """

    def __init__(self, path: str | os.PathLike, key: dict):
        self.path = Path(path)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.path)
        except OSError as error:
            raise InvalidOptionError(f"`workspace` must be a folder, got {str(path)!r}: {error}.") from error
        held = self._state() if STATE in names else None
        other = next((name for name in names if not OWN.fullmatch(name) or name == STATE and held is None), None)
        if other is not None:
            raise InvalidOptionError(
                f"`workspace` must be a new folder or one of an earlier calibration, got {str(path)!r}, which holds "
                f"{other!r}. Choose another place."
            )
        if held != digest:
            with self._writing():
                for name in names:
                    (self.path / name).unlink()
                write_atomically(self.path / STATE, json.dumps({"key": digest}).encode())

    def _state(self) -> str | None:
        """The key of what is held; None of a file of that name that is none of ours."""
        try:
            held = json.loads((self.path / STATE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return held["key"] if isinstance(held, dict) and held.keys() == {"key"} else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, and a folder that may not be written to, are said as such."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise InvalidOptionError(
                f"`workspace` must be a folder that can be written to, got {str(self.path)!r}: {error}. Make room "
                "there (2 bytes a number of K and V), or choose another place; what was read so far is kept."
            ) from error

    def _window(self, number: int) -> Path:
        return self.path / f"window-{number:05d}.safetensors"

    def has_window(self, number: int) -> bool:
        """Whether window `number` was read."""
        return _is_whole(self._window(number))

    def write_window(self, number: int, tokens: dict[int, torch.Tensor]) -> None:
        """Keeps `[tokens, width]` of every layer."""
        # float16 holds all that float16 and most that bfloat16 models store; larger numbers are kept finite
        most = torch.finfo(torch.float16).max
        held = {str(layer_idx): x.clamp(-most, most).half().cpu().contiguous() for layer_idx, x in tokens.items()}
        with self._writing(), replacing(self._window(number)) as temporary:
            save_file(held, temporary)

    def read_window(self, number: int, layer_idx: int, device: torch.device) -> torch.Tensor:
        """`[tokens, width]` float32 of a layer."""
        with safe_open(self._window(number), framework="pt") as file:
            return file.get_tensor(str(layer_idx)).to(device).float()

    def write_sensitivity(self, sums: dict[int, torch.Tensor], count: int, num_windows: int) -> None:
        """Keeps float32 sums of squared gradients `[splits, width, width]` of `count` tokens of `num_windows`."""
        held = {str(layer_idx): x.cpu().contiguous() for layer_idx, x in sums.items()}
        with self._writing(), replacing(self.path / "sensitivity.safetensors") as temporary:
            save_file(held, temporary, {"count": str(count), "num_windows": str(num_windows)})

    def read_sensitivity(self, device: torch.device) -> tuple[dict[int, torch.Tensor], int, int]:
        """What was kept last: sums, tokens, windows; nothing and zeros before."""
        path = self.path / "sensitivity.safetensors"
        if not _is_whole(path):
            return {}, 0, 0
        with safe_open(path, framework="pt") as file:
            sums = {int(name): file.get_tensor(name).to(device) for name in file.keys()}
            return sums, int(file.metadata()["count"]), int(file.metadata()["num_windows"])


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
