"""How the figures of the documentation look, and how they are written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from deltakv_hf.evaluation.steps import environment
from deltakv_hf.files import write_atomically

FOLDER = Path(__file__).parent
# what is kept as it is, references, residuals, the full cache, what is beside the point
RAW, REFERENCE, RESIDUAL, DENSE, GREY = "#52606d", "#f0b429", "#1b6ca8", "#ba2525", "#9aa5b1"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    matplotlib.rcParams.update({"svg.hashsalt": "deltakv-hf"})
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes) -> None:
    """Two spines and a grid of quiet lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)


def write(figure: Figure, name: str) -> None:
    """Writes `NAME.svg` beside the scripts; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", facecolor="white", metadata={"Date": None})
    lines = content.getvalue().decode().splitlines()
    write_atomically(FOLDER / f"{name}.svg", "\n".join(line.rstrip() for line in lines).encode() + b"\n")


def write_numbers(name: str, device, dtype: str, figures: dict) -> None:
    """Writes `NAME.json`: what was drawn, the command and where it ran."""
    content = {"command": f"python docs/figures/{name}.py", "environment": environment(device, dtype), **figures}
    write_atomically(FOLDER / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
