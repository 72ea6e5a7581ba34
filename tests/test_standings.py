"""Who is ahead of whom: known figures in rows, and what must be said of them."""

import copy
import io
import json
import math
from pathlib import Path

import pytest
from commands import assert_refused, run
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from deltakv_hf import InvalidOptionError
from deltakv_hf.cli import results_tables as tables
from deltakv_hf.cli.eval_results import results_page
from deltakv_hf.cli.pareto import Mark, Panel, _draw, draw_panels, front, place_labels
from deltakv_hf.evaluation.intervals import bootstrap_difference
from deltakv_hf.evaluation.standings import claims, duels_at_equal_bytes, largest_within, unmatched
from deltakv_hf.evaluation.suite import FORMAT, VERSION

figures = st.floats(-100, 100, allow_nan=False)
pairs = st.lists(st.tuples(figures, figures), min_size=1, max_size=40)


@given(pairs)
def test_a_bootstrap_interval_lies_among_the_changes_and_turns_with_them(pairs):
    before, after = zip(*pairs, strict=True)
    changes = [new - old for old, new in pairs]
    low, high = bootstrap_difference(before, after)
    assert min(changes) - 1e-9 <= low <= high <= max(changes) + 1e-9
    assert bootstrap_difference(after, before) == pytest.approx((-high, -low), abs=1e-9)
    assert bootstrap_difference(before, after) == (low, high)


@given(pairs, st.floats(-50, 50))
def test_a_bootstrap_interval_moves_with_what_is_added_to_all(pairs, more):
    before, after = zip(*pairs, strict=True)
    low, high = bootstrap_difference(before, after)
    moved = bootstrap_difference(before, [one + more for one in after])
    assert moved == pytest.approx((low + more, high + more), abs=1e-9)


def test_a_bootstrap_interval_narrows_with_the_square_root_of_the_items():
    def width(count):
        low, high = bootstrap_difference([0.0] * count, [float(i % 2) for i in range(count)])
        return high - low

    assert width(400) == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.1)
    assert width(100) == pytest.approx(2 * width(400), rel=0.15)


@pytest.mark.parametrize("before, after", [([], []), ([1.0], [1.0, 2.0])])
def test_a_bootstrap_wants_pairs(before, after):
    with pytest.raises(InvalidOptionError, match="`before` and `after` must hold a figure for each"):
        bootstrap_difference(before, after)


def window(number, kl):
    part = {"first": 1, "last": 16, "kl": kl, "top1": 0.9, "nll": 2.0 + kl, "full_nll": 2.0}
    by_distance = [part, part | {"first": 17, "last": 20}]
    return {"text": f"text{number % 2}", "window": number} | part | {"by_distance": by_distance}


def fidelity_row(cache, role, share, kls, compressed=None):
    per_window = [window(number, kl) for number, kl in enumerate(kls)]
    mean = sum(kls) / len(kls)
    means = {"kl": mean, "kl_se": mean / 10, "top1": 0.9, "nll": 2 + mean, "full_nll": 2.0, "nll_change": mean / 2}
    return row("fidelity", cache, role, share, compressed, {"kind": "fidelity", "context": 100, "predict": 20}) | {
        "figures": means | {"windows": len(kls), "per_window": per_window}
    }


def task_row(cache, role, share, right, nll=1.0):
    items = [{"seed": 0, "item": n, "correct": r, "token_accuracy": 1.0, "nll": nll} for n, r in enumerate(right)]
    em = sum(right) / len(right)
    summary = {"task": "niah4", "length": 900, "items": len(right), "em": em, "em_interval": [em / 2, em], "nll": nll}
    summary |= {"em_change": em - 1, "em_change_interval": [em - 1, em - 1], "nll_change": 0.1, "nll_change_se": 0.01}
    return row("niah4-900", cache, role, share, None, {"kind": "task", "task": "niah4", "context": 900}) | {
        "figures": summary | {"per_item": items}
    }


