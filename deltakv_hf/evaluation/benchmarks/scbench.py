"""SCBench: contexts that several questions share, its tasks with their metrics and lengths.

Its two tasks with `scbench_repoqa` in them, which are scored by parsing code of six languages, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InvalidOptionError
from . import metrics
from .items import BenchmarkItem, Metric, Turn
from .metrics import best_of
from .records import Record
from .wording import Wording, fill


@dataclass(frozen=True)
class Task:
    """One of SCBench.

    Attributes:
        metric: of all right answers.
        max_new_tokens: as published.
        context, question: templates. Where they are the bare fields, so are the published ones.
        packages: that the metric needs.
    """

    metric: Metric
    max_new_tokens: int
    context: str = "{context}"
    question: str = "{input}"
    packages: tuple[str, ...] = ()

    @property
    def bare(self) -> bool:
        """Whether there is nothing around the fields."""
        return (self.context, self.question) == ("{context}", "{input}")


BOOK, ANSWER = "Here is a book.\n\n{context}", "Question: {input}\nAnswer in a few words:"
CHOICE = "Question: {input}\nA. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\nThe letter of the answer is"
LOOK_UP = Task(best_of(metrics.contains), 150, "Here are keys and their values.\n\n{context}")
PASSKEY = Task(best_of(metrics.first_integer), 15, "A key is hidden in the text below.\n\n{context}")
SUMMARY = Task(best_of(metrics.rouge_l_sum), 200, packages=("rouge-score",))
TASKS = {
    "scbench_kv": LOOK_UP,
    "scbench_kv_hard": LOOK_UP,
    "scbench_kv_compressible": LOOK_UP,
    "scbench_prefix_suffix": Task(best_of(metrics.contains), 150),
    "scbench_hashhop": Task(best_of(metrics.contains), 150),
    # rounded as published
    "scbench_vt": Task(lambda answer, right: round(metrics.match_all(answer, right), 2), 30),
    "scbench_passkey": PASSKEY,
    "scbench_qa_eng": Task(metrics.match_any, 40, BOOK, ANSWER),
    "scbench_qa_chn": Task(best_of(metrics.character_f1_chinese), 40, "{context}", "问题：{input}\n简短的答案："),
    "scbench_choice_eng": Task(metrics.choice, 40, BOOK, CHOICE),
    "scbench_many_shot": Task(metrics.match_any, 10),
    "scbench_mf": Task(best_of(metrics.first_number), 5, "Here is a list of numbers.\n\n{context}"),
    "scbench_summary": SUMMARY,
    "scbench_summary_with_needles": SUMMARY,
}
# what a turn of a mixed dataset says that it is
MIXED = {"scbench_summary": (SUMMARY, 800), "scbench_passkey": (PASSKEY, PASSKEY.max_new_tokens)}


def make_item(record: Record, wording: Wording, task: str) -> BenchmarkItem:
    """The item of a line with `context` (or `input`) and `multi_turns`, each with `input` and `answer`."""
    kind = TASKS[task]
    metrics.check_installed(kind.packages, task)
    own = {"context": kind.context, "question": kind.question}
    template = wording.prompt(task, own)
    if not isinstance(template, dict) or set(template) != set(own):
        raise InvalidOptionError(
            f"`prompts` of the dataset {task!r} must be an object with the templates `context` and `question`, got "
            f"{template!r}."
        )
    place = record.first_of("context", "input")
    # numbers are listed as they are
    context = str(record.fields[place]) if isinstance(record.fields.get(place), list) else record.text(place)
    turns = [_turn(turn, wording, task, template["question"]) for turn in record.parts("multi_turns")]
    return BenchmarkItem(
        task,
        record.line,
        tuple(turns),
        context=fill(template["context"], {"context": context}, task),
        own_prompt=wording.prompts is None and not kind.bare,
    )


def _turn(record: Record, wording: Wording, task: str, template: str) -> Turn:
    kind, dataset, usual = TASKS[task], task, TASKS[task].max_new_tokens
    if task == "scbench_summary_with_needles":
        if record.fields.get("task") not in MIXED:
            record.refuse("task", f"one of {', '.join(MIXED)}")
        kind, usual = MIXED[record.fields["task"]]
        dataset = f"{task}: {record.fields['task']}"
    found = record.fields.get("answer")
    answers = record.texts("answer") if isinstance(found, list) else (record.value("answer"),)
    fields = record.fields | {"question": record.text("input")}
    if task == "scbench_choice_eng":
        options = record.texts("options")
        if len(options) != 4 or answers[0] not in options:
            record.refuse("options", "four texts with the answer among them")
        fields |= {f"OPTION_{letter}": option for letter, option in zip("ABCD", options, strict=True)}
        answers = (answers[0], "ABCD"[options.index(answers[0])])
    golden = str(found) if isinstance(found, list) else answers[0]
    return Turn(
        dataset,
        fill(template, fields, task),
        answers,
        kind.metric,
        wording.max_new_tokens(task, usual),
        golden=golden,
    )
