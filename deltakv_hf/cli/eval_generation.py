"""`deltakv eval generation`: what caches write by themselves, read by the full cache."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..evaluation.candidates import FULL_CACHE
from ..evaluation.measurements import Bench, GenerationMeasurement
from .console import console
from .eval_setup import EvalSettings, prepare, progress, write_result

NOTE = (
    "NLL: of what the cache wrote, under the full cache; full: of what the full cache wrote behind the same prompts. "
    "Agree: tokens before the first that differs from the full cache's. Repeated: runs of four that came before. "
    "Bytes: of a dense cache in bfloat16, what was written included."
)


def run_generation(
    settings: EvalSettings, texts: list[Path], context: int, new_tokens: int, prompts: int, seed: int | None
) -> None:
    """Measures, prints the table and writes the JSON."""
    model, tokenizer, caches = prepare(settings)
    bench = Bench(model, tokenizer, texts)
    measurement = GenerationMeasurement("generation", context, new_tokens, prompts, seed)
    results = {}
    for cache in progress("caches")([FULL_CACHE, *caches.values()]):
        figures = measurement.run(bench, cache)
        results[cache.name] = cache.source | bench.bytes16.shares(cache, measurement.held_tokens) | figures
    how = "greedy" if seed is None else f"drawn with seed {seed}"
    console.print(_table(f"{new_tokens:,} tokens behind {context:,}, prompts: {prompts}, {how}", results))
    console.print(NOTE)
    told = {"context": context, "new_tokens": new_tokens, "prompts": prompts, "seed": seed, "texts": bench.checksums()}
    write_result(settings, model, told, list(results.values()))


def _table(title: str, results: dict[str, dict]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("cache", overflow="fold")
    for header in ("NLL", "full", "agree", "repeated", "bytes"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in results.items():
        figures = f"{row['nll']:.3f}", f"{row['full_nll']:.3f}", f"{row['agreement']:.0f}", f"{row['repetition']:.1%}"
        table.add_row(escape(name), *figures, f"{row['stored_share_16bit']:.1%}")
    return table
