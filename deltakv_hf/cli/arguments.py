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
TextLicense = Annotated[
    list[str] | None, typer.Option(help="FILE=LICENCE of a text, for the model card; may be repeated.")
]


def given(options: dict) -> dict:
    """Those options that were given: the others are left to their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_given(options: dict, rule: str) -> None:
    """Refuses the first of `options` that was given; `rule` says what it must do instead, and how to repair it."""
    for name, value in given(options).items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        raise InvalidOptionError(f"`--{name.replace('_', '-')}` must {rule}, got {str(shown)!r}.")


def command_line() -> str:
    """The command as it was typed, to be noted beside what it made; of places on this machine the names alone."""
    parts = [Path(part).name if part.startswith(("/", "~")) else part for part in sys.argv[1:]]
    return shlex.join(["deltakv", *parts])


def check_output(name: str, path: Path | None) -> None:
    """Refuses a file that could not be written in the end."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InvalidOptionError(f"`{name}` must name a file in a folder that exists, got {str(path)!r}.")
