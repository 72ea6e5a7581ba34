"""`deltakv eval tasks`: what caches lose of the facts in long contexts."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from ..evaluation.haystack import read_sources
from ..evaluation.runner import FULL, run_tasks
from ..evaluation.scores import TaskScores
from ..evaluation.tasks import Task, pick_tasks
from .console import console
from .eval_setup import EvalSettings, prepare, progress, write_result

NOTE = "in brackets: 95 % intervals; *: beyond noise, the interval of the paired change does not hold 0"


def run_eval_tasks(
    settings: EvalSettings,
    names: list[str],
    lengths: list[int],
    num_contexts: int,
    text: Path | None,
    classes: list[Path],
    prefill_chunk: int,
) -> None:
    """Measures, prints a table for each task and writes the JSON."""
    tasks, sources = pick_tasks(names), read_sources(text, classes)
    model, tokenizer, caches = prepare(settings)
    makers = {name: lambda cache=cache: cache.make(model) for name, cache in caches.items()}
    lengths = list(dict.fromkeys(lengths))
    results = run_tasks(
        model,
        tokenizer,
        tasks,
        lengths,
        range(num_contexts),
        makers,
        progress(f"{len(tasks) * len(lengths) * num_contexts} contexts"),
        sources=sources,
        prefill_chunk=prefill_chunk,
    )
    for task in tasks:
        console.print(task_table(task, [scores for scores in results if scores.task == task.name]))
    console.print(NOTE)
    rows = [(caches[scores.cache].source if scores.cache != FULL else {}) | scores.summary() for scores in results]
    how = {"prefill_chunk": prefill_chunk, "text": text and text.name, "classes": [path.name for path in classes]}
    write_result(settings, model, how, rows)


def task_table(task: Task, results: list[TaskScores]) -> Table:
    """One line for each length and cache."""
    title = f"{task.name}: {task.asks}, {len(results[0].items)} items a line"
    table = Table(title=title, title_justify="left")
    for header in ("tokens", "cache"):
        table.add_column(header)
    for header in ("all right (EM)", "change", "right tokens", "NLL", "change", "bytes", "compressed"):
        table.add_column(header, justify="right")
    for scores in results:
        summary = scores.summary()
        low, high = summary["em_interval"]
        cells = [f"{summary['em']:.2f} [{low:.2f}, {high:.2f}]", "", f"{summary['token_accuracy']:.3f}"]
        cells += [f"{summary['nll']:.3f}", "", f"{summary['stored_share']:.1%}", ""]
        if scores.cache != FULL:
            low, high = summary["em_change_interval"]
            cells[1] = f"{summary['em_change']:+.3f} [{low:+.2f}, {high:+.2f}]{' ' if low <= 0 <= high else '*'}"
            cells[4] = f"{summary['nll_change']:+.3f} ± {summary['nll_change_se']:.3f}"
            cells[6] = f"{summary['compressed_share']:.1%}"
        table.add_row(f"{scores.num_tokens:,}", scores.cache, *cells)
    return table
