"""A suite of measurements: what is stored, what a broken-off run does again, what does not go together."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import assert_refused, run
from compressors import random_compressor
from helpers import LOSSLESS, TIGHT
from models import byte_llama, byte_tokenizer, saved_byte_llama

from deltakv_hf import DeltaKVCache, InvalidOptionError
from deltakv_hf.cli import eval_all
from deltakv_hf.evaluation import peers, suite
from deltakv_hf.evaluation.bytes16 import Bytes16
from deltakv_hf.evaluation.candidates import PEER, Candidate
from deltakv_hf.evaluation.kivi import KiviCache
from deltakv_hf.evaluation.measurements import (
    Bench,
    FidelityMeasurement,
    GenerationMeasurement,
    TaskMeasurement,
    measure,
)
from deltakv_hf.evaluation.plan import PRESSES, default_candidates, full_plan, quick_plan

PLAN = [
    FidelityMeasurement("fidelity", context=300, predict=20, windows=1),
    TaskMeasurement("niah4-900", "niah4", context=900, contexts=1),
    GenerationMeasurement("generation", context=60, new_tokens=6, prompts=2),
]
OURS = Candidate("tight", {"options": TIGHT}, lambda model: DeltaKVCache(model, **TIGHT))
KIVI = Candidate("KIVI", {"peer": "kivi"}, lambda model: KiviCache(model.config, group_size=8, residual_length=8), PEER)
MODEL = byte_llama()


@pytest.fixture
def bench():
    return Bench(MODEL, byte_tokenizer())


def test_a_run_that_was_broken_off_measures_the_rest_alone(bench, tmp_path):
    calls = []

    def counted(measurement, candidate, bench):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((measurement.name, candidate.name))
        return measure(measurement, candidate, bench)

    cells = suite.open_cells(PLAN, [OURS, KIVI], bench, tmp_path)
    # fidelity is compared with the full cache and not measured of it
    assert len(cells) == 8
    with pytest.raises(KeyboardInterrupt):
        suite.run_cells(cells, bench, tmp_path, "typed", measure=counted)
    rest = suite.open_cells(PLAN, [OURS, KIVI], bench, tmp_path)
    assert rest == cells[3:] and len(suite.read_folder(tmp_path)) == 3
    suite.run_cells(rest, bench, tmp_path, "typed")
    assert suite.open_cells(PLAN, [OURS, KIVI], bench, tmp_path) == []
    rows = suite.read_folder(tmp_path)
    assert len(rows) == 8
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"full-cache.json", "kivi.json", OURS.file_name}
    for row in rows:
        assert row["command"] == "typed" and row["environment"]["torch"] and row["environment"]["commit"]
        assert row["settings"]["texts"] and row["seconds"] > 0 and row["settings"]["dtype"] == "float32"
        assert row["region"]["stored_share_16bit"] == "whole cache"


def test_a_measurement_is_the_same_alone_and_among_others(bench, tmp_path):
    """The full cache's part is made once for all, or once more."""
    suite.run_cells(suite.open_cells(PLAN, [KIVI, OURS], bench, tmp_path / "a"), bench, tmp_path / "a", "")
    new = Bench(MODEL, byte_tokenizer())
    suite.run_cells(suite.open_cells(PLAN, [OURS], new, tmp_path / "b"), new, tmp_path / "b", "")
    for name in (OURS.file_name, "full-cache.json"):
        pairs = zip(suite.read_rows(tmp_path / "a" / name), suite.read_rows(tmp_path / "b" / name), strict=True)
        assert all(one["figures"] == other["figures"] for one, other in pairs)


def test_a_cache_that_fails_is_noted_and_measured_again(bench, tmp_path):
    def broken(model):
        raise RuntimeError("does not fit")

    broken = Candidate("broken", {"peer": "broken"}, broken, PEER)
    cells = suite.open_cells(PLAN[:1], [broken, OURS], bench, tmp_path)
    rows = suite.run_cells(cells, bench, tmp_path, "")
    assert rows[0]["error"] == "RuntimeError: does not fit" and "figures" in rows[1]
    assert suite.open_cells(PLAN[:1], [broken, OURS], bench, tmp_path) == cells[:1]


def test_what_does_not_go_together_is_refused(bench, tmp_path):
    suite.run_cells(suite.open_cells(PLAN[:1], [OURS], bench, tmp_path), bench, tmp_path, "")
    other = [FidelityMeasurement("fidelity", context=299, predict=20, windows=1)]
    with pytest.raises(InvalidOptionError, match="`--out` .* differs in context: name another folder"):
        suite.open_cells(other, [OURS], bench, tmp_path)
    text = tmp_path / "mine.txt"
    text.write_text("words " * 200)
    with pytest.raises(InvalidOptionError, match="differs in texts"):
        suite.open_cells(PLAN[:1], [OURS], Bench(MODEL, byte_tokenizer(), [text]), tmp_path)
    (tmp_path / "kivi.json").write_bytes((tmp_path / OURS.file_name).read_bytes())
    with pytest.raises(InvalidOptionError, match="one cache a file"):
        suite.open_cells(PLAN[:1], [KIVI], bench, tmp_path)
    with pytest.raises(InvalidOptionError, match="different names"):
        suite.open_cells(PLAN[:1], [OURS, OURS], bench, tmp_path)
    (tmp_path / "kivi.json").write_text("{}")
    with pytest.raises(InvalidOptionError, match="format version 1 alone"):
        suite.read_folder(tmp_path)
    with pytest.raises(InvalidOptionError, match="has none"):
        suite.read_folder(tmp_path / "nowhere")


