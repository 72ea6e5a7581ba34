"""AIME and GSM8K: problems with a number as the answer. Neither has a prompt of its own."""

from __future__ import annotations

from . import metrics
from .items import BenchmarkItem, Turn
from .records import Record
from .wording import Wording, fill

GSM8K = "{question}\n\nSolve it step by step and end with `#### ` and the number that is the answer.\n"
AIME = "{problem}\n\nSolve it step by step and put the answer, an integer of 0 to 999, into \\boxed{{}}.\n"


def make_gsm8k(record: Record, wording: Wording, task: str) -> BenchmarkItem:
    """The item of a line with `question` and an `answer` that ends in `#### N`."""
    record.text("question")
    answer = record.text("answer")
    if "####" not in answer or metrics.final_number(answer) is None:
        record.refuse("answer", "a text with the number behind `####`")
    prompt = fill(wording.prompt("gsm8k", GSM8K), record.fields, "gsm8k")
    right = f"#### {metrics.final_number(answer)}"
    turn = Turn("gsm8k", prompt, (right,), metrics.best_of(metrics.last_number), wording.max_new_tokens("gsm8k", 512))
    return BenchmarkItem("gsm8k", record.line, (turn,), own_prompt=wording.prompts is None)


def make_aime(record: Record, wording: Wording, task: str) -> BenchmarkItem:
    """The item of a line with `problem` or `question` and an `answer` of 0 to 999, as a number or a text."""
    problem, place = record.text(record.first_of("problem", "question")), record.first_of("answer", "solution")
    answer = str(record.fields.get(place, "")).strip()
    if place == "solution":
        answer = (metrics.BOXED.findall(answer) or [""])[-1]
    if not answer.isdecimal() or int(answer) > 999:
        record.refuse(place, "an integer of 0 to 999" if place == "answer" else r"a text with it in \boxed{}")
    fields = record.fields | {"problem": problem, "question": problem}
    turn = Turn(
        task,
        fill(wording.prompt(task, AIME), fields, task),
        (str(int(answer)),),
        metrics.best_of(metrics.boxed_integer),
        wording.max_new_tokens(task, 4096),
    )
    return BenchmarkItem(task, record.line, (turn,), own_prompt=wording.prompts is None)
