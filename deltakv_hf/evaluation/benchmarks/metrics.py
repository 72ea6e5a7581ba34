"""How published benchmarks score an answer, as their own code does it: 0 to 1, against the best of the right answers.

ROUGE is left to the packages that those benchmarks call, since their variants differ (`rouge` counts different words
and unites sentences, `rouge-score` counts all); Chinese words to `jieba`. All else is a few lines each.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from difflib import SequenceMatcher
from functools import cache
from importlib.util import find_spec

from ...errors import InvalidOptionError

ARTICLES = re.compile(r"\b(a|an|the)\b")
# those that LongBench and SCBench leave out, which are not all there are
CHINESE_PUNCTUATION = "".join(
    chr(code)
    for first, last in (
        *((0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003)),
        *((0x300B, 0x3011), (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F)),
        *((0xFF01, 0xFF0D), (0xFF0F, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64)),
    )
    for code in range(first, last + 1)
)
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
# a minus between two digits is no sign
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*)?\.?\d+")
RETRIEVED = re.compile(r"(?:Paragraph |段落)(\d+)")
BOXED = re.compile(r"\\boxed\s*\{\s*(\d+)\s*\}")


def best_of(metric: Callable[[str, str], float]) -> Callable[[str, Sequence[str]], float]:
    """`metric` of one right answer, made one of several: the best counts."""
    return lambda answer, right: max(metric(answer, one) for one in right)


def check_installed(packages: Sequence[str], dataset: str) -> None:
    """Raises `InvalidOptionError` unless what `dataset` is scored with is installed."""
    for package in packages:
        if find_spec(package.replace("-", "_")) is None:
            raise InvalidOptionError(
                f"`file` must be of a dataset whose scores can be computed here, got {dataset!r}, which is scored with "
                f"`{package}`: pip install {package}"
            )


def normalize(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def normalize_chinese(text: str) -> str:
    """Text in lower case, without punctuation and white space."""
    return "".join(text.lower().translate(NO_CHINESE_PUNCTUATION).split())


def overlap(answer: Sequence[str], right: Sequence[str]) -> float:
    """F1 of the tokens that two answers share, each as often as in both."""
    shared = (Counter(answer) & Counter(right)).total()
    return 2 * shared / (len(answer) + len(right)) if shared else 0.0


def token_f1(answer: str, right: str) -> float:
    """F1 of normalized words."""
    return overlap(normalize(answer), normalize(right))


def token_f1_chinese(answer: str, right: str) -> float:
    """F1 of normalized Chinese words, as `jieba` cuts them."""
    return overlap(*([word for word in map(normalize_chinese, _cut(text)) if word] for text in (answer, right)))


def character_f1_chinese(answer: str, right: str) -> float:
    """F1 of the characters that are no punctuation."""
    return overlap(normalize_chinese(answer), normalize_chinese(right))


def rouge_l(answer: str, right: str) -> float:
    """ROUGE-L of the package `rouge`; 0 where it has no score, for a text without words or a sentence too long."""
    try:
        return _rouge().get_scores([answer], [right], avg=True)["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_chinese(answer: str, right: str) -> float:
    """ROUGE-L of Chinese words."""
    return rouge_l(" ".join(_cut(answer)), " ".join(_cut(right)))


def rouge_l_sum(answer: str, right: str) -> float:
    """ROUGE-Lsum of the package `rouge-score`."""
    return _rouge_scorer().score(right, answer)["rougeLsum"].fmeasure


def classification(classes: Sequence[str]) -> Callable[[str, str], float]:
    """The share of the right class among those named; a name that is part of the right one's does not count."""

    def score(answer: str, right: str) -> float:
        named = [name for name in classes if name in answer and (name == right or name not in right)]
        return 1 / len(named) if right in named else 0.0

    return score


def count(answer: str, right: str) -> float:
    """The share of the right number among the numbers in the answer."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def retrieval(answer: str, right: str) -> float:
    """The same for the number in `Paragraph N` or 段落N."""
    return count(answer, RETRIEVED.search(right)[1])


def code_similarity(answer: str, right: str) -> float:
    """Ratio of matching characters of the first line that is code, in whole percents, as fuzzywuzzy gives it."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, right).ratio()) / 100 if line and right else 0.0


def match_all(answer: str, right: Sequence[str]) -> float:
    """The share of the right answers that are in the answer, in any case of letters."""
    return sum(one.lower() in answer.lower() for one in right) / len(right)


def match_any(answer: str, right: Sequence[str]) -> float:
    """Whether one of them is."""
    return float(any(one.lower() in answer.lower() for one in right))


def contains(answer: str, right: str) -> float:
    """Whether the right answer is in the answer, letter by letter."""
    return float(right in answer)


def first_integer(answer: str, right: str) -> float:
    """Whether the first digits of the answer are the right ones."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] == right)


def first_number(answer: str, right: str) -> float:
    """Whether the first number of the answer is the right one; its whole part, if that is whole."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    if found is None:
        return 0.0
    number = Decimal(found[0])
    return float((int(number) if right.lstrip("-").isdigit() else number) == Decimal(right))


def choice(answer: str, right: Sequence[str]) -> float:
    """Whether the answer begins with the right letter of A to D, is its text or names either; `right` holds both."""
    answer = answer.strip()
    if answer[:1] in tuple("ABCD"):
        return float(answer[0] in right)
    if answer in right:
        return 1.0
    flat = " ".join(re.sub(r"[\n\"'.,?!{}]", " ", answer).split())
    for words in ("answer is:", "answer:", "answer is", "option is"):
        if words in flat:
            return float(flat.split(words, 1)[1].lstrip().startswith(tuple(right)))
    return float(next((word for word in flat.split() if word in "ABCD"), None) in right)


def last_number(answer: str, right: str) -> float:
    """Whether the number behind `####` is the right one, or else the last number of the answer."""
    number = final_number(answer)
    return float(number is not None and number == final_number(right))


def final_number(text: str) -> Decimal | None:
    """The number behind the first `####`, or else the last one of `text`, thousands separated or not."""
    marked = text.split("####", 1)
    numbers = NUMBER.findall(marked[1])[:1] if len(marked) == 2 else []
    numbers = numbers or NUMBER.findall(marked[0])
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:
        return None


def boxed_integer(answer: str, right: str) -> float:
    r"""Whether the integer in the last `\boxed{}` is the right one, or else the last integer of the answer."""
    found = BOXED.findall(answer) or re.findall(r"\d+", answer)
    return float(bool(found) and int(found[-1]) == int(right))


def _cut(text: str) -> list[str]:
    import jieba

    # it tells of its dictionary on stderr
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))


@cache
def _rouge():
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])
