"""`deltakv eval fidelity`: what caches change in the predictions on windows of text files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..evaluation.fidelity import Fidelity, measure_fidelity
from ..evaluation.presses import measure_press_fidelity
from ..evaluation.texts import BUNDLED_TEXT
from ..evaluation.windows import text_windows
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


def run_fidelity(
    settings: EvalSettings, texts: list[Path], num_windows: int, context: int, predict: int, chunks: dict[str, int]
) -> None:
    """Measures, prints the table and writes the JSON."""
    model, tokenizer, caches = prepare(settings, chunks)
    texts = texts or [BUNDLED_TEXT]
    windows = [window for path in texts for window in text_windows(tokenizer, path, context + predict, num_windows)]
    how, made, measured_elsewhere = {"context": context} | chunks, makers(model, caches), presses(caches)
    results = {}
    if made:
        results |= measure_fidelity(model, windows, made, **how, progress=progress(f"windows: {len(windows)}"))
    if measured_elsewhere:
        bar = progress(f"windows of presses: {len(windows)}")
        asked = press_model(settings, model), windows, measured_elsewhere
        results |= measure_press_fidelity(*asked, context=context, progress=bar)
    results = {name: results[name] for name in caches}
    dtype = str(model.dtype).removeprefix("torch.")
    title = f"{context:,} tokens stored, {predict:,} predicted, windows: {len(windows)}, {dtype}"
    console.print(fidelity_table(title, results))
    for name, fidelity in results.items():
        print_compressor(name, fidelity.mean("compressor_bytes"), fidelity.mean("break_even_tokens"))
    sources = [{"text": path.name, "window": number} for path in texts for number in range(num_windows)]
    rows = [
        caches[name].source
        | {"windows": len(windows)}
        | fidelity.summary()
        | {"per_window": [source | asdict(w) for source, w in zip(sources, fidelity.windows, strict=True)]}
        for name, fidelity in results.items()
    ]
    write_result(settings, model, how | {"predict": predict}, rows)


def fidelity_table(title: str, results: dict[str, Fidelity]) -> Table:
    """One line for each cache."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    # only names are folded where a terminal is narrow
    table.add_column("cache", overflow="fold")
    for header in ("KL, nats", "same top\ntoken", "change\nof NLL", "bytes", "compressed\ntokens"):
        table.add_column(header, justify="right", no_wrap=True)
    for name, fidelity in results.items():
        kl = f"{fidelity.mean('kl'):.5f}"
        if len(fidelity.windows) > 1:
            kl += f" ± {fidelity.standard_error('kl'):.5f}"
        stored, compressed = (fidelity.mean(share) for share in ("stored_share", "compressed_share"))
        table.add_row(
            escape(name),
            kl,
            f"{fidelity.mean('top1'):.2%}",
            f"{fidelity.nll_change:+.3%}",
            f"{stored:.1%}",
            own_share(compressed),
        )
    return table
