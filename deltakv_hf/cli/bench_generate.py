"""`deltakv bench generate`: our cache and the host's, row by row; what was measured stays, whatever happens."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import product
from pathlib import Path

from ..errors import InvalidOptionError
from ..files import write_atomically
from .arguments import command_line
from .console import console
from .pictures import as_png

COLUMNS = {
    "token_ms": "ms",
    "step_ms": "forward\nms",
    "tokens_s": "tokens/s",
    "first_token_s": "first\ns",
    "cache_bytes": "cache\nGB",
    "peak_bytes": "peak\nGB",
}


def numbers(name: str, given: str, low: int = 1) -> list[int]:
    """`1,64` -> [1, 64]."""
    parts = [part.strip().replace("_", "") for part in given.split(",")]
    if not all(part.isdigit() and int(part) >= low for part in parts):
        raise InvalidOptionError(f"`{name}` must be whole numbers >= {low} with commas between, got {given!r}.")
    return [int(part) for part in parts]


def wanted_rows(kinds: str, contexts: str, batches: str, **options) -> list:
    """All combinations; `options` are the other fields of rows."""
    from ..evaluation.generating import KINDS, Row

    names = [name.strip() for name in kinds.split(",")]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise InvalidOptionError(f"`--kinds` must be some of {', '.join(KINDS)}, got {unknown[0]!r}.")
    sizes = product(names, numbers("--contexts", contexts), numbers("--batches", batches))
    rows = [Row(*size, **options) for size in sizes]
    fewest = min(row.batch for row in rows)
    if not 0 <= options["released"] < fewest:
        raise InvalidOptionError(f"`--released` must leave a row of {fewest}, got {options['released']}.")
    return rows


def measure(model, rows: list, compressor, options: dict, environment: dict, json_file: Path | None, text=None) -> dict:
    """Measures what `json_file` does not hold yet; every row is written when it is done."""
    from ..evaluation.generating import measure_row

    made = {"command": command_line(), "environment": environment, "rows": []}
    if json_file is not None and json_file.exists():
        old = json.loads(json_file.read_text())
        if old.get("environment") != environment:
            raise InvalidOptionError(
                f"`--json` must be a new file or one that was begun on this machine with these versions, got "
                f"{json_file.name!r} of others: name another file."
            )
        made["rows"] = old["rows"]
    for row in rows:
        if any(
            all(known.get(f.name, f.default) == getattr(row, f.name) for f in fields(row)) for known in made["rows"]
        ):
            console.print(f"{row.kind}, {row.context:,} tokens, batch {row.batch}: measured before")
            continue
        with console.status(f"{row.kind}, {row.context:,} tokens, batch {row.batch}"):
            chosen = options if row.kind == "deltakv filter" else {}
            made["rows"].append(vars(row) | measure_row(model, row, compressor, chosen, text))
        if json_file is not None:
            write_atomically(json_file, (json.dumps(made, indent=1) + "\n").encode())
    return made


def show(made: dict) -> None:
    """A line for each row, of what was measured; what failed stands below."""
    from rich import box
    from rich.table import Table

    done = [row for row in made["rows"] if "error" not in row]
    names = [name for name in COLUMNS if any(name in row for row in done)]
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("cache", no_wrap=True)
    for header in ("tokens", "rows", *(COLUMNS[name] for name in names)):
        table.add_column(header, justify="right", no_wrap=True)
    for row in done:
        sizes = {name: row[name] / (1e9 if name.endswith("bytes") else 1) for name in names if name in row}
        cells = (f"{sizes[name]:,.2f}" if name in sizes else "" for name in names)
        table.add_row(row["kind"], f"{row['context']:,}", str(row["batch"]), *cells)
    console.print(table)
    for row in made["rows"]:
        if "error" in row:
            console.print(f"{row['kind']}, {row['context']:,} × {row['batch']}: {row['error']}", style="yellow")


def chart(made: dict) -> bytes:
    """Tokens a second by row, as PNG."""
    from matplotlib.figure import Figure

    rows = [row for row in made["rows"] if "error" not in row][::-1]
    figure = Figure(figsize=(8, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['kind']}, {row['context']:,} × {row['batch']}" for row in rows]
    colors = ["#1b6ca8" if row["kind"].startswith("deltakv") else "#b8c4ce" for row in rows]
    bars = axes.barh(range(len(rows)), [row["tokens_s"] for row in rows], color=colors)
    axes.set_yticks(range(len(rows)), names)
    axes.bar_label(bars, [f"{row['tokens_s']:,.0f}" for row in rows], padding=3, fontsize=8)
    axes.set_xlabel(f"tokens a second in `generate` on {made['environment']['device']}")
    return as_png(figure, axes)
