"""Folders that a command is to write: checked before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from ..compressor.folder import check_place
from ..errors import InvalidOptionError


def check_out(out: Path) -> None:
    """Refuses at once what would be refused once the compressor is made."""
    try:
        check_place(out, "--out")
        # the folder is made beside the place that it takes, and its own parents with it
        above = next(folder for folder in out.resolve().parents if folder.exists())
    except OSError as error:
        raise InvalidOptionError(
            f"`--out` must name a folder that can be made, got {str(out)!r}: {error.strerror}. Choose another place."
        ) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written to" if above.is_dir() else "is a file"
        raise InvalidOptionError(
            f"`--out` must name a folder that can be made, got {str(out)!r}: {str(above)!r} {why}. Choose another "
            "place."
        )


def check_workspace(workspace: Path | None, out: Path) -> None:
    """Refuses a workspace that `out` could not be written beside: each of them takes all of its folder."""
    if workspace is None:
        return
    one, other = workspace.resolve(), out.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InvalidOptionError(
            f"`--workspace` must be a folder apart from `--out`, got {str(workspace)!r} and {str(out)!r}: choose one "
            "beside it."
        )
