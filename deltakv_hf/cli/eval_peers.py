"""`deltakv eval peers`: the environment of kvpress, made if it is not there, and what runs in it."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import DeltaKVError
from ..evaluation.press_environment import check_environment, environment_folder, find_environment, make_environment
from .console import EXIT_DISAGREE, console
from .eval_setup import progress


def run_eval_peers(wheels: Path | None) -> int:
    """Makes or checks the environment, prints what it holds, and returns the exit code."""
    found = _found() or make_environment(wheels, progress("packages"))
    console.print(f"{environment_folder()}:")
    console.print(", ".join(f"{package} {version}" for package, version in found["versions"].items() if version))
    console.print(press_table(found["presses"]))
    return EXIT_DISAGREE if any(found["presses"].values()) else 0


def _found() -> dict[str, dict] | None:
    """What the environment holds that is there; None if there is none that runs."""
    try:
        folder = find_environment()
        with console.status("check the environment"):
            return check_environment(folder)
    except DeltaKVError:
        # it can be made again
        return None


def press_table(presses: dict[str, str | None]) -> Table:
    """One line for each press: runs, or why not."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("--peer", no_wrap=True)
    table.add_column("on a tiny model", overflow="fold")
    for kind, error in presses.items():
        table.add_row(f"{kind}-0.5", escape(error) if error else "runs")
    return table
