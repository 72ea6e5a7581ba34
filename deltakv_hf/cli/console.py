"""What all commands share on the screen: the console, progress bars, readable errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..errors import DeltaKVError

console = Console(highlight=False)

EXIT_DISAGREE = 1
EXIT_ERROR = 2


def progress_bar() -> Progress:
    """Progress bars that stay on the screen when they are full."""
    columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def stages(bar) -> Callable[[str, int], Callable[[], None]]:
    """What a calibration or a training tells of its stages, as bars."""

    def stage(name: str, steps: int) -> Callable[[], None]:
        if not console.is_terminal:
            # a file shows a bar only when all is done
            console.print(f"{name}, {steps} steps")
        task = bar.add_task(name, total=steps)
        return lambda: bar.advance(task)

    return stage


@contextmanager
def readable_errors() -> Iterator[None]:
    """Prints an error of this package as one line and leaves with code 2."""
    try:
        yield
    except DeltaKVError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        raise typer.Exit(EXIT_ERROR) from error


def size(num_bytes: float) -> str:
    """Bytes as text, in MiB."""
    return f"{num_bytes / 2**20:.2f} MiB"


def _escape(text: str) -> str:
    # square brackets are markup to rich
    return text.replace("[", r"\[")
