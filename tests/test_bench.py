"""`deltakv bench`: every op is timed, and what is written says where and with what."""

import json

import pytest

pytest.importorskip("typer")
from commands import assert_refused, run  # noqa: E402

from deltakv_hf.evaluation import kernels  # noqa: E402


def test_kernels_are_timed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "RUNS", ((4, 1), (2, 3)))
    file, png = tmp_path / "kernels.json", tmp_path / "kernels.png"
    result = run("bench", "kernels", "--num-tokens", 2048, "--device", "cpu", "--json", file, "--png", png)
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    made = json.loads(file.read_bytes())
    assert made["command"].startswith("deltakv") and made["environment"]["torch"]
    rows = {(row["op"], row["what"]): row for row in made["rows"]}
    assert {op for op, _ in rows} >= {"nearest_references", "vector_quantize", "reconstruct_and_attend"}
    assert all(row["ms"] > 0 and row["share"] == pytest.approx(row["roofline_ms"] / row["ms"]) for row in made["rows"])
    # 10 components of 1,024 numbers of keys, and 32 queries that mix them
    whole = rows["reconstruct_and_attend", "all of 2,048"]
    assert whole["bytes"] == 2048 * 6 and whole["flops"] == 2 * 2048 * 10 * (1024 + 32)
    assert rows["nearest_references", "2,048 tokens"]["flops"] == 2 * 10 * sum(n // 10 + 1 for n in range(2048))


def test_what_cannot_run_is_refused(tmp_path):
    command = "bench", "kernels", "--device", "cpu"
    assert_refused(run(*command, "--backend", "cuda"), "backend", "cuda")
    assert_refused(run(*command, "--json", tmp_path / "none" / "x.json"), "--json")
