"""`deltakv train`: trains a compressor through its model and writes the better one with a picture of how it went."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from rich.table import Table

from ..calibration.texts import read_documents
from ..compressor.kv_compressor import KVCompressor
from ..evaluation.model import load_by_name
from ..training import History, train
from .arguments import command_line
from .console import console, progress_bar, stages
from .folders import check_out
from .licenses import licenses_of, note_licenses
from .pictures import as_png


@dataclass(frozen=True)
class TrainSettings:
    """What the command line says; `options` go to `train`."""

    model: str
    compressor: str | None
    text: list[Path]
    out: Path
    options: dict
    licenses: list[str]
    device: str | None
    dtype: str | None


def run_train(settings: TrainSettings) -> None:
    """Runs the command; the state stays beside `out` until the folder is written."""
    check_out(settings.out)
    texts = read_documents(settings.text)
    licenses = licenses_of(settings.licenses, list(texts))
    compressor = settings.compressor and KVCompressor.from_pretrained(settings.compressor)
    state = PartialState()
    device = str(state.device) if state.num_processes > 1 else settings.device
    model, tokenizer = load_by_name(settings.model, settings.dtype, device)
    out = settings.out.resolve()
    workspace = out.with_name(f".{out.name[:200]}.training")
    with progress_bar() as bar:
        trained = train(
            model,
            texts,
            compressor,
            tokenizer=tokenizer,
            workspace=workspace,
            progress=stages(bar),
            **settings.options,
        )
    if not state.is_main_process:
        return
    note = trained.config["training"]
    note["command"] = command_line()
    note_licenses(note["text"], licenses)
    history = trained.history
    files = {
        "training.json": json.dumps(asdict(history), indent=2).encode(),
        "training.png": _chart(history),
    }
    trained.save_pretrained(settings.out, files)
    workspace.unlink(missing_ok=True)
    _print(trained, settings.out)


def _print(compressor: KVCompressor, out: Path) -> None:
    history = compressor.history
    before, after = history.looks[0][1], history.best_kl
    table = Table(title=f"compressor in {out}", show_header=False)
    table.add_row("held-out KL before", f"{before:.5f}")
    table.add_row("held-out KL after", f"{after:.5f} ({after / before - 1:+.0%}), step {history.best_step}")
    if history.stopped:
        table.add_row("stopped", history.stopped)
    for row in compressor.config["measured"]:
        table.add_row("measured with a cache", f"KL {row['kl']}, ΔNLL {row['delta_nll']}")
        table.add_row("bytes", f"compressed tokens {row['compressed tokens']}, whole cache {row['whole cache']}")
    console.print(table)


def _chart(history: History) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    losses = torch.tensor(history.losses)
    if len(losses):
        axes.plot(range(1, len(losses) + 1), losses, color="#9fb3c8", linewidth=0.8, label="loss of a step")
    axes.plot(*zip(*history.looks, strict=True), color="#ba2525", marker="o", markersize=4, label="held-out KL, nats")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend(frameon=False)
    return as_png(figure, axes)
