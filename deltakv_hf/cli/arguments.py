"""Arguments that several commands take."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidOptionError

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: what suits the device.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


def command_line() -> str:
    """The command as it was typed, to be noted beside what it made."""
    return shlex.join(["deltakv", *sys.argv[1:]])


def check_output(name: str, path: Path | None) -> None:
    """Refuses a file that could not be written in the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InvalidOptionError(f"`{name}` must name a file in a folder that exists, got {str(path)!r}.")
