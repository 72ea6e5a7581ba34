"""`deltakv calibrate`: fits a compressor to a model and writes its folder with a report and pictures."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from ..calibration.driver import calibrate, check_goal
from ..calibration.report import Report
from ..calibration.texts import read_documents
from ..compressor.folder import check_place
from ..compressor.kv_compressor import KVCompressor
from ..errors import InvalidOptionError
from ..evaluation.model import load_by_name
from .arguments import command_line
from .console import console, progress_bar, size


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
    _check_workspace(settings.workspace, settings.out)
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


def check_out(out: Path) -> None:
    """Refuses at once what would be refused once the compressor is made."""
    try:
        check_place(out, "--out")
        # the folder is made beside the place that it takes, and its own parents with it
        above = next(folder for folder in out.resolve().parents if folder.exists())
    except OSError as error:
        raise InvalidOptionError(
            f"`--out` must name a folder that can be made, got {str(out)!r}: {error.strerror}. Choose another place."
        ) from error
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "may not be written to" if above.is_dir() else "is a file"
        raise InvalidOptionError(
            f"`--out` must name a folder that can be made, got {str(out)!r}: {str(above)!r} {why}. Choose another "
            "place."
        )


def _check_workspace(workspace: Path | None, out: Path) -> None:
    """Refuses a workspace that `out` could not be written beside: each of them takes all of its folder."""
    if workspace is None:
        return
    one, other = workspace.resolve(), out.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise InvalidOptionError(
            f"`--workspace` must be a folder apart from `--out`, got {str(workspace)!r} and {str(out)!r}: choose one "
            "beside it."
        )


def stages(bar) -> Callable[[str, int], Callable[[], None]]:
    """What a calibration or a training tells of its stages, as bars."""

    def stage(name: str, steps: int) -> Callable[[], None]:
        if not console.is_terminal:
            # a file shows a bar only when all is done
            console.print(f"{name}, {steps} steps")
        task = bar.add_task(name, total=steps)
        return lambda: bar.advance(task)

    return stage


def licenses_of(entries: list[str], texts: list[str]) -> dict[str, str]:
    """Licences by text, of entries `FILE=LICENCE`; a file may be named with its ending or without."""
    licenses = {}
    for entry in entries:
        name, equals, licence = entry.partition("=")
        named = [text for text in texts if name in (text, Path(text).stem)]
        if not equals or not licence or not named:
            raise InvalidOptionError(
                f"`--text-license` must be FILE=LICENCE of one of {', '.join(texts)}, got {entry!r}."
            )
        licenses |= dict.fromkeys(named, licence)
    return licenses


def note_licenses(sources: list[dict[str, str]], licenses: dict[str, str]) -> None:
    """Writes what is known of licences into a config's sources of text."""
    for source in sources:
        source["license"] = licenses.get(source["source"], source["license"])


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


def as_png(figure, axes) -> bytes:
    """A figure with one pair of axes, as all of this package look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()
