"""`deltakv eval benchmark`: published benchmarks with caches beside the full cache; what was answered stays."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import InvalidOptionError
from ..evaluation.benchmarks import DatasetScore, ItemResult, load_benchmark, run_benchmark, summarize
from ..evaluation.runner import FULL
from ..evaluation.steps import environment
from ..files import write_atomically
from .arguments import command_line
from .console import console
from .eval_setup import EvalSettings, own_share, prepare, print_compressor, progress

NOTE = (
    "Score: 0 to 100, as the benchmark defines it. Change: against the full cache, below it the 95 % interval of items "
    "drawn again (* where it leaves out 0: beyond noise; no width where all items changed alike). Bytes: "
    "whole cache behind the answer, below it compressed tokens alone."
)


@dataclass(frozen=True)
class BenchmarkSettings:
    """What the command line says of the benchmark; see `load_benchmark` and `run_benchmark`."""

    format_name: str
    files: list[Path]
    limit: int | None
    task: str | None
    prompts: Path | None
    max_lengths: str | None
    chat: bool
    mode: str
    max_prompt_tokens: int | None

    def load(self) -> list:
        """The items."""
        lengths = self.max_lengths
        lengths = int(lengths) if lengths is not None and lengths.isdecimal() else lengths and Path(lengths)
        chosen = {"limit": self.limit, "task": self.task, "prompts": self.prompts, "max_lengths": lengths}
        return load_benchmark(self.format_name, self.files, **chosen)

    def how(self) -> dict:
        """What is the same for all results of a file; prompts and lengths are in each item's digest."""
        return {"chat": self.chat, "mode": self.mode, "max_prompt_tokens": self.max_prompt_tokens}


class ResultFile:
    """The file of `--json`: results of items as they come, and the scores when all are there."""

    def __init__(self, path: Path | None, head: dict, same: dict):
        """Begins a file with `head` and `same`, or goes on with one of the same `same`."""
        self.path, self.content = path, head | same | {"results": [], "items": []}
        if path is not None and path.exists():
            self.content["items"] = _read(path, same)

    @property
    def items(self) -> list[ItemResult]:
        """The results in it."""
        return [ItemResult(**item) for item in self.content["items"]]

    def keep(self, result: ItemResult) -> None:
        """Adds a result."""
        self.content["items"].append(asdict(result))
        self.write()

    def write(self) -> None:
        """Writes all of it, whole or not at all."""
        if self.path is not None:
            write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def run_eval_benchmark(settings: EvalSettings, benchmark: BenchmarkSettings) -> None:
    """Answers what `--json` does not hold yet, prints the table and writes the scores."""
    items = benchmark.load()
    model, tokenizer, caches = prepare(settings)
    same = {"format": benchmark.format_name, "model": settings.model} | benchmark.how()
    same["environment"] = environment(model.device, model.dtype)
    own_prompts = sorted({item.dataset for item in items if item.own_prompt})
    head = {"command": command_line(), "files": [path.name for path in benchmark.files], "own_prompts": own_prompts}
    file = ResultFile(settings.json_file, head, same)
    makers = {name: lambda cache=cache: cache.make(model) for name, cache in caches.items()}
    bar = progress(f"items: {len(items)}")
    results = run_benchmark(model, tokenizer, items, makers, bar, **benchmark.how(), done=file.items, keep=file.keep)
    scores = summarize(results)
    console.print(benchmark_table(f"{benchmark.format_name}, {settings.model}", scores))
    console.print(NOTE)
    _print_warnings(own_prompts, results)
    for score in {score.cache: score for score in scores}.values():
        print_compressor(score.cache, score.share("compressor_bytes"), score.share("break_even_tokens"))
    file.content["results"] = [
        (caches[score.cache].source if score.cache != FULL else {}) | score.summary() for score in scores
    ]
    file.write()


def benchmark_table(title: str, scores: list[DatasetScore]) -> Table:
    """Two lines for each dataset and cache, and their means where there are several datasets."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, pad_edge=False)
    # nothing is cut off where a terminal is narrow
    table.add_column("dataset", overflow="fold")
    table.add_column("items", justify="right", overflow="fold")
    table.add_column("cache", overflow="fold")
    for header in ("score", "change", "bytes"):
        table.add_column(header, justify="right", overflow="fold")
    for score in scores:
        first = score.cache == FULL
        name, count = (score.dataset, f"{len(score.scores):,}") if first else ("", "")
        cells = [name, count, score.cache, f"{100 * score.score:.1f}", "" if first else _change(score), _bytes(score)]
        table.add_row(*map(escape, cells))
    datasets = {score.dataset for score in scores}
    if len(datasets) > 1:
        for cache in dict.fromkeys(score.cache for score in scores):
            mean = sum(score.score for score in scores if score.cache == cache) / len(datasets)
            table.add_row("mean" if cache == FULL else "", "", escape(cache), f"{100 * mean:.1f}")
    return table


def _change(score: DatasetScore) -> str:
    low, high = (100 * end for end in score.change_interval)
    star = "" if low <= 0 <= high else "*"
    return f"{100 * score.change:+.1f}\n{low:+.1f} to {high:+.1f}{star}"


def _bytes(score: DatasetScore) -> str:
    return f"{score.share('stored_share'):.1%}\n{own_share(score.share('compressed_share'))}".rstrip()


def _print_warnings(own_prompts: list[str], results: list[ItemResult]) -> None:
    if own_prompts:
        console.print(
            f"Not comparable with published scores: the prompts of {', '.join(own_prompts)} are worded by us. "
            "`--prompts` takes others.",
            style="yellow",
        )
    cut = [result for result in results if result.cache == FULL and result.num_dropped]
    if cut:
        num_tokens = sum(result.num_dropped for result in cut) // len(cut)
        console.print(
            f"Too long for the model or `--max-prompt-tokens`: {len(cut)} prompts, which lost {num_tokens:,} tokens of "
            "their middle on average.",
            style="yellow",
        )


def _read(path: Path, same: dict) -> list[dict]:
    """The items in `path`, which must have been begun with `same`."""
    try:
        old = json.loads(path.read_text())
        found = _flat({name: old[name] for name in same})
        items = [asdict(ItemResult(**item)) for item in old["items"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InvalidOptionError(
            f"`--json` must be a new file or one that this command began, got {path.name!r}: name another file."
        ) from error
    for name, value in _flat(same).items():
        if found.get(name) != value:
            raise InvalidOptionError(
                f"`--json` must be a new file or one of the same settings, got {path.name!r} with {name} "
                f"{found.get(name)!r} instead of {value!r}: name another file."
            )
    return items


def _flat(settings: dict) -> dict:
    """The settings with the parts of the environment beside the others."""
    return {name: value for name, value in settings.items() if name != "environment"} | settings["environment"]
