"""`deltakv demo`: one prompt read by the full cache and by `DeltaKVCache`, and what differs afterwards."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.live import Live

from ..attach import attach
from ..cache import DeltaKVCache
from ..compressor.kv_compressor import KVCompressor
from ..config import FREE, DeltaKVConfig
from ..errors import InvalidOptionError
from ..evaluation.model import DEMO_MODEL, load_demo_model, load_model
from ..hf_compat import DynamicCache
from . import figures as fig
from .answers import Answer, logits_after, prefill, stream_both
from .arguments import check_output
from .chart import POINTS, dense_bytes, draw, measure_growth
from .console import EXIT_DISAGREE, console, progress_bar
from .task import Task, own_task, planted_task

DEMO_COMPRESSOR = "smollm2-135m-instruct-10x"


@dataclass(frozen=True)
class DemoSettings:
    """What the command line says; `options` are those of `DeltaKVConfig` that were given."""

    model: str | None
    prompt_file: Path | None
    questions: list[str]
    max_new_tokens: int
    compressor: str | None
    options: dict
    device: str | None
    dtype: str | None
    threads: int | None
    out: Path
    json_file: Path | None


def run_demo(settings: DemoSettings) -> int:
    """Runs the demo and returns its exit code: 1 if the answers of the two caches differ, else 0."""
    _check(settings)
    compressor = _compressor(settings)
    options = DeltaKVConfig.from_options(settings.options, compressor)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = settings.model or DEMO_MODEL
    with progress_bar() as bar:
        model, tokenizer = _load(bar, name, settings)
        task = _task(model, tokenizer, settings, options)
        ids = torch.tensor([task.ids], device=model.device)
        how = settings.options | {"compressor": compressor}
        caches = DynamicCache(config=model.config), DeltaKVCache(model, **how)
        seconds = [
            _prefill(bar, f"{label} reads {len(task.ids):,} tokens", model, cache, ids)
            for label, cache in zip(("full cache", "DeltaKVCache"), caches, strict=True)
        ]
    check_last_block(task, options, caches[1].memory_report().compressed_tokens)
    pairs, texts = _ask(model, tokenizer, caches, task)
    with progress_bar() as bar:
        fidelity = _fidelity(bar, model, caches, task, pairs)
        growing = bar.add_task("memory against context", total=POINTS)
        points = measure_growth(model, ids, how, lambda: bar.advance(growing))
        bar.update(growing, completed=POINTS)
    figures = fig.setting_figures(model, name, task, options, compressor) | {
        "asked": len(task.asks),
        "agree": all(a.ids == b.ids for a, b in pairs),
        "answers": _answers(task, pairs, texts),
        "fidelity": fidelity,
        "memory": fig.memory_figures(points, dense_bytes(caches[0]), caches[1].memory_report()),
        "seconds": {
            which: fig.speed_figures(seconds[i], [pair[i] for pair in pairs])
            for i, which in enumerate(("full", "deltakv"))
        },
    }
    if task.asks[0].expected is not None:
        right = [sum(pair[i] == ask.expected for ask, pair in zip(task.asks, texts, strict=True)) for i in range(2)]
        figures["right"] = dict(zip(("full", "deltakv"), right, strict=True))
    draw(points, name, figures["dtype"], settings.out)
    if settings.json_file:
        settings.json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    _show(figures, settings.out)
    return 0 if figures["agree"] else EXIT_DISAGREE


def _compressor(settings: DemoSettings) -> KVCompressor | None:
    """The one asked for, or the bundled one if nothing says otherwise."""
    name = settings.compressor
    if name is None and settings.model is None and set(settings.options) <= set(FREE):
        name = DEMO_COMPRESSOR
    return KVCompressor.from_pretrained(name) if name else None


def check_last_block(task: Task, options: DeltaKVConfig, compressed: int) -> None:
    """Asserts that the last planted fact lies in the last block that the prompt's reading has compressed."""
    if task.asks[-1].place is None:
        return
    start, stop = task.asks[-1].place
    end = options.num_sink_tokens + compressed
    assert end - options.block_size <= start and stop <= end, (
        f"the last fact stands at tokens {start} to {stop}, outside the last compressed block, which ends at {end}"
    )