def generation_row(cache, role, share, nlls):
    prompts = [{"nll": nll, "full_nll": 1.0, "agreement": 5, "repetition": 0.1} for nll in nlls]
    mean = {"nll": sum(nlls) / len(nlls), "full_nll": 1.0, "agreement": 5.0, "repetition": 0.1}
    how = {"kind": "generation", "context": 60, "new_tokens": 9, "prompts": len(nlls), "seed": None}
    return row("generation", cache, role, share, None, how) | {"figures": mean | {"per_prompt": prompts}}


def row(measurement, cache, role, share, compressed, settings):
    made = {
        "measurement": measurement,
        "cache": cache,
        "about": cache,
        "role": role,
        "source": {},
        "settings": settings | {"predict_chunk": 0, "model": "tiny", "dtype": "float32", "texts": {"a.txt": "0f"}},
        "command": "deltakv eval all",
        "environment": {"device": "cpu"},
        "stored_share_16bit": share,
    }
    return made if compressed is None else made | {"compressed_share_16bit": compressed}


GOOD, BAD = [0.001 + i * 1e-5 for i in range(12)], [0.01 + i * 1e-4 for i in range(12)]
ROWS = [
    task_row("full cache", "full cache", 1.0, [True] * 12),
    generation_row("full cache", "full cache", 1.0, [1.0] * 9),
    fidelity_row("large", "ours", 0.33, GOOD, 0.29),
    fidelity_row("small", "ours", 0.13, [kl * 2 for kl in GOOD], 0.10),
    fidelity_row("paper-96", "paper", 0.36, BAD, 0.33),
    fidelity_row("kivi4", "peer", 0.32, BAD, 0.31),
    fidelity_row("quanto2", "peer", 0.11, BAD),
    task_row("small", "ours", 0.14, [True] * 12),
    task_row("kivi4", "peer", 0.32, [True, False] * 6, nll=2.0),
    generation_row("small", "ours", 0.14, [1.1] * 9),
    generation_row("kivi4", "peer", 0.32, [1.0 + i / 10 for i in range(9)]),
]


def ahead_of_ours():
    """KIVI's KL is better than that of ours, which takes no more bytes."""
    rows = copy.deepcopy(ROWS)
    rows[5] = fidelity_row("kivi4", "peer", 0.32, [kl / 2 for kl in GOOD], 0.31)
    return rows


def test_a_peer_is_compared_with_the_largest_of_ours_that_takes_no_more():
    duels = {(d.peer["cache"], d.quality.name): d for d in duels_at_equal_bytes(ROWS)}
    assert {d.ours["cache"] for d in duels.values()} == {"small"}
    assert duels["kivi4", "KL"].verdict == duels["kivi4", "EM"].verdict == "ours"
    assert duels["kivi4", "EM"].change == -0.5 and duels["kivi4", "answer NLL"].change == 1.0
    assert duels["kivi4", "NLL of what it wrote"].pairs == 9
    # of nothing that is smaller than all of ours
    assert [row["cache"] for row in unmatched(ROWS)] == ["quanto2"]
    assert largest_within(ROWS[2:4], 0.05) is None


def test_a_peer_that_is_ahead_beyond_its_interval_is_bold():
    assert tables.ahead(ROWS)[0].startswith("No peer beats ours at equal bytes beyond its interval, in ")
    [kl, nll] = tables.ahead(ahead_of_ours())
    assert kl.startswith("**kivi4 (32.0 %) beats small (13.0 %) in KL of fidelity: -.00") and kl.endswith("12 pairs**")
    assert "| **2** |" in tables.duel_table(ahead_of_ours()) and "**" not in tables.duel_table(ROWS)
    page = results_page(ahead_of_ours(), Path("dir"), Path("out.md"))
    assert kl in page.text and "No peer beats" not in page.text


def test_too_few_pairs_tell_nothing():
    rows = [fidelity_row("small", "ours", 0.1, GOOD[:7]), fidelity_row("kivi4", "peer", 0.3, BAD[:7])]
    assert {d.verdict for d in duels_at_equal_bytes(rows)} == {"too few"}
    assert tables.ahead(rows) == ["No figure has the 8 pairs that tell who is ahead"]
    assert [claim.verdict for claim in claims([rows[0] | {"compressed_share_16bit": 0.1}, rows[1]])] == ["open"]


