"""`deltakv calibrate`: fits a compressor to a model and writes its folder with a report and pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ..calibration.driver import calibrate, check_goal
from ..calibration.report import Report
from ..calibration.texts import read_documents
from ..compressor.kv_compressor import KVCompressor
from ..evaluation.model import load_by_name
from .arguments import command_line
from .console import console, progress_bar, size, stages
from .folders import check_out, check_workspace
from .licenses import licenses_of, note_licenses
from .pictures import as_png


@dataclass(frozen=True)
class CalibrateSettings:
    """What the command line says; `options` go to `calibrate`."""

    model: str
    text: list[Path]
    out: Path
    workspace: Path | None
    options: dict
    licenses: list[str]
    license: str | None
    device: str | None
    dtype: str | None
    threads: int | None


def run_calibrate(settings: CalibrateSettings) -> None:
    """Runs the command; without a workspace, what was read stays beside `out` until the folder is written."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    check_goal(settings.options["ratio"], settings.options["target_kl"])
    check_out(settings.out)
    check_workspace(settings.workspace, settings.out)
    texts = read_documents(settings.text)
    licenses = licenses_of(settings.licenses, list(texts))
    model, tokenizer = load_by_name(settings.model, settings.dtype, settings.device)
    out = settings.out.resolve()
    workspace = settings.workspace or out.with_name(f".{out.name[:200]}.calibration")
    with progress_bar() as bar:
        compressor = calibrate(
            model,
            texts,
            tokenizer=tokenizer,
            workspace=workspace,
            progress=stages(bar),
            **settings.options,
        )
    calibration = compressor.config["calibration"]
    calibration["command"] = command_line()
    note_licenses(calibration["text"], licenses)
    if settings.license:
        compressor.config["license"] = settings.license
    report = compressor.report
    files = {"report.json": json.dumps(report.as_dict(), indent=2).encode(), **charts(report)}
    compressor.save_pretrained(settings.out, files)
    if settings.workspace is None:
        shutil.rmtree(workspace, ignore_errors=True)
    _print(compressor, settings.out)


def _print(compressor: KVCompressor, out: Path) -> None:
    report, seconds = compressor.report, compressor.config["calibration"]["seconds"]
    table = Table(title=f"compressor in {out}", show_header=False)
    rows = [
        (
            "compressed tokens",
            f"{report.share:.2%} of a 16-bit cache, {compressor.bytes_per_token():.0f} bytes a token",
        ),
        ("layers with references", f"{sum(layer.uses_references for layer in report.layers)} of {len(report.layers)}"),
        ("the compressor itself", size(compressor.nbytes)),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())),
    ]
    if "filter_layers" in compressor.config:
        rows.append(("filter layers", ", ".join(map(str, compressor.config["filter_layers"]))))
    for row in compressor.config.get("measured", []):
        rows += [("KL to the full cache", row["kl"]), ("top-1", row["top1"]), ("ΔNLL", row["delta_nll"])]
        rows.append(("measured on", f"held-out windows: {row['held-out windows']}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def charts(report: Report) -> dict[str, bytes]:
    """Pictures by file name: bytes of each layer, and the curve of rate and distortion."""
    return {"layers.png": _layer_chart(report), "rate-distortion.png": _curve_chart(report)}


def _layer_chart(report: Report) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = [layer.layer_idx for layer in report.layers]
    colors = ["#2f7ed8" if layer.uses_references else "#9fb3c8" for layer in report.layers]
    axes.bar(numbers, [layer.num_bytes for layer in report.layers], color=colors, width=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel("bytes of a compressed token")
    dense = report.dense_bytes / len(report.layers)
    axes.set_title(
        f"{report.share:.1%} of a 16-bit cache ({dense:.0f} bytes a token and layer); layers with references in blue",
        loc="left",
        fontsize=10,
    )
    return as_png(figure, axes)


def _curve_chart(report: Report) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    shares, losses = zip(*((100 * share, kl) for share, kl in report.curve), strict=True)
    axes.plot(shares, losses, color="#2f7ed8", marker="o", markersize=4, label="predicted, no references")
    predicted = sum(layer.predicted_kl for layer in report.layers)
    axes.plot([100 * report.share], [predicted], color="#102a43", marker="s", linestyle="", label="predicted, this one")
    if report.fidelity is not None:
        kl, error = report.fidelity.mean("kl"), report.fidelity.standard_error("kl")
        axes.errorbar([100 * report.share], [kl], [error], color="#ba2525", marker="D", linestyle="", label="measured")
    axes.set_yscale("log")
    axes.set_xlabel("compressed tokens, % of a 16-bit cache")
    axes.set_ylabel("KL to the full cache, nats")
    axes.legend(frameon=False)
    return as_png(figure, axes)