def _check(settings: DemoSettings) -> None:
    """What can be refused before the model is loaded."""
    if settings.prompt_file is None and (settings.model or settings.questions):
        given = "--model" if settings.model else "--question"
        raise InvalidOptionError(
            f"`{given}` must come with `--prompt-file`: the planted facts are for the model that comes with the demo."
        )
    check_output("--out", settings.out)
    check_output("--json", settings.json_file)


def _load(bar, name: str, settings: DemoSettings):
    loading = bar.add_task(f"load {name}", total=None)
    # transformers draws bars of its own
    with contextlib.redirect_stderr(io.StringIO()):
        if settings.model is None:
            model, tokenizer = load_demo_model(settings.dtype, settings.device)
        else:
            model, tokenizer = load_model(settings.model, settings.dtype, settings.device)
    bar.update(loading, total=1, completed=1)
    return model, tokenizer


def _task(model, tokenizer, settings: DemoSettings, options: DeltaKVConfig) -> Task:
    if settings.prompt_file is None:
        return planted_task(tokenizer, options)
    return own_task(model, tokenizer, settings.prompt_file, settings.questions, settings.max_new_tokens, options)


def _prefill(bar, label: str, model, cache, ids: torch.Tensor) -> float:
    modules = [probe.module() for probe in attach(model).values()]
    reading = bar.add_task(label, total=len(modules))
    with _calls_counted(modules, lambda: bar.advance(reading)):
        return prefill(model, cache, ids)


@contextlib.contextmanager
def _calls_counted(modules: list, advance: Callable[[], None]) -> Iterator[None]:
    """Calls `advance` whenever one of `modules` has run."""
    handles = [module.register_forward_hook(lambda *_: advance()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ask(model, tokenizer, caches: tuple, task: Task) -> tuple[list[tuple[Answer, Answer]], list[tuple[str, str]]]:
    """Streams all answers, side by side; returns them and their texts."""
    pairs, texts = [], []
    with Live(fig.answer_table(task, texts), console=console, auto_refresh=False) as live:
        for ask in task.asks:
            pairs.append((Answer(), Answer()))
            texts.append(("", ""))
            for answers in stream_both(model, caches, ask.ids, task.max_new_tokens, task.is_end):
                pairs[-1] = tuple(answers)
                texts[-1] = tuple(tokenizer.decode(answer.ids).strip() for answer in answers)
                live.update(fig.answer_table(task, texts), refresh=True)
    if not console.is_terminal:
        # a live table ends its last line only on a terminal
        console.print()
    return pairs, texts


def _fidelity(bar, model, caches: tuple, task: Task, pairs: list) -> dict:
    answers = fig.answer_fidelity(pairs)
    if not task.continuation:
        return fig.fidelity_figures(answers, None, None)
    reading = bar.add_task(f"predict the next {len(task.continuation)} tokens", total=len(caches))
    logits = []
    for cache in caches:
        logits.append(logits_after(model, cache, task.continuation)[:-1])
        bar.advance(reading)
    targets = torch.tensor(task.continuation[1:], device=model.device)
    return fig.fidelity_figures(answers, tuple(logits), targets)


def _answers(task: Task, pairs: list, texts: list[tuple[str, str]]) -> list[dict]:
    names = "full", "deltakv"
    return [
        {"question": ask.title, "expected": ask.expected, "place": ask.place}
        | dict(zip(names, text, strict=True))
        | {"margins": {name: answer.margin for name, answer in zip(names, pair, strict=True)}}
        for ask, pair, text in zip(task.asks, pairs, texts, strict=True)
    ]


def _show(figures: dict, out: Path) -> None:
    console.print(fig.summary_table(figures))
    console.print(fig.memory_table(figures))
    console.print(f"chart: {out}")
    differ = [answer["question"] for answer in figures["answers"] if answer["full"] != answer["deltakv"]]
    if figures["agree"]:
        console.print(f"[bold green]✓[/] DeltaKVCache gives the full cache's answers, {figures['asked']} of them.")
    else:
        console.print("[bold red]✗[/] DeltaKVCache answers otherwise than the full cache:", *differ, sep="\n  ")
