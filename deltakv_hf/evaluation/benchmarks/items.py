"""Items of published benchmarks: what a model reads, what it is asked on top, and what is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# a score of 0 to 1 from an answer and all right ones
Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        dataset: that it counts for.
        question: text behind what was read before; the whole prompt where nothing was.
        answers: right answers.
        metric: scores an answer against them.
        max_new_tokens: most tokens of the answer.
        prefix: text that the answer begins with.
        golden: the right answer as the next turn of a chat finds it.
    """

    dataset: str
    question: str
    answers: tuple[str, ...]
    metric: Metric
    max_new_tokens: int
    prefix: str = ""
    golden: str = ""


@dataclass(frozen=True)
class BenchmarkItem:
    """One line of a file.

    Attributes:
        dataset: of the item.
        number: of the line in its file.
        turns: questions, one or more.
        context: text that all questions share, read before any of them; None: the question is the whole prompt.
        chat: whether a chat template may be put around it.
        stop_at_newline: whether a line break ends the answer too.
        own_prompt: whether its prompt is worded by us, so that scores are not those of the published prompt.
    """

    dataset: str
    number: int
    turns: tuple[Turn, ...]
    context: str | None = None
    chat: bool = True
    stop_at_newline: bool = False
    own_prompt: bool = False

    @property
    def digest(self) -> str:
        """Of all that decides the answers and their scores, so that a changed item is not taken for the old one."""
        turns = [{name: value for name, value in vars(turn).items() if name != "metric"} for turn in self.turns]
        content = json.dumps(vars(self) | {"turns": turns})
        return hashlib.sha256(content.encode()).hexdigest()[:16]
