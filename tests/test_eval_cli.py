"""`deltakv eval`: what its commands print, write and refuse, on a tiny model."""

import json
import re

import pytest
from commands import assert_refused, run
from compressors import random_compressor
from helpers import TIGHT
from models import byte_llama, byte_tokenizer

from deltakv_hf.cli import eval_fidelity, eval_tasks
from deltakv_hf.evaluation import peers

FIDELITY = ["--context", 300, "--predict", 20, "--windows", 2, "--device", "cpu"]
TASKS = ["--length", 900, "--contexts", 2, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random llama with a tokenizer, saved."""
    path = tmp_path_factory.mktemp("llama")
    byte_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("chunk", [0, 100])
def test_fidelity_measures_texts_and_says_how(folder, tmp_path, chunk):
    text, out = tmp_path / "mine.txt", tmp_path / "out.json"
    text.write_text("A text of many words. " * 40)
    options = ["--options", json.dumps(TIGHT), "--options", '{"nbits": 8}', "--prefill-chunk", chunk]
    result = run("eval", "fidelity", text, "--model", folder, *FIDELITY, *options, "--json", out)
    assert result.exit_code == 0, result.output
    assert "nbits=8" in result.output and "recent_window=8" in result.output and "± " in result.output
    found = json.loads(out.read_text())
    assert found["command"].startswith("deltakv") and found["environment"]["dtype"] == "float32"
    assert (found["context"], found["predict"], found["prefill_chunk"]) == (300, 20, chunk)
    rows = found["results"]
    assert [row["options"] for row in rows] == [TIGHT, {"nbits": 8}]
    for row in rows:
        assert row["windows"] == 2 and 0 < row["compressed_share"] < row["stored_share"] < 1
        assert [(w["text"], w["window"]) for w in row["per_window"]] == [("mine.txt", 0), ("mine.txt", 1)]
        assert sum(w["kl"] for w in row["per_window"]) / 2 == pytest.approx(row["kl"])


def test_fidelity_of_the_default_cache_on_the_bundled_text(folder, tmp_path):
    out = tmp_path / "out.json"
    result = run("eval", "fidelity", "--model", folder, *FIDELITY, "--json", out)
    assert result.exit_code == 0, result.output
    assert "DeltaKVCache" in result.output
    row = json.loads(out.read_text())["results"][0]
    assert row["options"] == {} and row["per_window"][0]["text"] == "persuasion.txt"


def test_tasks_are_scored_beside_the_full_cache(folder, tmp_path):
    out = tmp_path / "out.json"
    options = ["--length", 1000, "--options", json.dumps(TIGHT), "--json", out]
    result = run("eval", "tasks", "niah4", "few_shot", "--model", folder, *TASKS, *options)
    assert result.exit_code == 0, result.output
    assert "niah4: " in result.output and "few_shot: " in result.output and "full cache" in result.output
    assert "…" not in result.output and re.search(r"[+-]\.\d\d to [+-]\.\d\d", result.output)
    rows = json.loads(out.read_text())["results"]
    names = ["full cache", ", ".join(f"{option}={value}" for option, value in TIGHT.items())]
    assert [(row["task"], row["length"], row["cache"]) for row in rows] == [
        (task, length, name) for task in ("niah4", "few_shot") for length in (900, 1000) for name in names
    ]
    assert "options" not in rows[0] and rows[1]["options"] == TIGHT
    assert rows[1]["items"] == len(rows[1]["per_item"]) == 8 and rows[1]["compressed_share"] > 0


@pytest.mark.parametrize("command, arguments", [("fidelity", FIDELITY), ("tasks", ["passkey", *TASKS])])
def test_peers_are_measured_and_their_bytes_counted(folder, tmp_path, monkeypatch, command, arguments):
    monkeypatch.setitem(peers.PEERS, "kivi4", peers._kivi(4, 8))
    out = tmp_path / "out.json"
    result = run("eval", command, "--model", folder, *arguments, "--peer", "kivi4", "--json", out)
    assert result.exit_code == 0, result.output
    assert "KIVI, 4 bits, groups of 8" in result.output and "DeltaKVCache" not in result.output
    row = json.loads(out.read_text())["results"][-1]
    # a float32 model: 8 bits a number of 32, and few tokens raw
    assert row["peer"] == "kivi4" and 0.25 < row["stored_share"] < 0.28


def test_predicted_tokens_may_come_in_chunks(folder, tmp_path):
    out = tmp_path / "out.json"
    options = ["--options", json.dumps(TIGHT), "--predict-chunk", 4, "--json", out]
    result = run("eval", "fidelity", "--model", folder, *FIDELITY, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["predict_chunk"] == 4


@pytest.mark.parametrize("seed", [None, 3])
def test_generation_is_read_by_the_full_cache(folder, tmp_path, seed):
    out = tmp_path / "out.json"
    options = ["--options", json.dumps(TIGHT), "--context", 60, "--new-tokens", 20, "--prompts", 2, "--json", out]
    options += [] if seed is None else ["--seed", seed]
    result = run("eval", "generation", "--model", folder, "--device", "cpu", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert (found["context"], found["new_tokens"], found["prompts"], found["seed"]) == (60, 20, 2, seed)
    full, own = found["results"]
    assert full["agreement"] == 20 and full["nll"] == full["full_nll"] == own["full_nll"]
    assert own["options"] == TIGHT and 0 < own["stored_share_16bit"] < 1
    assert (own["nll"] == full["nll"]) == (own["agreement"] == 20)
    assert "full cache" in result.output and ("greedy" if seed is None else "drawn with seed 3") in result.output


def test_tasks_take_texts(folder, tmp_path):
    text, classes = tmp_path / "hay.txt", [tmp_path / "a.txt", tmp_path / "b.txt"]
    text.write_text("Hay and more hay. " * 9)
    for path in classes:
        path.write_text("".join(f"the {path.stem} kind of line, number {i}\n" for i in range(20)))
    texts = ["--text", text, "--classes", classes[0], "--classes", classes[1], "--json", tmp_path / "out.json"]
    result = run("eval", "tasks", "passkey", "few_shot", "--model", folder, *TASKS, *texts)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["text"], found["classes"]) == ("hay.txt", ["a.txt", "b.txt"])


@pytest.mark.parametrize("command, module", [("fidelity", eval_fidelity), ("tasks", eval_tasks)])
def test_an_interrupt_leaves_the_old_file(folder, tmp_path, monkeypatch, command, module):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_tasks" if command == "tasks" else "measure_fidelity", interrupted)
    out = tmp_path / "out.json"
    out.write_text("old")
    result = run("eval", command, "--model", folder, *(TASKS if command == "tasks" else FIDELITY), "--json", out)
    assert result.exit_code != 0 and not isinstance(result.exception, AttributeError)
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", ["fidelity", "tasks"])
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--options", "{nbits: 8}"], ["--options", "{nbits: 8}", "JSON"]),
        (["--options", "[8]"], ["--options", "[8]", "object"]),
        (["--options", '{"nbits": 3}'], ["nbits", "2, 4, 8", 3]),
        (["--options", '{"nbit": 4}'], ["nbit", "Did you mean `nbits`?"]),
        (["--peer", "kivy4"], ["peer", "Did you mean `kivi4`?"]),
        (["--peer", "kivi4"], ["group_size", 32, "head dimension 8"]),
        (["--json", "missing/out.json"], ["--json", "missing/out.json"]),
        (["--dtype", "int8"], ["dtype", "int8"]),
    ],
)
def test_bad_options_are_refused(folder, command, arguments, words):
    assert_refused(run("eval", command, "--model", folder, *arguments), *words)


def test_texts_and_tasks_that_are_not_there_are_refused(folder, tmp_path):
    missing = tmp_path / "missing.txt"
    assert_refused(run("eval", "fidelity", missing, "--model", folder), "text", missing)
    missing.write_text("too short")
    assert_refused(run("eval", "fidelity", missing, "--model", folder), "text", 4096, "missing.txt")
    assert_refused(run("eval", "tasks", "niah", "--model", folder), "task", "niah", "Did you mean `niah4`?")
    assert_refused(run("eval", "tasks", "niah4", "--model", folder, "--length", 10), "num_tokens")
    assert_refused(run("eval", "tasks", "passkey", "--model", folder, "--length", 4090), "lengths", 4096)


@pytest.fixture(scope="module")
def compressor(tmp_path_factory) -> str:
    """One for the model, saved."""
    path = tmp_path_factory.mktemp("compressor") / "mine"
    random_compressor(byte_llama()).save_pretrained(path)
    return str(path)


def test_compressors_go_by_name_and_show_their_own_bytes(folder, compressor, tmp_path):
    out = tmp_path / "out.json"
    result = run("eval", "fidelity", "--model", folder, *FIDELITY, "--compressor", compressor, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"][0]
    assert found["compressor"] == compressor and found["compressor_bytes"] > 0 and found["break_even_tokens"] > 0
    assert f"as many as {found['break_even_tokens']:,.0f} compressed tokens" in " ".join(result.output.split())

    result = run("eval", "tasks", "niah4", "--model", folder, *TASKS, "--compressor", compressor, "--json", out)
    assert result.exit_code == 0, result.output
    full, own = json.loads(out.read_text())["results"]
    assert full["compressor_bytes"] == 0 < own["compressor_bytes"] and own["break_even_tokens"] > 0
    assert " ".join(result.output.split()).count("the compressor itself, shared by all caches") == 1


def test_a_compressor_that_is_not_there_is_refused_before_the_model_is_loaded():
    for command in ("fidelity", "tasks"):
        assert_refused(run("eval", command, "--model", "nowhere", "--compressor", "mine"), "id_or_path", "mine")


def test_options_may_name_a_compressor(folder, compressor, tmp_path):
    """For those that go with one: what steps of one token choose is measured in such steps."""
    out = tmp_path / "out.json"
    chosen = {"compressor": compressor, "selection": "coarse_to_fine", "keep": 9, "index_bytes": 2}
    options = [part for one in ({"compressor": compressor}, chosen) for part in ("--options", json.dumps(one))]
    result = run("eval", "fidelity", "--model", folder, *FIDELITY, *options, "--json", out)
    assert result.exit_code == 0, result.output
    every, some = json.loads(out.read_text())["results"]
    assert every["options"] == {"compressor": compressor} and some["options"] == chosen
    assert every["stored_share"] == some["stored_share"] and every["kl"] != some["kl"]
    assert_refused(
        run("eval", "fidelity", "--model", folder, "--options", '{"compressor": "nobody/knows"}'), "nobody/knows"
    )