def test_bytes_are_those_of_a_16_bit_model_and_measured_once(bench):
    """A float32 model holds twice the raw bytes, and the same codes."""
    made = []

    def make(model):
        made.append(model.dtype)
        return DeltaKVCache(model, **TIGHT)

    counted = Candidate("counted", {}, make)
    shares = bench.bytes16.shares(counted, 400)
    assert shares == bench.bytes16.shares(counted, 400) and [str(dtype) for dtype in made] == ["torch.bfloat16"]
    in_float32 = Bytes16(MODEL, bench.bytes16.ids)
    in_float32._half = MODEL
    other = in_float32.shares(counted, 400)
    assert 1.8 < shares["compressed_share_16bit"] / other["compressed_share_16bit"] <= 2
    assert shares["region"] == {
        "stored_share_16bit": "whole cache",
        "compressed_share_16bit": "compressed tokens",
    }
    lossless = Candidate("lossless", {}, lambda model: DeltaKVCache(model, **LOSSLESS))
    assert "compressed_share_16bit" not in bench.bytes16.shares(lossless, 60)


def test_plans_measure_every_kind():
    for plan in (quick_plan(), full_plan()):
        names = [measurement.name for measurement in plan]
        assert len(set(names)) == len(names)
        assert {measurement.kind for measurement in plan} == {"fidelity", "task", "generation"}
        assert any(m.kind == "fidelity" and m.predict_chunk for m in plan)
    assert {m.task for m in full_plan() if m.kind == "task"} > {m.task for m in quick_plan() if m.kind == "task"}
    options, compressors, others = default_candidates(full=False, demo=True)
    assert (options, len(compressors), others) == (["{}"], 2, ["kivi4", "kivi2"])
    assert default_candidates(full=True, demo=False) == (["{}"], [], [*peers.PEERS, *PRESSES])


@pytest.fixture
def tiny_plans(monkeypatch):
    monkeypatch.setattr(eval_all, "quick_plan", lambda: PLAN)
    monkeypatch.setattr(eval_all, "full_plan", lambda: PLAN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_byte_llama(tmp_path_factory.mktemp("llama"))


def test_the_command_goes_on_and_lists_what_is_not_installed(folder, tmp_path, monkeypatch, tiny_plans):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    # no environment for presses either
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(peers.PEERS, "kivi4", peers._kivi(4, 8))
    out = tmp_path / "out"
    command = ["eval", "all", "--model", folder, "--device", "cpu", "--out", out]
    result = run(*command, "--full")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "quanto4 is not installed: pip install optimum-quanto" in words
    assert "snapkv-0.5 is not installed: `deltakv eval peers` makes it, once." in words
    assert "kivi2 cannot be measured with this model: `group_size` must divide the head dimension 8" in words
    assert {path.name for path in out.glob("[!.]*")} == {"DeltaKVCache.json", "full-cache.json", "kivi4.json"}
    assert "8 measurements in" in words
    assert "0 measurements in" in run(*command, "--full").output
    page = tmp_path / "page.md"
    result = run("eval", "results", out, "--out", page)
    assert result.exit_code == 0, result.output
    assert "| kivi4 |" in page.read_text() and (tmp_path / "page" / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_named_caches_are_measured_alone(folder, tmp_path, tiny_plans):
    model = byte_llama()
    random_compressor(model).save_pretrained(tmp_path / "mine")
    joint = json.dumps({"cache": "joint", "residual": str(tmp_path / "mine")})
    command = ["eval", "all", "--model", folder, "--device", "cpu", "--out", tmp_path / "out"]
    result = run(*command, "--compressor", tmp_path / "mine", "--options", joint)
    assert result.exit_code == 0, result.output
    rows = suite.read_folder(tmp_path / "out")
    assert {row["cache"] for row in rows} == {"full cache", "mine", "cache=joint, residual=mine"}
    # no place of this machine is stored
    assert all(str(tmp_path) not in json.dumps(row) for row in rows)
    for figure in ("kl", "nll"):
        one, other = (row["figures"][figure] for row in rows if row["measurement"] == "fidelity")
        assert one == pytest.approx(other, rel=0.2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--peer", "kivi4"], ["group_size", "head dimension 8"]),
        (["--peer", "kivy4"], ["peer", "Did you mean `kivi4`?"]),
        (["--options", '{"cache": "dense"}'], ["--options", "deltakv or joint", "dense"]),
    ],
)
def test_what_is_named_and_cannot_be_measured_is_refused(folder, tmp_path, arguments, words):
    assert_refused(run("eval", "all", "--model", folder, "--out", tmp_path / "out", *arguments), *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_asked_for(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run("eval", "all", "--model", folder, "--out", tmp_path / "file"), "--out", "file")


def test_processes_that_store_at_once_lose_nothing(tmp_path):
    rows = [{"measurement": f"m{number}"} for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: suite._store(tmp_path / "one.json", row), rows))
    assert sorted(row["measurement"] for row in suite.read_rows(tmp_path / "one.json")) == sorted(
        row["measurement"] for row in rows
    )
    # the lock is no file of results
    assert len(suite.read_folder(tmp_path)) == 24