def test_claims_go_by_compressed_tokens_and_hold_if_nothing_is_against_them():
    found = {claim.peer: claim for claim in claims(ROWS)}
    assert found["kivi4"].limit == 0.15 and found["quanto2"].limit == 0.125
    assert {d.ours["cache"] for d in found["quanto2"].duels} == {"small"}
    assert found["kivi4"].verdict == found["quanto2"].verdict == "holds"
    assert {c.peer: c.verdict for c in claims(ahead_of_ours())}["kivi4"] == "does not hold"
    level = [fidelity_row("small", "ours", 0.1, GOOD, 0.1), fidelity_row("kivi4", "peer", 0.3, GOOD)]
    assert claims(level)[0].verdict == "does not hold"


def test_the_page_says_what_is_in_the_rows(tmp_path):
    failed = row("niah4-900", "hqq4", "peer", 0, None, ROWS[0]["settings"]) | {"error": "RuntimeError: no\nroom"}
    page = results_page([*ROWS, failed], tmp_path / "dir", tmp_path / "out.md").text
    assert str(tmp_path) not in page
    assert "| **small** | 13.0 % | 10.0 % | .00211 ± .00021 |" in page
    assert "text0 | text1 |" in page and "1–16 | 17–20 |" in page
    assert "niah4-900 of hqq4 failed: `RuntimeError: no room`" in page and "quanto4 was not measured" in page
    assert "quanto2 takes fewer bytes than any of ours in fidelity" in page
    # bytes fall from line to line, behind the full cache
    tasks = page.split("### Contexts of 900 tokens")[1].splitlines()
    lines = [line.split(" | ")[0] for line in tasks if "<br>" in line]
    assert lines == ["| full cache", "| kivi4", "| **small**"]


@given(st.lists(st.tuples(st.floats(0.05, 1), st.floats(0.001, 1)), min_size=1, max_size=20), st.booleans())
def test_nothing_is_in_front_of_the_front(points, higher_is_better):
    marks = [Mark(str(number), "ours", *point) for number, point in enumerate(points)]
    sign = -1 if higher_is_better else 1
    best = front(marks, higher_is_better)
    for mark in marks:
        better = [m for m in best if m.share <= mark.share and sign * m.value <= sign * mark.value]
        assert better, "every mark is on the front or behind it"
    shares = [mark.share for mark in best]
    assert shares == sorted(shares) and [sign * m.value for m in best] == sorted(sign * m.value for m in best)[::-1]


CROWD = [
    Mark(f"cache-{n}", ("ours", "peer", "paper")[n % 3], 0.3 + n % 4 / 100, 0.001 * (1 + n % 5 / 20)) for n in range(16)
]


def test_names_in_a_crowd_cover_neither_each_other_nor_marks():
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw(axes, Panel("crowd", "KL", CROWD, scale="log"))
    figure.draw_without_rendering()
    texts = place_labels(axes, CROWD)
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == len(CROWD)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    spots = [axes.transData.transform((mark.share, mark.value)) for mark in CROWD]
    assert not any(box.contains(*spot) for box in boxes for spot in spots)


def test_pictures_are_pngs_of_all_panels():
    one, two = (imread(io.BytesIO(draw_panels([Panel("t", "y", CROWD)] * count))) for count in (1, 2))
    assert two.shape[1] > 1.8 * one.shape[1] and one.std() > 0.05


def test_the_command_refuses_what_is_no_suite(tmp_path):
    assert_refused(run("eval", "results", tmp_path, "--out", tmp_path / "page.md"), "dir", "has none", "eval all")
    held = {"format": FORMAT, "version": VERSION, "rows": ROWS}
    (tmp_path / "rows.json").write_text(json.dumps(held))
    assert_refused(run("eval", "results", tmp_path, "--out", tmp_path / "no" / "page.md"), "--out", "page.md")
    (tmp_path / "rows.json").write_text("[1]")
    assert_refused(run("eval", "results", tmp_path, "--out", tmp_path / "page.md"), "dir", "rows.json")
