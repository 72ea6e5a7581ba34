"""How published benchmarks score answers: each metric on examples worked out by hand, and what holds for all texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakv_hf.evaluation.benchmarks import metrics
from deltakv_hf.evaluation.benchmarks.longbench import first_line
from deltakv_hf.evaluation.benchmarks.ruler import KINDS
from deltakv_hf.evaluation.intervals import bootstrap_difference

CLASSES = ("Food", "Date", "Other entity", "Entity")
classify = metrics.classification(CLASSES)


@pytest.mark.parametrize(
    "metric, answer, right, score",
    [
        # 2 of 3 words, 2 of 2
        (metrics.token_f1, "The old mill!", "mill, old", 1.0),
        (metrics.token_f1, "the old red mill", "an old mill", 0.8),
        (metrics.token_f1, "mill mill", "mill", 2 / 3),
        (metrics.token_f1, "", "mill", 0.0),
        # 三棵 | 柳树 of 种 | 了 | 三棵 | 柳树, punctuation left out
        (metrics.token_f1_chinese, "种了三棵柳树。", "三棵柳树", 2 / 3),
        (metrics.character_f1_chinese, "柳树！", "两柳树", 0.8),
        # longest common subsequence `the mill down`: 3 of 3 and 3 of 4 different words
        (metrics.rouge_l, "the mill down", "the mill burned down", 6 / 7),
        (metrics.rouge_l, "", "mill", 0.0),
        (metrics.rouge_l_chinese, "三棵柳树", "柳树", 2 / 3),
        # 3 of 4 words and 3 of 3, case and punctuation left out
        (metrics.rouge_l_sum, "The Mill, down!", "the mill burned down", 6 / 7),
        (classify, "Type: Date", "Date", 1.0),
        (classify, "Date or Food", "Date", 0.5),
        # a class that is part of the right one's name does not count
        (metrics.classification(("Food", "Foodstuff")), "Foodstuff", "Foodstuff", 1.0),
        (classify, "none", "Date", 0.0),
        (metrics.count, "There are 3, no, 4.", "4", 0.5),
        (metrics.count, "none", "4", 0.0),
        (metrics.retrieval, "Paragraph 12", "Paragraph 12", 1.0),
        (metrics.retrieval, "Paragraph 12 or 3", "Paragraph 3", 0.5),
        (metrics.retrieval, "段落3", "段落3", 1.0),
        # 12 of 14 + 12 characters in common, after a line that is a comment and one that is a fence
        (metrics.code_similarity, "\n# so\n```\nreturn totals2\nx", "return total", 0.92),
        (metrics.code_similarity, "# only a comment", "return total", 0.0),
        (metrics.contains, "it is 9b20.", "9b20", 1.0),
        (metrics.contains, "it is 9B20.", "9b20", 0.0),
        (metrics.first_integer, "key 60417, not 5", "60417", 1.0),
        (metrics.first_integer, "5 or 60417", "60417", 0.0),
        (metrics.first_number, "18.7", "18", 1.0),
        (metrics.first_number, "it is 2.5", "2.5", 1.0),
        (metrics.first_number, "none", "2.5", 0.0),
        (metrics.last_number, "6*4=24, so 24-5=19.\n#### 19", "#### 19", 1.0),
        (metrics.last_number, "#### 19\n\nAnother problem: 7", "#### 19", 1.0),
        (metrics.last_number, "that is $1,200.00.", "#### 1200", 1.0),
        (metrics.last_number, "10-8=2", "#### 2", 1.0),
        (metrics.last_number, "it falls by -3", "#### -3", 1.0),
        (metrics.last_number, "no idea", "#### 3", 0.0),
        (metrics.boxed_integer, r"first \boxed{4}, then \boxed{ 075 }, not 3", "75", 1.0),
        (metrics.boxed_integer, "it is 074 or 75", "75", 1.0),
        (metrics.boxed_integer, r"75, so \boxed{76}", "75", 0.0),
        (metrics.boxed_integer, "", "75", 0.0),
    ],
)
def test_scores_worked_out_by_hand(metric, answer, right, score):
    assert metric(answer, right) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    "metric, answer, right, score",
    [
        (metrics.best_of(metrics.token_f1), "red mill", ("blue boat", "mill"), 2 / 3),
        (metrics.match_all, "4821 and LUND", ("4821", "lund", "oslo"), 2 / 3),
        (metrics.match_any, "4821 and LUND", ("oslo", "lund"), 1.0),
        (metrics.match_any, "4821", ("oslo", "lund"), 0.0),
        (metrics.choice, "B. bees", ("bees", "B"), 1.0),
        (metrics.choice, "Bees? A", ("bees", "A"), 0.0),
        (metrics.choice, "bees", ("bees", "B"), 1.0),
        (metrics.choice, "I think the answer is: B", ("bees", "B"), 1.0),
        (metrics.choice, "so the answer is C, not B", ("bees", "B"), 0.0),
        (metrics.choice, "it must be B", ("bees", "B"), 1.0),
        (metrics.choice, "", ("bees", "B"), 0.0),
        (first_line(metrics.best_of(metrics.token_f1)), "\n\nmill\nred", ("mill",), 1.0),
        # a control character is a line break, which is in no right answer
        (KINDS["niah"][0], "\x0348\x0021", ("4821", "21"), 0.5),
        (KINDS["qa"][0], "to Lund", ("Lund", "Oslo"), 1.0),
    ],
)
def test_scores_against_several_right_answers(metric, answer, right, score):
    assert metric(answer, right) == pytest.approx(score)


WORDS = st.lists(st.sampled_from("mill boat red old two 42 7 柳树 B. # Date".split()), max_size=8).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=20))
OF_ONE = (
    *(metrics.token_f1, metrics.token_f1_chinese, metrics.character_f1_chinese),
    *(metrics.rouge_l, metrics.rouge_l_chinese, metrics.rouge_l_sum),
    *(classify, metrics.code_similarity, metrics.contains, metrics.first_integer),
)


@pytest.mark.parametrize("metric", OF_ONE, ids=lambda metric: metric.__name__)
@settings(max_examples=40, deadline=None)
@given(answer=TEXTS, right=TEXTS)
def test_scores_are_shares(metric, answer, right):
    assert 0 <= metric(answer, right) <= 1


@pytest.mark.parametrize("metric", (metrics.count, metrics.last_number, metrics.boxed_integer, metrics.first_number))
@settings(max_examples=40, deadline=None)
@given(answer=TEXTS, right=st.integers(0, 999))
def test_scores_of_numbers_are_shares_and_the_number_itself_is_right(metric, answer, right):
    assert 0 <= metric(answer, str(right)) <= 1
    assert metric(f"it is {right}", str(right)) == 1


@pytest.mark.parametrize("metric", (metrics.match_all, metrics.match_any, metrics.choice))
@settings(max_examples=40, deadline=None)
@given(answer=TEXTS, right=st.lists(TEXTS, min_size=1, max_size=3))
def test_scores_of_several_are_shares(metric, answer, right):
    assert 0 <= metric(answer, right) <= 1
    assert metric is metrics.choice or metric(" ".join(right), right) == 1


PLAIN = st.lists(st.sampled_from("mill boat red old two stone river".split()), min_size=1, max_size=8).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(first=PLAIN, second=PLAIN)
def test_the_right_answer_is_right_and_f1_is_symmetric(first, second):
    same = (metrics.token_f1, metrics.token_f1_chinese, metrics.character_f1_chinese, metrics.rouge_l)
    for metric in (*same, metrics.rouge_l_sum, metrics.code_similarity, metrics.contains):
        assert metric(first, first) == pytest.approx(1)
    for metric in (metrics.token_f1, metrics.token_f1_chinese, metrics.character_f1_chinese, metrics.rouge_l_sum):
        assert metric(first, second) == pytest.approx(metric(second, first))


def test_a_bootstrap_is_seeded_pairs_items_and_narrows_with_more():
    before, after = [0.0, 1.0, 0.5, 0.0] * 5, [0.5, 1.0, 1.0, 0.0] * 5
    low, high = bootstrap_difference(before, after)
    assert low < 0.25 < high and 0 < low and high < 0.5
    assert bootstrap_difference(before, after) == (low, high) != bootstrap_difference(before, after, seed=1)
    # standard deviation of the changes .25, of their mean .25 / sqrt(20): 1.96 of them on either side
    assert high - low == pytest.approx(2 * 1.96 * 0.25 / 20**0.5, rel=0.15)
    wide = bootstrap_difference(before[:8], after[:8])
    assert wide[1] - wide[0] > high - low
    turned = bootstrap_difference(after, before)
    assert turned == pytest.approx((-high, -low))


def test_a_bootstrap_of_one_change_has_no_width():
    assert bootstrap_difference([0.25, 0.5], [0.5, 0.75]) == (0.25, 0.25)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="dureader.*`jieba`: pip install jieba"):
        metrics.check_installed(("jieba",), "dureader")
