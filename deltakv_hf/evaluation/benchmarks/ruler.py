"""RULER: its kinds of tasks with their metrics and lengths; the prompt is in the file."""

from __future__ import annotations

import re

from . import metrics
from .items import BenchmarkItem, Metric, Turn
from .records import Record
from .wording import Wording, fill

CONTROL = re.compile(r"[\x00-\x1f]")


def _printable(metric: Metric) -> Metric:
    """`metric` of an answer whose control characters are made line breaks."""
    return lambda answer, right: metric(CONTROL.sub("\n", answer.strip()).strip(), right)


# metric and most tokens of an answer, as published
KINDS = {
    "niah": (_printable(metrics.match_all), 128),
    "vt": (_printable(metrics.match_all), 30),
    "cwe": (_printable(metrics.match_all), 120),
    "fwe": (_printable(metrics.match_all), 50),
    "qa": (_printable(metrics.match_any), 32),
}


def make_item(record: Record, wording: Wording, task: str) -> BenchmarkItem:
    """The item of a line with `input`, `outputs` and, where it was generated apart, `answer_prefix`."""
    metric, usual = KINDS[task.split("_")[0]]
    record.text("input")
    turn = Turn(
        task,
        fill(wording.prompt(task, "{input}"), record.fields, task),
        record.texts("outputs"),
        metric,
        wording.max_new_tokens(task, usual),
        prefix=record.text("answer_prefix") if "answer_prefix" in record.fields else "",
    )
    return BenchmarkItem(task, record.line, (turn,))


def knows(task: str) -> bool:
    """Whether there is such a task: a kind, or one with a number or name behind it, as `niah_single_1`."""
    return task.split("_")[0] in KINDS
