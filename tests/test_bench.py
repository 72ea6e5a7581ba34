"""`deltakv bench`: every op is timed, and what is written says where and with what."""

import json

import pytest

pytest.importorskip("typer")
import torch  # noqa: E402
from commands import assert_refused, run  # noqa: E402

from deltakv_hf import DeltaKVCache  # noqa: E402
from deltakv_hf.evaluation import generating, kernels  # noqa: E402
from deltakv_hf.evaluation.pretending import pretend  # noqa: E402
from deltakv_hf.evaluation.shapes import random_compressor, shape_model  # noqa: E402


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


TINY = ("bench", "generate", "--shape", "tiny", "--device", "cpu", "--filter-layers", 0)


def test_generate_is_measured_row_by_row(tmp_path, monkeypatch):
    """What a file holds is not measured again; a row that fails does not end the others."""
    monkeypatch.setattr(generating, "NUM_STEPS", 12)
    file, png = tmp_path / "rows.json", tmp_path / "rows.png"
    kinds = "dynamic,static,quantized,deltakv,deltakv coarse,deltakv filter"
    result = run(*TINY, "--kinds", kinds, "--contexts", "300", "--batches", "1,2", "--json", file, "--png", png)
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(file.read_bytes())["rows"]
    assert [(row["kind"], row["batch"]) for row in rows] == [(kind, n) for kind in kinds.split(",") for n in (1, 2)]
    for row in rows:
        if row["kind"] != "quantized":
            assert min(row["step_ms"], row["token_ms"], row["tokens_s"]) > 0
            assert ("cache_bytes" in row) == row["kind"].startswith("deltakv")
    before = file.read_bytes()
    result = run(*TINY, "--kinds", "dynamic", "--contexts", "300", "--json", file)
    assert result.exit_code == 0 and "measured before" in result.output
    result = run(*TINY, "--kinds", "deltakv filter", "--contexts", "200", "--prefill", "--json", file)
    assert result.exit_code == 0, result.output
    assert json.loads(file.read_bytes())["rows"][:-1] == json.loads(before)["rows"]
    assert json.loads(file.read_bytes())["rows"][-1]["first_token_s"] > 0


def test_rows_of_different_length(tmp_path):
    file, ragged = tmp_path / "rows.json", ("--contexts", "800", "--batches", "2", "--ragged")
    for options in ((*ragged, "--released", "1"), ragged, (*ragged, "--prefill"), ragged[:-1]):
        result = run(*TINY, "--kinds", "deltakv", *options, "--json", file)
        assert result.exit_code == 0, result.output
    released, padded, read, even = json.loads(file.read_bytes())["rows"]
    assert padded["ragged"] and released["released"] == 1 and "error" not in read and read["tokens_s"] > 0
    assert padded["cache_bytes"] < even["cache_bytes"]
    assert_refused(run(*TINY, "--batches", "2", "--released", "2"), "--released", "2")


def test_a_step_of_a_filled_cache_is_that_of_a_read_one():
    """As many tokens of as many bytes: of a cache that was filled with random codes only these are not real."""
    model = shape_model("tiny", torch.device("cpu"), torch.float32)
    caches = [DeltaKVCache(model, compressor=random_compressor(model), max_cache_len=512) for _ in range(2)]
    model.set_attn_implementation("deltakv")
    with torch.no_grad():
        pretend(caches[0], model, [400, 400])
        model(torch.zeros(2, 400, dtype=torch.int64), past_key_values=caches[1])
        for cache in caches:
            assert model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache).logits.isfinite().all()
    reports = [cache.memory_report() for cache in caches]
    assert reports[0] == reports[1] and caches[0].get_seq_length() == 401


def test_rows_that_cannot_be_are_refused(tmp_path):
    assert_refused(run(*TINY, "--kinds", "dense"), "--kinds", "dense")
    assert_refused(run(*TINY, "--contexts", "3k"), "--contexts", "3k")
    assert_refused(run(*TINY, "--batches", "0"), "--batches", "0")
    assert_refused(run("bench", "generate"), "--shape", "--model")
    assert_refused(run("bench", "generate", "--shape", "70b"), "--shape", "70b")
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"environment": {"device": "another"}, "rows": []}))
    assert_refused(run(*TINY, "--json", file), "--json", "rows.json")
    assert json.loads(file.read_text())["environment"] == {"device": "another"}
