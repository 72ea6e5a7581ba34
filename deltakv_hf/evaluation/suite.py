"""A suite: every measurement of every cache, stored as soon as it is there, so that a run goes on where it stopped.

A folder holds a JSON file for each cache, with a row for each measurement. Rows hold what was measured and nothing that
compares caches: that is worked out from the rows, so a cache can be added at any time, or be measured beside others in
a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from .. import __version__
from ..errors import DeltaKVError, InvalidOptionError
from ..files import write_atomically
from .candidates import FULL_CACHE, PEER, REFERENCE, Candidate
from .measurements import Bench, Measurement, measure, settings
from .steps import environment

FORMAT, VERSION = "deltakv-eval", 1


@dataclass(frozen=True)
class Cell:
    """One measurement of one cache."""

    measurement: Measurement
    candidate: Candidate


def read_rows(path: Path) -> list[dict]:
    """The rows of a file.

    Raises:
        InvalidOptionError: it is no file of a suite.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidOptionError(f"`dir` must hold JSON files that can be read, got {str(path)!r}: {error}.") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT or held.get("version") != VERSION:
        raise InvalidOptionError(
            f"`dir` must hold files of `deltakv eval all` of format version {VERSION} alone, got {str(path)!r}."
        )
    return held["rows"]


def read_folder(folder: Path) -> list[dict]:
    """The rows of all files of a folder, by file.

    Raises:
        InvalidOptionError: there is no such folder, no row in it, or a file of something else.
    """
    rows = [row for path in sorted(folder.glob("*.json")) for row in read_rows(path)]
    if not rows:
        raise InvalidOptionError(
            f"`dir` must be a folder with measurements, got {str(folder)!r}, which has none: "
            f"`deltakv eval all --out {folder}` makes them."
        )
    return rows


def open_cells(plan: Iterable[Measurement], candidates: Iterable[Candidate], bench: Bench, folder: Path) -> list[Cell]:
    """The cells of which `folder` holds no row yet, measurement by measurement; failed ones are open again.

    Raises:
        InvalidOptionError: a row was measured with other settings, or a file is of another cache.
    """
    candidates = [FULL_CACHE, *candidates]
    names = [candidate.file_name for candidate in candidates]
    for candidate in candidates:
        if names.count(candidate.file_name) > 1:
            raise InvalidOptionError(
                f"`candidates` must have different names, got {candidate.name!r} twice or alike: rename a folder."
            )
    held = {candidate.file_name: _held(folder / candidate.file_name, candidate) for candidate in candidates}
    cells = []
    for measurement in plan:
        wanted = settings(measurement, bench)
        for candidate in candidates:
            if candidate.role == REFERENCE and not measurement.with_full_cache:
                continue
            if candidate.press and not measurement.with_presses:
                continue
            row = held[candidate.file_name].get(measurement.name)
            if row is not None and row["settings"] != wanted:
                differing = sorted(name for name in wanted if row["settings"].get(name) != wanted[name])
                raise InvalidOptionError(
                    f"`--out` must hold measurements of the same plan, got {str(folder)!r}, where {measurement.name} "
                    f"of {candidate.label} differs in {', '.join(differing)}: name another folder."
                )
            if row is None or "error" in row:
                cells.append(Cell(measurement, candidate))
    return cells


def _held(path: Path, candidate: Candidate) -> dict[str, dict]:
    """Rows of a candidate by measurement."""
    if not path.exists():
        return {}
    rows = {row["measurement"]: row for row in read_rows(path)}
    for row in rows.values():
        if row["source"] != candidate.portable_source:
            raise InvalidOptionError(
                f"`--out` must hold one cache a file, got {str(path)!r} of {row['source']} for "
                f"{candidate.portable_source}: name another folder."
            )
    return rows


def run_cells(
    cells: Iterable[Cell],
    bench: Bench,
    folder: Path,
    command: str,
    progress: Callable[[Iterable[Cell]], Iterator[Cell]] = iter,
    measure: Callable[[Measurement, Candidate, Bench], dict] = measure,
) -> list[dict]:
    """Measures cells one after the other and stores the row of each; one that fails is stored with its error.

    Args:
        command: as it was typed, for the rows.
        progress: wraps the iteration over cells (for a progress bar).
        measure: measures one cell.

    Returns:
        the new rows.
    """
    rows = []
    for cell in progress(list(cells)):
        start = time.perf_counter()
        try:
            found = measure(cell.measurement, cell.candidate, bench)
        except DeltaKVError:
            raise
        except Exception as error:  # a cache of others that breaks must not end the measurement of the rest
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        row = {
            "measurement": cell.measurement.name,
            "cache": cell.candidate.label,
            "about": cell.candidate.name if cell.candidate.role == PEER else cell.candidate.label,
            "role": cell.candidate.role,
            "source": cell.candidate.portable_source,
            "settings": settings(cell.measurement, bench),
            "command": command,
            "environment": environment(bench.model.device, bench.model.dtype) | {"commit": _commit()},
            "seconds": time.perf_counter() - start,
        } | found
        _store(folder / cell.candidate.file_name, _rounded(row))
        rows.append(row)
    return rows


def _store(path: Path, row: dict) -> None:
    """Puts a row into its file in the place of an older one, whole or not at all, one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # several processes may measure caches of their own, but all of them measure the full one
    with FileLock(path.with_name(f".{path.name}.lock")):
        held = read_rows(path) if path.exists() else []
        rows = [other for other in held if other["measurement"] != row["measurement"]]
        lines = ",\n".join(json.dumps(other, ensure_ascii=False) for other in [*rows, row])
        # one row a line: a change shows as what it is
        content = f'{{"format": "{FORMAT}", "version": {VERSION}, "rows": [\n{lines}\n]}}\n'
        write_atomically(path, content.encode())


def _rounded(held):
    """Numbers to six digits, which is more than any of them is known to."""
    if isinstance(held, float):
        return float(f"{held:.6g}")
    if isinstance(held, dict):
        return {name: _rounded(value) for name, value in held.items()}
    if isinstance(held, (list, tuple)):
        return [_rounded(value) for value in held]
    return held


def _commit() -> str:
    """Of this package: the git commit it runs from, else its version."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        # an installed package may lie in somebody else's checkout
        return __version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return done.stdout.strip() if done.returncode == 0 else __version__
