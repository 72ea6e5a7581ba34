"""`deltakv eval tasks`: what caches lose of the facts in long contexts."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..evaluation.haystack import read_sources
from ..evaluation.presses import run_press_tasks
from ..evaluation.runner import FULL, make_contexts, run_tasks
from ..evaluation.scores import TaskScores
from ..evaluation.tasks import Task, pick_tasks
from .console import console
from .eval_setup import (
    EvalSettings,
    makers,
    own_share,
    prepare,
    press_model,
    presses,
    print_compressor,
    progress,
    write_result,
)

NOTE = (
    "EM: share of items whose answer is right in every token; tokens: share of right answer tokens. Below them: 95 % "
    "intervals (* where that of the paired change leaves out 0: beyond noise), the change of NLL with its standard "
    "error over contexts, the share of bytes of compressed tokens alone."
)


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
    model, tokenizer, caches = prepare(settings, {"prefill_chunk": prefill_chunk})
    lengths, seeds = list(dict.fromkeys(lengths)), range(num_contexts)
    asked, count = (model, tokenizer, tasks, lengths, seeds), len(tasks) * len(lengths) * num_contexts
    bar = progress(f"contexts: {count}")
    results = run_tasks(*asked, makers(model, caches), bar, sources=sources, prefill_chunk=prefill_chunk)
    if presses(caches):
        cells, bar = make_contexts(*asked, sources), progress(f"contexts of presses: {count}")
        results += run_press_tasks(press_model(settings, model), cells, seeds, presses(caches), bar)
        order = list(cells)
        results.sort(key=lambda scores: order.index((scores.task, scores.num_tokens)))
    for task in tasks:
        console.print(task_table(task, [scores for scores in results if scores.task == task.name]))
    console.print(NOTE)
    for scores in {scores.cache: scores for scores in results}.values():
        print_compressor(scores.cache, scores.shares[-1].compressor_bytes, scores.shares[-1].break_even_tokens)
    rows = [(caches[scores.cache].source if scores.cache != FULL else {}) | scores.summary() for scores in results]
    how = {"prefill_chunk": prefill_chunk, "text": text and text.name, "classes": [path.name for path in classes]}
    write_result(settings, model, how, rows)


def task_table(task: Task, results: list[TaskScores]) -> Table:
    """Two lines for each length and cache: a figure, and below it how sure it is or what it is for comparison."""
    title = f"{task.name}: {task.asks}, {len(results[0].items)} items"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    # nothing is cut off where a terminal is narrow
    table.add_column("length", justify="right", overflow="fold")
    table.add_column("cache", overflow="fold")
    for header in ("EM", "change", "tokens", "NLL\nchange", "bytes"):
        table.add_column(header, justify="right", overflow="fold")
    for scores in results:
        cells = _cells(scores.summary(), scores.cache == FULL)
        table.add_row(f"{scores.num_tokens:,}", *map(escape, [scores.cache, *cells]))
    return table


def _cells(summary: dict, full: bool) -> list[str]:
    low, high = summary["em_interval"]
    em = f"{_short(summary['em'], '.2f')}\n{_short(low, '.2f')}–{_short(high, '.2f')}"
    tokens, nll = _short(summary["token_accuracy"], ".3f"), _short(summary["nll"], ".3f")
    if full:
        return [em, "", tokens, nll, f"{summary['stored_share']:.1%}"]
    low, high = summary["em_change_interval"]
    star = "" if low <= 0 <= high else "*"
    change = f"{_short(summary['em_change'], '+.3f')}\n{_short(low, '+.2f')} to {_short(high, '+.2f')}{star}"
    nll += f"\n{_short(summary['nll_change'], '+.3f')} ± {_short(summary['nll_change_se'], '.3f')}"
    return [em, change, tokens, nll, f"{summary['stored_share']:.1%}\n{own_share(summary['compressed_share'])}"]


def _short(value: float, form: str) -> str:
    """The number without a zero before its point."""
    return format(value, form).replace("0.", ".", 1) if abs(value) < 1 else format(value, form)
