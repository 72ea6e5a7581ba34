"""docs/results.md is what its rows say, and no more: made again from the JSON that it names, it is the same page."""

import re
from pathlib import Path

from deltakv_hf.cli.eval_results import results_page
from deltakv_hf.evaluation.suite import read_folder

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_of_its_rows():
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    folder, out = re.search(r"`deltakv eval results (\S+) --out (\S+)`", text).groups()
    rows = read_folder(ROOT / folder)
    page = results_page(rows, Path(folder), Path(out))
    assert page.text == text
    assert {path.name for path in (ROOT / out).with_suffix("").iterdir()} == set(page.pictures)
    for row in rows:
        # what a figure must carry
        assert row["command"] and row["environment"]["transformers"] and row["environment"]["commit"]
