"""Published benchmarks by format: files as they are published, made items."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import InvalidOptionError
from . import longbench, problems, ruler, scbench
from .items import BenchmarkItem
from .records import Record, read_records, task_of
from .wording import Wording, read_wording


@dataclass(frozen=True)
class Format:
    """How a benchmark is published.

    Attributes:
        make_item: makes an item of a line, with the user's wording and the file's task.
        knows: whether it has this task; formats whose lines or names say nothing take any.
        tasks: what they are called, for errors.
    """

    make_item: Callable[[Record, Wording, str], BenchmarkItem]
    knows: Callable[[str], bool] = lambda task: True
    tasks: str = ""


FORMATS = {
    "longbench": Format(longbench.make_item),
    "ruler": Format(ruler.make_item, ruler.knows, ", ".join(f"{kind}, {kind}_…" for kind in ruler.KINDS)),
    "scbench": Format(scbench.make_item, scbench.TASKS.__contains__, ", ".join(scbench.TASKS)),
    "aime": Format(problems.make_aime),
    "gsm8k": Format(problems.make_gsm8k),
}


def load_benchmark(
    format_name: str,
    files: Sequence[Path],
    *,
    limit: int | None = None,
    task: str | None = None,
    prompts: Path | None = None,
    max_lengths: Path | int | None = None,
) -> list[BenchmarkItem]:
    """Reads files of a benchmark.

    Args:
        format_name: one of `FORMATS`.
        files: JSON Lines, as published.
        limit: items of each file; None takes all.
        task: of `ruler`, `scbench` and `aime` files; None takes what the file is called, or its folder if the file is
            called `validation` or the like.
        prompts: JSON file of templates by dataset, as LongBench's `dataset2prompt.json`; for `scbench` objects with
            `context` and `question`. None takes the published prompt where the data holds it, else our own.
        max_lengths: most tokens of an answer, or a JSON file by dataset, as LongBench's `dataset2maxlen.json`; None
            takes the published ones, 512 for `gsm8k` and 4,096 for `aime`.

    Raises:
        InvalidOptionError: a file cannot be read or has another form, or a dataset comes in two files.
    """
    if format_name not in FORMATS:
        near = difflib.get_close_matches(format_name, FORMATS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise InvalidOptionError(f"`format` must be one of {', '.join(FORMATS)}, got {format_name!r}.{hint}")
    form, wording = FORMATS[format_name], read_wording(prompts, max_lengths)
    items, seen = [], set()
    for path in files:
        name = task_of(path, task)
        if not form.knows(name):
            raise InvalidOptionError(
                f"`task` must be one of {form.tasks}, got {name!r} for {path.name!r}: name it, or the file after it."
            )
        made = [form.make_item(record, wording, name) for record in read_records(path, limit)]
        twice = seen & {item.dataset for item in made}
        if twice:
            raise InvalidOptionError(
                f"`file` must be one for each dataset, got {path.name!r} with {twice.pop()!r} again: run another "
                "command for it."
            )
        seen |= {item.dataset for item in made}
        items += made
    return items
