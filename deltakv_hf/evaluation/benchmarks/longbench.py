"""LongBench: its datasets with their metrics and lengths, and prompts of our own for whoever does not give its."""

from __future__ import annotations

from dataclasses import dataclass

from . import metrics
from .items import BenchmarkItem, Metric, Turn
from .metrics import best_of
from .records import Record
from .wording import Wording, fill

ANSWER = "Answer from the text below, in as few words as you can.\n\n{context}\n\nQuestion: {input}\nAnswer:"
ANSWER_CHINESE = "根据下面的材料，用尽量简短的中文回答问题。\n\n{context}\n\n问题：{input}\n答案："
SUMMARY = "Summarize the text below in one page.\n\n{context}\n\nSummary:"
EXAMPLES = "Go on as the examples show.\n\n{context}\n{input}"
COUNT = (
    "Some of the paragraphs below are there more than once. Count the different ones.\n\n{context}\n\n"
    "Number of different paragraphs, as a number alone: "
)
RETRIEVE = (
    "One of the paragraphs below is summarized after them.\n\n{context}\n\nSummary: {input}\n\n"
    'Which paragraph is it? Answer like "Paragraph 1". Answer: '
)
RETRIEVE_CHINESE = "{context}\n\n摘要：{input}\n\n这是哪一段的摘要？请像“段落1”那样回答："


@dataclass(frozen=True)
class Dataset:
    """One of LongBench.

    Attributes:
        metric: of one right answer; `classification` needs the item's classes first.
        max_new_tokens: as published.
        prompt: of our own.
        examples: whether the prompt ends in what the model goes on with: no chat template is put around it.
        first_line: whether only the first line of an answer counts.
        packages: that the metric needs.
    """

    metric: Metric
    max_new_tokens: int
    prompt: str
    examples: bool = False
    first_line: bool = False
    packages: tuple[str, ...] = ()


ROUGE, CHINESE = ("rouge",), ("jieba",)
DATASETS = {
    **dict.fromkeys(("narrativeqa", "qasper"), Dataset(metrics.token_f1, 128, ANSWER)),
    "multifieldqa_en": Dataset(metrics.token_f1, 64, ANSWER),
    "multifieldqa_zh": Dataset(metrics.token_f1_chinese, 64, ANSWER_CHINESE, packages=CHINESE),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), Dataset(metrics.token_f1, 32, ANSWER)),
    "dureader": Dataset(metrics.rouge_l_chinese, 128, ANSWER_CHINESE, packages=ROUGE + CHINESE),
    **dict.fromkeys(("gov_report", "multi_news"), Dataset(metrics.rouge_l, 512, SUMMARY, packages=ROUGE)),
    "qmsum": Dataset(metrics.rouge_l, 512, ANSWER, packages=ROUGE),
    "vcsum": Dataset(metrics.rouge_l_chinese, 512, "{context}\n\n概括以上会议的内容：", packages=ROUGE + CHINESE),
    "trec": Dataset(metrics.classification, 64, EXAMPLES, examples=True, first_line=True),
    "triviaqa": Dataset(metrics.token_f1, 32, EXAMPLES, examples=True, first_line=True),
    "samsum": Dataset(metrics.rouge_l, 128, EXAMPLES, examples=True, first_line=True, packages=ROUGE),
    "lsht": Dataset(metrics.classification, 64, "{context}\n{input}", examples=True, first_line=True),
    "passage_count": Dataset(metrics.count, 32, COUNT),
    "passage_retrieval_en": Dataset(metrics.retrieval, 32, RETRIEVE),
    "passage_retrieval_zh": Dataset(metrics.retrieval, 32, RETRIEVE_CHINESE),
    "lcc": Dataset(metrics.code_similarity, 64, "{context}", examples=True),
    "repobench-p": Dataset(metrics.code_similarity, 64, "{context}{input}", examples=True),
}


def make_item(record: Record, wording: Wording, task: str) -> BenchmarkItem:
    """The item of a line with `input`, `context`, `answers`, `dataset` and, for classes, `all_classes`."""
    name = record.text("dataset")
    if name not in DATASETS:
        record.refuse("dataset", f"one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    metrics.check_installed(dataset.packages, name)
    for field in ("context", "input"):
        record.text(field)
    metric, answers = dataset.metric, record.texts("answers")
    if metric is metrics.classification:
        metric = metric(record.texts("all_classes"))
    if metric is metrics.retrieval and not all(map(metrics.RETRIEVED.search, answers)):
        record.refuse("answers", "like `Paragraph 1` or `段落1`")
    turn = Turn(
        name,
        fill(wording.prompt(name, dataset.prompt), record.fields, name),
        answers,
        first_line(best_of(metric)) if dataset.first_line else best_of(metric),
        wording.max_new_tokens(name, dataset.max_new_tokens),
    )
    return BenchmarkItem(
        name,
        record.line,
        (turn,),
        chat=not dataset.examples,
        stop_at_newline=name == "samsum",
        own_prompt=wording.prompts is None,
    )


def first_line(metric: Metric) -> Metric:
    """`metric` of the first line of an answer."""
    return lambda answer, right: metric(answer.lstrip("\n").split("\n")[0], right)
