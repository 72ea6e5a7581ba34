"""`deltakv bench`: what the parts of the cache cost on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Device, check_output, command_line
from .console import console, readable_errors
from .pictures import as_png

bench_app = typer.Typer(help="Measures what the parts of the cache cost here.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Keeps `kernels` a command of its own while it is the only one."""


@bench_app.command()
def kernels(
    num_tokens: Annotated[int, typer.Option(min=2048, help="Tokens of a layer.")] = 32768,
    backend: Annotated[
        str | None, typer.Option(help="reference or triton. Default: what is fastest on the device.")
    ] = None,
    device: Device = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it here.")] = None,
) -> None:
    """Time of every op in the layer shape of Llama-3.1-8B, and its share of what the device could do at most."""
    with readable_errors():
        import torch

        from ..evaluation.kernels import measure_kernels
        from ..evaluation.steps import environment
        from ..files import write_atomically

        for name, path in (("--json", json_file), ("--png", png)):
            check_output(name, path)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        result = measure_kernels(place, num_tokens, backend)
        _print(result)
        result = {"command": command_line(), "environment": environment(place)} | result
        if json_file is not None:
            write_atomically(json_file, (json.dumps(result, indent=2) + "\n").encode())
        if png is not None:
            write_atomically(png, _chart(result))


def _print(result: dict) -> None:
    from rich import box
    from rich.table import Table

    rates = result["rates"]
    title = f"copies {rates['copy_gb_s']:,.0f} GB/s, products {rates['product_tflops']:,.1f} TFLOPS"
    title += f", of bytes {rates['int8_tops']:,.1f} TOPS"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    for header in ("op", "tokens"):
        table.add_column(header, overflow="fold")
    for header in ("ms", "GB", "GFLOP", "roofline\nms", "share"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in result["rows"]:
        numbers = row["ms"], row["bytes"] / 1e9, row["flops"] / 1e9, row["roofline_ms"]
        table.add_row(row["op"], row["what"], *(f"{number:,.3f}" for number in numbers), f"{row['share']:.0%}")
    console.print(table)


def _chart(result: dict) -> bytes:
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['op']}\n{row['what']}" for row in rows]
    axes.barh(names, [row["ms"] for row in rows], color="#62b6cb", label="measured")
    axes.barh(names, [row["roofline_ms"] for row in rows], height=0.3, color="#1b6ca8", label="roofline")
    axes.set_xscale("log")
    axes.set_xlabel(f"milliseconds on {result['environment']['device']}")
    axes.legend(frameon=False)
    return as_png(figure, axes)
