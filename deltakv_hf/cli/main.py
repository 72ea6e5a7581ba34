"""`deltakv`, the command line. Each command's work is in its own module, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError as error:
    raise SystemExit("the command line needs more packages: pip install 'deltakv-hf[demo]'") from error

from ..errors import InvalidOptionError
from .arguments import Device, Dtype, TextLicense, Threads, given, refuse_given
from .bench import bench_app
from .console import readable_errors
from .eval import eval_app

app = typer.Typer(
    help="DeltaKVCache: a small, fast and faithful KV cache for Hugging Face transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Nbits = Annotated[int | None, typer.Option(help="Bits per stored residual number: 2, 4 (default) or 8.")]
ReferenceNbits = Annotated[int | None, typer.Option(help="Bits per stored number of a reference: 2, 4 or 8 (default).")]
ReferenceStride = Annotated[int | None, typer.Option(help="One token in so many is a reference. Default: 32.")]
RecentWindow = Annotated[
    int | None, typer.Option(help="Newest tokens that stay as they are. Default: 128, 64 with a compressor.")
]
SinkTokens = Annotated[int | None, typer.Option(help="First tokens that stay as they are. Default: 4.")]

app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


@app.callback()
def deltakv() -> None:
    """Makes the commands sub-commands."""


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Your model: id on the Hub or folder.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Your long text, UTF-8.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="Asked after your text; may be repeated. Without it the text is continued.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer after your text.")] = 64,
    compressor: Annotated[
        str | None,
        typer.Option(
            help="Compressor for the model: id on the Hub, folder or bundled name. Default: the bundled one at a tenth "
            "for the demo's own model, none with --nbits, --reference-nbits or --reference-stride."
        ),
    ] = None,
    nbits: Nbits = None,
    reference_nbits: ReferenceNbits = None,
    reference_stride: ReferenceStride = None,
    recent_window: RecentWindow = None,
    num_sink_tokens: SinkTokens = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    out: Annotated[Path, typer.Option(help="The chart, PNG.")] = Path("deltakv-demo.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Reads one long prompt with the full cache and with DeltaKVCache, and compares answers, bytes and seconds.

    Without --prompt-file: SmolLM2-135M-Instruct reads a novel with facts planted in it. Exit code 1 if answers differ.
    """
    with readable_errors():
        from .demo import DemoSettings, run_demo

        options = {
            "nbits": nbits,
            "reference_nbits": reference_nbits,
            "reference_stride": reference_stride,
            "recent_window": recent_window,
            "num_sink_tokens": num_sink_tokens,
        }
        asked = prompt_file, question or [], max_new_tokens
        settings = DemoSettings(model, *asked, compressor, given(options), device, dtype, threads, out, json_file)
        code = run_demo(settings)
    raise typer.Exit(code)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Id on the Hub, folder, or `demo` for SmolLM2-135M-Instruct.")],
    nbits: Nbits = None,
    reference_nbits: ReferenceNbits = None,
    reference_stride: ReferenceStride = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Instead: read a batch with a JointEncodedCache whose similar blocks share.")
    ] = False,
    max_relative_error: Annotated[
        float | None,
        typer.Option(help="With --joint: largest error of a block. Default: 0.4, none with --target-ratio."),
    ] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="With --joint: share of the blocks that may stay, by the least error for it.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="With --joint, who shares: all (default), batch, same_index or intra.")
    ] = None,
    rope: Annotated[
        str | None, typer.Option(help="With --joint, how keys are compared: stripped (default) or rotated.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="With --joint: tokens of a block. Default: 16.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --joint: a text file, UTF-8, of one row; a line with a form feed separates rows. May be "
            "repeated. Default: passages of the bundled text, in another order in each row."
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="With --joint: rows of the bundled text. Default: 4.")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="With --joint: most tokens of a row. Default: 1024.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="With --joint: draw it here.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Shows what the cache does with each layer of a model: kind, RoPE, bytes per token.

    With --joint: how many blocks similar ones leave in each layer, predicted and achieved, and at what error.
    """
    with readable_errors():
        options = {"nbits": nbits, "reference_nbits": reference_nbits, "reference_stride": reference_stride}
        fusing = {"max_relative_error": max_relative_error, "target_ratio": target_ratio, "scope": scope, "rope": rope}
        fusing["block_size"] = block_size
        batch = {"text": text, "rows": rows, "length": length, "png": png}
        if joint:
            from .inspect_joint import JointSettings, run_inspect_joint

            refuse_given(options, "be left out with `--joint`, whose blocks are stored as they are")
            where = text or [], rows, length, png, device, dtype
            run_inspect_joint(JointSettings(model, given(fusing), *where), as_json)
        else:
            from .inspect import run_inspect

            refuse_given(fusing | batch, "come with `--joint` (add it, or leave the other out)")
            run_inspect(model, given(options), device, dtype, as_json)


@app.command("list")
def list_compressors(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Shows the compressors on this machine: those that come with the package and those that were downloaded."""
    with readable_errors():
        from .list import run_list

        run_list(as_json)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Id on the Hub, folder, or `demo` for SmolLM2-135M-Instruct.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A text file, UTF-8; a line with a form feed separates documents. May be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="The compressor's folder.")],
    compressor: Annotated[
        str | None,
        typer.Option(
            help="Where to begin: a folder, a bundled name or an id on the Hub. Not needed with a latent width."
        ),
    ] = None,
    latent_width: Annotated[
        int | None,
        typer.Option(help="Train a learned compressor with so many numbers a latent; a calibrated one is its metric."),
    ] = None,
    latent_nbits: Annotated[
        int | None, typer.Option(help="Bits of its stored numbers: 2, 4, 8, or 0 for bfloat16. Default: 0.")
    ] = None,
    down: Annotated[
        str | None, typer.Option(help="Its network: mlp_swiglu, the paper's, or linear. Default: mlp_swiglu.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="kl, or paper: next token and squared errors. Default: kl.")] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Steps of the optimiser; 0 leaves the beginning as it is. Default: 400.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows read at once. Default: 4.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches of a step, one after the other. Default: 1.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window. Default: 4096.")] = None,
    num_tokens: Annotated[int | None, typer.Option(help="Tokens of text to learn from. Default: 2000000.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: 0.05 for a calibrated compressor, 0.00006 for a learned one.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between two measurements. Default: 50.")] = None,
    patience: Annotated[int | None, typer.Option(help="Measurements without a better one. Default: 4.")] = None,
    measured_windows: Annotated[int | None, typer.Option(help="Windows held out. Default: 4 to 9.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random choice. Default: 0.")] = None,
    text_license: TextLicense = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Trains a compressor through its frozen model; its bytes stay as they are. Best on a GPU, in float32.

    A run that is broken off goes on from the last measurement when the same command is run again.
    """
    with readable_errors():
        from .train import TrainSettings, run_train

        options = {
            "loss": loss,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "window": window,
            "num_tokens": num_tokens,
            "learning_rate": learning_rate,
            "eval_every": eval_every,
            "patience": patience,
            "measured_windows": measured_windows,
            "gradient_checkpointing": gradient_checkpointing,
            "seed": seed,
        }
        form = given({"latent_nbits": latent_nbits, "down": down})
        if latent_width is not None:
            from ..training import Form

            options["form"] = Form(latent_width, **form)
        elif form:
            raise InvalidOptionError(
                f"`--latent-width` must be given with `--{next(iter(form)).replace('_', '-')}`, which is about a "
                "learned compressor that begins here. Add it, or leave the other out."
            )
        run_train(TrainSettings(model, compressor, text, out, given(options), text_license or [], device, dtype))


@app.command()
def convert(
    compressor: Annotated[str, typer.Argument(help="Id on the Hub or folder of a learned compressor.")],
    out: Annotated[Path, typer.Option(help="The compressor's folder.")],
    latent_nbits: Annotated[
        int | None, typer.Option(help="Bits of a stored latent number: 2, 4, 8, or 0 for bfloat16. Default: as it is.")
    ] = None,
    latent_group_size: Annotated[
        int | None, typer.Option(help="Numbers of a latent that share a scale and a minimum. Default: 32.")
    ] = None,
) -> None:
    """Turns a learned compressor into a folder of this package: checked, with a model card, in another latent width."""
    with readable_errors():
        from .convert import run_convert

        run_convert(compressor, out, latent_nbits, latent_group_size)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Id on the Hub, folder, or `demo` for SmolLM2-135M-Instruct.")],
    text: Annotated[
        list[Path],
        typer.Option(help="A text file, UTF-8; a line with a form feed separates documents. May be repeated."),
    ],
    out: Annotated[Path, typer.Option(help="The compressor's folder.")],
    ratio: Annotated[
        float | None, typer.Option(help="Bytes of a 16-bit cache over compressed ones. Default: 10.")
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Instead: largest KL to the full cache, nats a token.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens of text to learn from.")] = 100_000,
    window: Annotated[int, typer.Option(help="Tokens of a window; the last quarter is predicted.")] = 4096,
    reference_stride: Annotated[
        int | None, typer.Option(help="One token in so many is a reference; 1: none is. Default: 8.")
    ] = None,
    heads_per_group: Annotated[
        int | None, typer.Option(help="Heads coded jointly, without references. Default: all of a layer.")
    ] = None,
    sensitivity_windows: Annotated[int, typer.Option(help="Windows whose predictions are differentiated.")] = 12,
    draws: Annotated[int, typer.Option(help="Answers drawn from each of these predictions.")] = 1,
    measured_windows: Annotated[
        int | None, typer.Option(help="Windows held out for the report; 0: none. Default: one for each text, 4 to 9.")
    ] = None,
    select_layers: Annotated[
        int | None, typer.Option(help='Filter layers to choose, for caches with `selection="filter_layers"`.')
    ] = None,
    keep_statistics: Annotated[bool, typer.Option(help="Store second moments in the folder.")] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    workspace: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was read, for other ratios. Default: none, once done.")
    ] = None,
    text_license: TextLicense = None,
    license_: Annotated[str | None, typer.Option("--license", help="Of the compressor, for the model card.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Fits a compressor to a model: minutes on a GPU, a quarter of an hour for a small model on a CPU.

    A run that is broken off goes on where it stopped when the same command is run again.
    """
    with readable_errors():
        from .calibrate import CalibrateSettings, run_calibrate

        options = {
            "ratio": ratio,
            "target_kl": target_kl,
            "num_tokens": num_tokens,
            "window": window,
            "reference_stride": reference_stride,
            "heads_per_group": heads_per_group,
            "sensitivity_windows": sensitivity_windows,
            "draws": draws,
            "measured_windows": measured_windows,
            "select_layers": select_layers,
            "keep_statistics": keep_statistics,
            "seed": seed,
        }
        places = device, dtype, threads
        run_calibrate(CalibrateSettings(model, text, out, workspace, options, text_license or [], license_, *places))
