"""`deltakv eval all`: every measurement of every cache, stored one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import DeltaKVError, InvalidOptionError
from ..evaluation.candidates import PEER, Candidate
from ..evaluation.measurements import Bench
from ..evaluation.model import find_source
from ..evaluation.plan import default_candidates, full_plan, quick_plan
from ..evaluation.suite import Cell, open_cells, run_cells
from .arguments import command_line
from .console import console
from .eval_setup import EvalSettings, candidates, load


def run_all(settings: EvalSettings, out: Path, full: bool, texts: list[Path]) -> None:
    """Measures what `out` does not hold yet."""
    if out.exists() and not out.is_dir():
        raise InvalidOptionError(f"`--out` must name a folder, got the file {str(out)!r}.")
    caches, absent = picked(settings, full)
    model, tokenizer = load(settings)
    caches, refused = fitting(caches, model, named=_named(settings))
    for line in absent + refused:
        console.print(line, markup=False, soft_wrap=True)
    # only presses need to know where the model lies
    source = find_source(settings.model) if any(cache.press for cache in caches) else None
    bench = Bench(model, tokenizer, texts, source)
    plan = full_plan() if full else quick_plan()
    cells = open_cells(plan, caches, bench, out)
    rows = run_cells(cells, bench, out, command_line(), _progress)
    for row in rows:
        if "error" in row:
            console.print(f"{row['measurement']} of {row['cache']} failed: {row['error']}", markup=False)
    console.print(f"{len(rows)} measurements in {out}; deltakv eval results {out} --out PAGE.md", markup=False)


def _named(settings: EvalSettings) -> bool:
    return bool(settings.options or settings.compressors or settings.peers)


def picked(settings: EvalSettings, full: bool) -> tuple[list[Candidate], list[str]]:
    """The caches that the command names, or those of the plan; and a line for each peer that is not installed."""
    if not _named(settings):
        options, compressors, peers = default_candidates(full, settings.model == "demo")
        settings = replace(settings, options=options, compressors=compressors, peers=peers)
    found, absent = [], []
    for peer in settings.peers:
        try:
            found += candidates(replace(settings, options=[], compressors=[], peers=[peer]))
        except DeltaKVError as error:
            if "pip install" not in str(error) and "deltakv eval peers" not in str(error):
                raise
            absent.append(f"{peer} is not installed: {str(error).rpartition(': ')[2]}")
    if settings.options or settings.compressors:
        found = candidates(replace(settings, peers=[])) + found
    return found, absent


def fitting(caches: list[Candidate], model, named: bool) -> tuple[list[Candidate], list[str]]:
    """Those that the model can be measured with; a peer that nobody named gets a line instead of an error."""
    fit, refused = [], []
    for cache in caches:
        try:
            if cache.make:
                cache.make(model)
        except InvalidOptionError as error:
            if named or cache.role != PEER:
                raise
            refused.append(f"{cache.label} cannot be measured with this model: {error}")
        else:
            fit.append(cache)
    return fit, refused


def _progress(cells: Iterable[Cell]) -> Iterator[Cell]:
    """A bar that names the cell it is at."""
    cells = list(cells)
    columns = TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(cells))
        for cell in cells:
            name = f"{cell.measurement.name}: {cell.candidate.label}"
            if console.is_terminal:
                bar.update(task, description=name[:44])
            else:
                # a file shows a bar only when all is done
                console.print(name, markup=False)
            yield cell
            bar.advance(task)
