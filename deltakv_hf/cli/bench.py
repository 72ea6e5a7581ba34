"""`deltakv bench`: what the parts of the cache cost on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Device, Dtype, check_output, command_line
from .console import console, readable_errors
from .pictures import as_png

bench_app = typer.Typer(help="Measures what the parts of the cache cost here.", no_args_is_help=True)


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


@bench_app.command()
def generate(
    model: Annotated[str | None, typer.Option(help="`demo`, a model id or a folder.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead: 8b or tiny.")] = None,
    compressor: Annotated[
        str | None, typer.Option(help="Of our caches, with --model: bundled name, folder or id. A --shape has its own.")
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="dynamic, static, quantized, deltakv, deltakv coarse, deltakv filter; commas between.")
    ] = "dynamic,static,deltakv coarse",
    contexts: Annotated[str, typer.Option(help="Tokens held by each row of a batch, commas between.")] = "8192",
    batches: Annotated[str, typer.Option(help="Rows, commas between.")] = "1",
    prefill: Annotated[bool, typer.Option(help="Read the prompt, and time that, instead of filling caches.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text to read, with --model. Default: random tokens.")] = None,
    ragged: Annotated[bool, typer.Option(help="Rows of a batch from a share to the whole context, padded.")] = False,
    released: Annotated[int, typer.Option(help="With our caches: rows, the longest, that have ended.")] = 0,
    filter_layers: Annotated[str | None, typer.Option(help="Of deltakv filter: their numbers.")] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.1, help="Use no more of the GPU.")] = None,
    backend: Annotated[str | None, typer.Option(help="That compiles. Default: inductor, on a GPU.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every row here when it is done; rows in it are not run again.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw tokens a second here.")] = None,
) -> None:
    """Speed and memory of `generate` with our cache and with the host's."""
    with readable_errors():
        import torch

        from ..compressor.kv_compressor import KVCompressor
        from ..errors import InvalidOptionError
        from ..evaluation.model import load_by_name, pick_device, pick_dtype
        from ..evaluation.shapes import SHAPES, random_compressor, shape_model
        from ..evaluation.steps import environment
        from ..evaluation.texts import read_text
        from ..files import write_atomically
        from . import bench_generate

        for name, path in (("--json", json_file), ("--png", png)):
            check_output(name, path)
        chosen = {"prefill": prefill, "backend": backend, "ragged": ragged, "released": released}
        rows = bench_generate.wanted_rows(kinds, contexts, batches, **chosen)
        if (model is None) == (shape is None) or shape not in (None, *SHAPES):
            raise InvalidOptionError(f"`--shape` must be {' or '.join(SHAPES)}, or `--model` be given, got {shape!r}.")
        if text is not None and model is None:
            raise InvalidOptionError(f"`--text` must be left out with `--shape`, got {str(text)!r}: give `--model`.")
        options = {}
        if filter_layers is not None:
            options["filter_layers"] = tuple(bench_generate.numbers("--filter-layers", filter_layers, low=0))
        place = pick_device(device)
        kind = pick_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
        if memory_gb is not None and place.type == "cuda":
            total = torch.cuda.get_device_properties(place).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total), place.index)
        ids = None
        if shape is not None:
            loaded = shape_model(shape, place, kind)
            coder = random_compressor(loaded)
        else:
            loaded, tokenizer = load_by_name(model, kind, place)
            ids = None if text is None else tokenizer(read_text(text, "--text"), return_tensors="pt").input_ids[0]
            coder = None if compressor is None else KVCompressor.from_pretrained(compressor)
        made = bench_generate.measure(loaded, rows, coder, options, environment(place, kind), json_file, ids)
        bench_generate.show(made)
        if png is not None:
            write_atomically(png, bench_generate.chart(made))


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
