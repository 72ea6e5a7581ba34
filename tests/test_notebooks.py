"""The notebooks of examples/: what is committed is what they print, and from top to bottom they still run."""

import base64
import json
import re

import pytest

pytest.importorskip("nbclient", reason="notebooks need the packages of the `dev` extra")

import nbformat
from notebooks import FOLDER, NAMES, execute, read

from deltakv_hf import DeltaKVError
from deltakv_hf.evaluation.model import find_gguf

# what must never be in an output: places of some machine, warnings, bars of progress
NOISE = re.compile(r"(?<![\w.])/(home|root|work|tmp|usr|opt|Users|content|var)/|Warning|it/s\]|\bTraceback\b|\x1b\[")
COLAB = "https://colab.research.google.com/github/deltakv-hf/deltakv-hf/blob/main/examples/notebooks/{}.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook):
    """Every code cell has run, in order; what should print or draw does; nothing else is printed."""
    pictures = 0
    for number, cell in enumerate(code_cells(notebook), start=1):
        assert cell.execution_count == number, cell.id
        assert all(out.output_type in ("stream", "display_data") for out in cell.outputs), cell.id
        printed = "".join(out.text for out in cell.outputs if out.output_type == "stream")
        assert bool(printed.strip()) == ("print(" in cell.source), cell.id
        assert not any(out.get("name") == "stderr" for out in cell.outputs), printed
        assert not NOISE.search(printed), f"{cell.id}: {NOISE.search(printed)}"
        drawn = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
        assert len(drawn) == cell.source.count("plt.show()"), cell.id
        assert all(base64.b64decode(png).startswith(b"\x89PNG") for png in drawn)
        pictures += len(drawn)
    assert pictures >= 1


def test_there_are_four():
    assert NAMES == ["benchmark", "calibrate_and_push", "joint_encoding", "quickstart"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed(name):
    notebook = read(name)
    nbformat.validate(notebook)
    check_outputs(notebook)
    title, install = notebook.cells[:2]
    assert title.source.startswith("# ") and f"]({COLAB.format(name)})" in title.source
    assert "find_spec(" in install.source and "git+https://github.com/deltakv-hf/deltakv-hf" in install.source
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert all(not cell.metadata for cell in notebook.cells)
    # as nbformat writes it, so that a diff is what was changed
    raw = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert raw == nbformat.writes(notebook) + "\n" and len(raw) < 200_000
    assert set(json.loads(raw)["metadata"]) == {"accelerator", "colab", "kernelspec", "language_info"}


@pytest.fixture(scope="module")
def demo_model():
    try:
        find_gguf()
    except DeltaKVError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, demo_model):
    check_outputs(execute(name))
