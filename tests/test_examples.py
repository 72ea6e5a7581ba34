"""The scripts of examples/ do what they say, on the model that comes with the demo."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from models import saved_byte_llama

from deltakv_hf import DeltaKVError
from deltakv_hf.compressor.kv_compressor import KINDS
from deltakv_hf.evaluation.model import find_gguf

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# those that are here for the corpus of the bundled compressors: tests/test_build_corpus.py
CORPUS = {"build_corpus", "corpus_packages", "corpus_text"}
SCRIPTS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - CORPUS)
RUN_HERE = {"calibrate_and_push", "chat", "long_document", "own_compressor", "quickstart", "save_and_resume"}


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Function `(name, *arguments)` that runs a script here and gives what it prints."""
    try:
        find_gguf()
    except DeltaKVError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert not list(tmp_path.iterdir()), "it left something behind"
        return capfd.readouterr().out

    return call


def test_all_are_short_and_listed():
    assert set(SCRIPTS) == RUN_HERE | {"shared_prompt"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh"), *EXAMPLES.glob("notebooks/*.ipynb")]:
        assert f"]({path.relative_to(EXAMPLES)})" in listed
    for name in SCRIPTS:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 60, name
        assert f"python examples/{name}.py" in source.splitlines()[0]


def test_quickstart(run):
    printed = run("quickstart")
    assert re.search(r"^782 tokens, 640 of them compressed$", printed, re.MULTILINE)
    assert re.search(r"^stored .* 30\.\d%$", printed, re.MULTILINE)


def test_chat(run, monkeypatch):
    printed = run("chat", "--max-new-tokens", "48")
    tokens = [int(count) for count in re.findall(r"for (\d+) tokens", printed)]
    compressed = [int(count) for count in re.findall(r"; (\d+) tokens compressed", printed)]
    assert len(tokens) == 3 and tokens == sorted(tokens) and compressed[0] == 0 < compressed[-1]

    typed = iter(["Name a colour.", ""])
    monkeypatch.setattr("builtins.input", lambda sign: next(typed))
    assert run("chat", "--interactive", "--max-new-tokens", "2").count("of a full cache") == 1


def test_long_document(run):
    printed = run("long_document", "--tokens", "1000")
    answers = re.findall(r"\.\.\. (\S+) \(true: (\d+);", printed)
    assert len(answers) == 3 and all(answer == true for answer, true in answers), printed


def test_shared_prompt(run):
    printed = run("shared_prompt")
    dense, joint = (float(size) for size in re.findall(r"Cache *([\d.]+) MiB", printed))
    assert "\nthe same tokens\n" in printed and joint < 0.4 * dense


def test_save_and_resume(run):
    printed = run("save_and_resume")
    assert re.search(r"saved ([\d.]+) MiB", printed) and "in another process" in printed
    assert "... In short, Sir Walter was" in printed


def test_own_compressor(run):
    try:
        figures = re.findall(r"^(.+): ([\d.]+)% of dense, KL ([\d.]+)$", run("own_compressor"), re.MULTILINE)
    finally:
        KINDS.pop("principal", None)
    assert [name for name, *_ in figures] == ["mine", "without any"]
    assert all(float(share) < 15 and float(kl) < 0.02 for _, share, kl in figures)


def test_calibrate_and_push(tmp_path, monkeypatch, capsys):
    """With a tiny model, to be done in seconds."""
    script, model, out = str(EXAMPLES / "calibrate_and_push.py"), saved_byte_llama(tmp_path / "model"), tmp_path / "out"
    command = [script, "--model", model, "--ratio", "4", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    # without a repository nothing goes anywhere: tests are offline
    runpy.run_path(script, run_name="__main__")
    assert f"saved to {out}\n" in capsys.readouterr().out

    # TRANSFORMERS_OFFLINE counts for the Hub, too; in another process, because its address is read at the import
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with LoopbackHub() as hub:
        env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
        command = [sys.executable, *command, "--repo", "someone/small"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        _, pushed = hub.commits["someone/small"][-1]
    assert f"uploaded: {hub.url}/someone/small/commit/" in done.stdout and "of them compressed" in done.stdout
    assert (
        {"config.json", "compressor.safetensors", "README.md"} == pushed.keys() == {file.name for file in out.iterdir()}
    )
    assert pushed["compressor.safetensors"] == (out / "compressor.safetensors").read_bytes()
    assert b"someone/small" in pushed["README.md"]
