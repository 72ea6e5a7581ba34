"""`deltakv eval`: the commands that measure caches against the full cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Device, Dtype, Threads
from .console import readable_errors

eval_app = typer.Typer(help="Measures caches against the full cache.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Id on the Hub, folder, or `demo` for SmolLM2-135M-Instruct.")]
Options = Annotated[
    list[str] | None,
    typer.Option(
        help='A cache with these options, as JSON: {"nbits": 8}; may be repeated. {} has the defaults; "compressor" '
        "names one."
    ),
]
Compressor = Annotated[
    list[str] | None,
    typer.Option(help="A cache with this learned compressor: id on the Hub, folder or bundled name; may be repeated."),
]
Peer = Annotated[
    list[str] | None,
    typer.Option(
        help="A cache of others: kivi4, kivi4-g64, kivi2, quanto4, quanto2, hqq4 or hqq2; or a press of kvpress with "
        "the share that it drops, like snapkv-0.5: snapkv, chunkkv, expected_attention, kvzip, keydiff, streaming_llm, "
        "think. May be repeated.",
    ),
]
Chunk = Annotated[int, typer.Option(min=0, metavar="N", help="Feed the context N tokens at a time; 0 is at once.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")]


@eval_app.command()
def fidelity(
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, documents separated by form feeds. Default: the bundled text."),
    ] = None,
    model: Model = "demo",
    windows: Annotated[int, typer.Option(min=1, help="Windows of each file.")] = 2,
    context: Annotated[int, typer.Option(min=1, help="Tokens stored before predicting.")] = 3072,
    predict: Annotated[int, typer.Option(min=2, help="Tokens predicted after them.")] = 1024,
    prefill_chunk: Chunk = 0,
    predict_chunk: Annotated[
        int, typer.Option(min=0, metavar="N", help="Feed the tokens predicted N at a time; 0 is at once.")
    ] = 0,
    options: Options = None,
    compressor: Compressor = None,
    peer: Peer = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16; in 16 bits the full cache differs from itself too.")
    ] = "float32",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """What a cache changes in the predictions on plain text: KL, same top token, loss; and its share of the bytes."""
    with readable_errors():
        from .eval_fidelity import run_fidelity
        from .eval_setup import EvalSettings

        settings = EvalSettings(model, options or [], compressor or [], peer or [], device, dtype, threads, json_file)
        chunks = {"prefill_chunk": prefill_chunk, "predict_chunk": predict_chunk}
        run_fidelity(settings, text or [], windows, context, predict, chunks)


@eval_app.command()
def tasks(
    task: Annotated[
        list[str] | None,
        typer.Argument(help="passkey, niah4, variable_tracking, cloze, copy, few_shot. Default: all."),
    ] = None,
    model: Model = "demo",
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a context; may be repeated. Default: 1024.")
    ] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of each task and length.")] = 10,
    text: Annotated[Path | None, typer.Option(help="The haystack. Default: the bundled text.")] = None,
    classes: Annotated[
        list[Path] | None, typer.Option(help="A class of few_shot: a text file; two or more. Default: made up.")
    ] = None,
    prefill_chunk: Chunk = 0,
    options: Options = None,
    compressor: Compressor = None,
    peer: Peer = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """What a cache loses of facts in a long context: questions whose answers stand only there, asked afterwards."""
    with readable_errors():
        from .eval_setup import EvalSettings
        from .eval_tasks import run_eval_tasks

        settings = EvalSettings(model, options or [], compressor or [], peer or [], device, dtype, threads, json_file)
        run_eval_tasks(settings, task or [], length or [1024], contexts, text, classes or [], prefill_chunk)


@eval_app.command()
def generation(
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files to cut prompts from, in turn. Default: the bundled text."),
    ] = None,
    model: Model = "demo",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written behind each.")] = 500,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, read and continued as one batch.")] = 4,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw tokens, with the same draws for all. Default: the most likely one.")
    ] = None,
    options: Options = None,
    compressor: Compressor = None,
    peer: Peer = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """What caches write, compressing it on its way: how likely the full cache finds it, and what is repeated."""
    with readable_errors():
        from .eval_generation import run_generation
        from .eval_setup import EvalSettings

        settings = EvalSettings(model, options or [], compressor or [], peer or [], device, dtype, threads, json_file)
        run_generation(settings, text or [], context, new_tokens, prompts, seed)


@eval_app.command("all")
def all_(
    out: Annotated[Path, typer.Option(help="Folder of the results, a JSON file for each cache.")],
    text: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text files of a domain each, documents separated by form feeds. Default: the bundled text."
        ),
    ] = None,
    model: Model = "demo",
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="All measurements, for a GPU, or short ones: minutes on two CPU cores."),
    ] = False,
    options: Options = None,
    compressor: Compressor = None,
    peer: Peer = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Predictions are compared in it; bytes are those of 16 bits.")] = "float32",
    threads: Threads = None,
) -> None:
    """Fidelity, a long generation, free generation and tasks of every cache, each stored as soon as it is there.

    A run that is broken off goes on when the same command is run again. Caches may be added to a folder by later runs,
    or be measured side by side by several at once. `deltakv eval results` makes tables and pictures of it.
    """
    with readable_errors():
        from .eval_all import run_all
        from .eval_setup import EvalSettings

        settings = EvalSettings(model, options or [], compressor or [], peer or [], device, dtype, threads, None)
        run_all(settings, out, full, text or [])


@eval_app.command()
def results(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `deltakv eval all --out` has left.")],
    out: Annotated[Path, typer.Option(help="The page, Markdown; pictures go to a folder of its name beside it.")],
) -> None:
    """Tables, pictures and who wins, made of stored results alone."""
    with readable_errors():
        from .eval_results import run_results

        run_results(folder, out)


@eval_app.command()
def benchmark(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help="longbench, ruler, scbench, aime or gsm8k.")],
    file: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="Data as published, JSON Lines; you get it yourself.")
    ],
    model: Model = "demo",
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each file. Default: all.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Of ruler, scbench and aime files. Default: what the file is called.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON of prompts by dataset, as dataset2prompt.json of LongBench.")
    ] = None,
    max_lengths: Annotated[
        str | None,
        typer.Option(metavar="N|FILE", help="Most tokens of an answer, or JSON of them, as dataset2maxlen.json."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the model's chat template around prompts.")] = False,
    mode: Annotated[
        str, typer.Option(help="Of scbench: multi-turn (questions behind each other) or multi-request (each alone).")
    ] = "multi-turn",
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=2, help="Cut the middle out of longer prompts. Default: what the model can take.")
    ] = None,
    options: Options = None,
    compressor: Compressor = None,
    peer: Peer = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every answer here when it is there; a later run goes on.")
    ] = None,
) -> None:
    """A published benchmark: LongBench, RULER, SCBench, AIME or GSM8K, scored as it defines."""
    with readable_errors():
        from .eval_benchmark import BenchmarkSettings, run_eval_benchmark
        from .eval_setup import EvalSettings

        settings = EvalSettings(model, options or [], compressor or [], peer or [], device, dtype, threads, json_file)
        places = prompts, max_lengths, chat, mode, max_prompt_tokens
        run_eval_benchmark(settings, BenchmarkSettings(format_name, file, limit, task, *places))


@eval_app.command()
def peers(
    wheels: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Install from the wheels in this folder, without a network."),
    ] = None,
) -> None:
    """Makes the environment for presses of kvpress, which wants an older transformers, and says which presses run.

    Its packages go into the user's cache folder and come before those of this environment, which stays as it is. One
    that is there is only checked. Exit code 1 if a press does not run.
    """
    with readable_errors():
        from .eval_peers import run_eval_peers

        code = run_eval_peers(wheels)
    raise typer.Exit(code)
