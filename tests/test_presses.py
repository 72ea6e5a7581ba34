"""Presses of kvpress: what the process that measures them computes, how it is started, and its environment.

A stand-in for kvpress, installed from a wheel, keeps every other token; the real one is run where its environment is.
"""

import importlib.util
import json
import os
import re
import sys
import time
import zipfile
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from commands import assert_refused, run
from helpers import prompt
from models import saved_byte_llama, tiny_model
from transformers import DynamicCache

from deltakv_hf import DeltaKVError, InvalidOptionError
from deltakv_hf.cli import eval_all, eval_peers
from deltakv_hf.evaluation import fidelity, press_environment, press_process, presses, scores
from deltakv_hf.evaluation.items import Item
from deltakv_hf.evaluation.measurements import FidelityMeasurement, GenerationMeasurement, TaskMeasurement
from deltakv_hf.evaluation.peers import PRESSES, pick_peer
from deltakv_hf.evaluation.press_environment import check_environment, environment_folder, make_environment
from deltakv_hf.evaluation.presses import PressModel, measure_press_fidelity, pick_press

REAL_ENVIRONMENT = environment_folder()
KVPRESS = """
from contextlib import contextmanager


class Press:
    def __init__(self, compression_ratio=0.0, press=None, key_channel_compression_ratio=0.0):
        self.keeps_all = not (press or compression_ratio or key_channel_compression_ratio)
        if press:
            self.keeps_all = press.keeps_all

    @contextmanager
    def __call__(self, model):
        print("no answer")
        hooks = [layer.self_attn.register_forward_hook(self.drop, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def drop(self, module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        step = 1 if self.keeps_all else 2
        layer.keys, layer.values = (states[:, :, ::step].clone() for states in (layer.keys, layer.values))


SnapKVPress = ChunkKVPress = ExpectedAttentionPress = KVzipPress = KeyDiffPress = StreamingLLMPress = ThinKPress = Press
"""


def load(name: str, path: Path):
    """The module in a file, in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load("press_worker", press_process.WORKER)


@pytest.fixture(scope="module")
def kvpress(tmp_path_factory):
    """The stand-in as a module of this process."""
    path = tmp_path_factory.mktemp("kvpress") / "kvpress.py"
    path.write_text(KVPRESS)
    return load("kvpress", path)


@pytest.fixture
def cache_home(tmp_path, monkeypatch) -> Path:
    """An empty folder for what is made once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "deltakv-hf"


# -- what the process computes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 128, 300])
def test_logits_are_compared_as_in_this_process(num_tokens):
    logits, full_logits = torch.randn(2, num_tokens, 50) * 3
    targets = torch.randint(50, (num_tokens,))
    found = worker.compare(logits, full_logits, targets)
    names = ["kl", "top1", "nll", "full_nll"]
    assert [found[name] for name in names] == list(fidelity.compare(logits, full_logits, targets))
    assert list(found) == names and found["kl"] > 0


def test_items_are_scored_as_in_this_process():
    model, ids = tiny_model("llama"), prompt(1, 40)[0]
    item, cache = Item(ids[:5].tolist(), ids[7:11].tolist()), DynamicCache(config=model.config)
    model(ids[None], past_key_values=cache)
    found = worker.score_item(model, cache, 40, vars(item))
    assert found == vars(scores.score_item(model, cache, item)) and cache.get_seq_length() == 40


def test_what_follows_sees_what_was_kept_from_its_true_position(kvpress):
    """As with all tokens in one call, where those behind the context are kept from seeing the ones dropped."""
    model, ids = tiny_model("llama"), prompt(1, 50)
    cache = worker.prefill(model, ids[0, :40].tolist(), kvpress.Press(0.5))
    logits = worker.feed_behind(model, ids[0, 40:].tolist(), cache, 40, 10)
    sees = torch.ones(50, 50, dtype=torch.bool).tril()
    sees[40:, 1:40:2] = False
    expected = model(ids, attention_mask=sees[None, None]).logits[0, 40:]
    torch.testing.assert_close(logits, expected)
    assert cache.get_seq_length() == 30


def test_a_window_is_measured_beside_the_full_cache_and_bytes_are_those_held(kvpress):
    model, ids = tiny_model("llama"), prompt(1, 70)[0]
    measured = {"all": kvpress.Press(), "half": kvpress.Press(0.5)}
    found = worker.measure_window(model, {"ids": ids.tolist(), "context": 60}, measured)
    assert abs(found["all"]["kl"]) < 1e-6 < found["half"]["kl"]
    assert (found["all"]["stored_share"], found["half"]["stored_share"]) == (1, 0.5)
    expected = fidelity.measure_fidelity(model, [ids], {"full": lambda: DynamicCache(config=model.config)}, context=60)
    assert found["half"]["full_nll"] == pytest.approx(expected["full"].mean("full_nll"), rel=1e-5)


def test_tokens_that_are_masked_are_held_and_so_is_the_list_of_them():
    model = tiny_model("llama")
    cache = worker.prefill(model, prompt(1, 20)[0].tolist())
    held, attention = worker.held_bytes(model, cache), model.model.layers[1].self_attn
    attention.masked_key_indices = tuple(torch.arange(7) for _ in range(3))
    try:
        assert worker.held_bytes(model, cache) == held + 3 * 7 * 8
    finally:
        del attention.masked_key_indices


def test_calls_become_shorter_where_no_key_masks_for_all_their_queries():
    """As KVzip's masks do, the last layer refuses, when those before it have taken the tokens in."""
    model, ids = tiny_model("llama"), prompt(1, 50)[0].tolist()
    expected = worker.feed_behind(model, ids[40:], worker.prefill(model, ids[:40]), 40, 7)

    def refuse(module, args, kwargs):
        if kwargs["hidden_states"].shape[1] > limit:
            raise ValueError("Could not find fake keys")

    cache = worker.prefill(model, ids[:40])
    hook = model.model.layers[-1].self_attn.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        limit = 3
        torch.testing.assert_close(worker.feed_behind(model, ids[40:], cache, 40, 7), expected)
        assert cache.get_seq_length() == 50
        limit = 0
        with pytest.raises(ValueError, match="fake keys"):
            worker.feed_behind(model, ids[40:], cache, 50, 7)
    finally:
        hook.remove()


# -- how the process is started ----------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Puts a script in the worker's place."""

    def write(text: str) -> None:
        path = tmp_path / "worker.py"
        path.write_text(text)
        monkeypatch.setattr(press_process, "WORKER", path)

    return write


def test_answers_come_one_by_one_and_the_environment_comes_first(script, tmp_path):
    script(
        "import json, sys\njob = json.load(open(sys.argv[1]))\nprint(json.dumps(job))\nprint(json.dumps(sys.path[1]))"
    )
    assert list(press_process.answers(tmp_path / "there", {"a": 1})) == [{"a": 1}, str(tmp_path / "there")]


@pytest.mark.parametrize(
    "text, said",
    [("raise KeyError('here')", "KeyError: 'here'"), ("import sys\nsys.exit(3)", r"\(3\): it said nothing")],
)
def test_a_process_that_fails_says_why(script, tmp_path, text, said):
    script(f"print(1, flush=True)\n{text}")
    found = press_process.answers(tmp_path, {})
    assert next(found) == 1
    with pytest.raises(DeltaKVError, match=said):
        next(found)


@pytest.mark.skipif(sys.platform == "win32", reason="asks for a process by its number")
def test_the_process_ends_with_the_iteration(script, tmp_path):
    script("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    start = time.monotonic()
    with closing(press_process.answers(tmp_path, {})) as found:
        number = next(found)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


# -- names -------------------------------------------------------------------------------------------------------------


def test_presses_have_the_names_that_the_process_knows():
    assert list(PRESSES) == list(worker.PRESSES)


def test_presses_are_picked_by_name_and_share(cache_home):
    assert pick_press("kivi4") is None and pick_press("snapkw-0.5") is None
    with pytest.raises(InvalidOptionError, match="Did you mean `snapkv-0.5`"):
        pick_peer("snapkw-0.5")
    for name in ("snapkv", "snapkv-", "snapkv-1", "snapkv-1.5", "snapkv--.5", "snapkv-half", "snapkv-0.5x"):
        with pytest.raises(InvalidOptionError, match=re.escape(f"like snapkv-0.5, got '{name}'")):
            pick_press(name)
    with pytest.raises(DeltaKVError, match="`deltakv eval peers` makes it"):
        pick_press("snapkv-0.5")
    environment_folder().mkdir(parents=True)
    (environment_folder() / press_environment.CHECKED).write_text("{}")
    press = pick_press("think-0.875")
    assert (press.about, press.kind, press.ratio) == ("ThinK 0.875, zeroed", "think", 0.875)


# -- the environment ---------------------------------------------------------------------------------------------------


def write_wheel(
    folder: Path, name: str = "kvpress", version: str = press_environment.KVPRESS, text: str = KVPRESS
) -> Path:
    """A wheel with one module."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", text)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@contextmanager
def only_the_stand_in():
    """Only kvpress is needed, in its version; the stand-in runs on what is here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(press_environment, "PINNED", (f"kvpress=={press_environment.KVPRESS}",))
        patch.setattr(press_environment, "BORROWED", {})
        yield patch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The cache folder in which the command has made the environment of the stand-in's wheel, and what it printed."""
    home, wheels = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("wheels")
    write_wheel(wheels)
    checked = {"versions": {"kvpress": "0.5.5", "datasets": None}, "presses": {"snapkv": None, "kvzip": "[broken]"}}
    with only_the_stand_in() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setattr(press_environment, "check_environment", lambda folder: checked)
        return home, run("eval", "peers", "--wheels", wheels)


@pytest.fixture
def environment(made, monkeypatch):
    """It is found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(made[0]))


def test_the_environment_is_made_from_wheels_and_checked(made, environment):
    result = made[1]
    assert result.exit_code == 1, result.output
    assert "kvpress 0.5.5" in result.output and "datasets" not in result.output
    assert re.search(r"snapkv-0.5 +runs", result.output) and re.search(r"kvzip-0.5 +\[broken\]", result.output)
    assert list(environment_folder().parent.iterdir()) == [environment_folder()]
    assert press_environment.versions() == {"kvpress": "0.5.5", "datasets": None}


def test_one_that_is_there_is_only_checked(environment, monkeypatch):
    monkeypatch.setattr(eval_peers, "check_environment", lambda folder: {"versions": {}, "presses": {"snapkv": None}})
    monkeypatch.setattr(press_environment, "_pip", None)
    assert run("eval", "peers").exit_code == 0


def test_every_press_is_checked_on_a_tiny_model(kvpress, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    monkeypatch.setattr(kvpress, "KVzipPress", None)
    monkeypatch.setattr(kvpress, "ThinKPress", lambda **options: kvpress.Press())
    with torch.random.fork_rng():
        found = worker.check(str(tmp_path))
    assert found["versions"]["torch"] == torch.__version__ and list(found["presses"]) == list(PRESSES)
    assert "NoneType" in found["presses"].pop("kvzip") and "is wrong" in found["presses"].pop("think")
    assert set(found["presses"].values()) == {None}


def test_wheels_that_are_missing_are_named(cache_home, tmp_path):
    write_wheel(tmp_path)
    result = run("eval", "peers", "--wheels", tmp_path)
    assert_refused(result, "wheels", "lacks transformers==5.2.0, tokenizers==")
    assert "kvpress==" not in result.stderr and not environment_folder().exists()


def test_what_breaks_off_leaves_no_environment_and_what_was_fetched_is_not_fetched_again(cache_home, monkeypatch):
    fetched, calls = cache_home / f"{environment_folder().name}-wheels", []
    write_wheel(fetched, "whole", "1")
    write_wheel(fetched, "broken", "1").write_bytes(b"PK")
    monkeypatch.setattr(press_environment, "PINNED", ("whole==1", "broken==1", "new==1"))
    monkeypatch.setattr(press_environment, "BORROWED", {"json": "json==1"})

    def pip(*arguments):
        calls.append((arguments[0], arguments[-1]))
        if arguments[-1] == "new==1":
            raise KeyboardInterrupt

    monkeypatch.setattr(press_environment, "_pip", pip)
    with pytest.raises(KeyboardInterrupt):
        make_environment()
    assert calls == [("install", "whole==1"), ("wheel", "broken==1"), ("install", "broken==1"), ("wheel", "new==1")]
    assert list(cache_home.iterdir()) == [fetched]


def test_an_environment_in_which_kvpress_cannot_be_imported_is_none(cache_home, tmp_path):
    with only_the_stand_in() as patch:
        patch.setattr(press_environment, "check_environment", lambda folder: list(press_process.answers(folder, {})))
        patch.setattr(press_process, "WORKER", tmp_path / "worker.py")
        (tmp_path / "worker.py").write_text("import kvpress")
        write_wheel(tmp_path, text="raise ImportError('of something else')")
        assert_refused(run("eval", "peers", "--wheels", tmp_path), "ImportError: of something else")
    assert list(cache_home.iterdir()) == []


def test_pip_that_fails_says_why(cache_home, tmp_path):
    with only_the_stand_in() as patch:
        patch.setattr(press_environment, "_has_wheel", lambda folder, requirement: True)
        assert_refused(run("eval", "peers", "--wheels", tmp_path), "pip install failed", "kvpress==0.5.5")


# -- measured like ours ------------------------------------------------------------------------------------------------


def test_fidelity_of_presses_stands_beside_ours(environment, kvpress, tmp_path):
    folder, out = saved_byte_llama(tmp_path / "model"), tmp_path / "out.json"
    sizes = ["--context", 300, "--predict", 20, "--windows", 2, "--device", "cpu", "--json", out]
    peers = ["--peer", "snapkv-0.5", "--peer", "think-0", "--options", '{"nbits": 8}']
    result = run("eval", "fidelity", "--model", folder, *sizes, *peers)
    assert result.exit_code == 0, result.output
    ours, half, none = json.loads(out.read_text())["results"]
    assert ours["options"] == {"nbits": 8} and (half["peer"], none["peer"]) == ("snapkv-0.5", "think-0")
    assert half["peer_environment"]["kvpress"] == "0.5.5" and "SnapKV 0.5" in result.output
    assert (half["stored_share"], none["stored_share"]) == (0.5, 1) and abs(none["kl"]) < 1e-6 < half["kl"]
    assert half["full_nll"] == pytest.approx(ours["full_nll"], rel=1e-5)
    assert [window["window"] for window in half["per_window"]] == [0, 1]


def test_tasks_of_presses_stand_beside_ours(environment, tmp_path, kvpress, monkeypatch):
    # in this process: to start another takes longer than all else here
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    monkeypatch.setattr(presses, "answers", lambda environment, job: worker.run(json.loads(json.dumps(job))))
    folder, out = saved_byte_llama(tmp_path / "model"), tmp_path / "out.json"
    sizes = ["--length", 900, "--length", 1000, "--contexts", 2, "--device", "cpu", "--dtype", "float32", "--json", out]
    result = run("eval", "tasks", "niah4", "--model", folder, *sizes, "--peer", "snapkv-0.5")
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["results"]
    assert [(row["length"], row["cache"]) for row in rows] == [
        (length, cache) for length in (900, 1000) for cache in ("full cache", "SnapKV 0.5")
    ]
    full, press = rows[:2]
    assert (
        press["peer"] == "snapkv-0.5" and press["stored_share"] == pytest.approx(0.5, rel=1e-3) and press["items"] == 8
    )
    # of the full cache in either process: the press' change is to that of its own
    assert press["nll"] - press["nll_change"] == pytest.approx(full["nll"], rel=1e-5)
    assert press["nll_change"] != 0


def test_a_suite_measures_presses_in_what_they_can_do(environment, tmp_path, kvpress, monkeypatch):
    """Behind a context read in one call; not what is compressed or written in steps."""
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    monkeypatch.setattr(presses, "answers", lambda environment, job: worker.run(json.loads(json.dumps(job))))
    plan = [
        FidelityMeasurement("fidelity", context=300, predict=20, windows=1),
        FidelityMeasurement("long", context=300, predict=20, windows=1, predict_chunk=10),
        TaskMeasurement("niah4-900", "niah4", context=900, contexts=1),
        GenerationMeasurement("generation", context=60, new_tokens=6, prompts=2),
    ]
    monkeypatch.setattr(eval_all, "quick_plan", lambda: plan)
    folder, out = saved_byte_llama(tmp_path / "model"), tmp_path / "out"
    result = run("eval", "all", "--model", folder, "--device", "cpu", "--peer", "snapkv-0.5", "--out", out)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "snapkv-0.5.json").read_text())["rows"]
    assert [row["measurement"] for row in rows] == ["fidelity", "niah4-900"]
    assert all("error" not in row and row["stored_share_16bit"] == pytest.approx(0.5, rel=1e-2) for row in rows)
    assert rows[0]["figures"]["kl"] > 0 and rows[1]["figures"]["items"] == 4


def test_presses_are_refused_where_caches_generate(environment):
    result = run("eval", "generation", "--model", "nowhere", "--peer", "snapkv-0.5")
    assert_refused(result, "peer", "snapkv-0.5", "compresses once", "deltakv eval fidelity")


def test_windows_that_are_too_short_are_refused(environment):
    with pytest.raises(InvalidOptionError, match="`windows` must hold"):
        measure_press_fidelity(PressModel("nowhere", "float32", "cpu", 1), [torch.arange(20)], {}, context=19)


@pytest.mark.parametrize(
    "command, option", [("fidelity", "--predict-chunk"), ("fidelity", "--prefill-chunk"), ("tasks", "--prefill-chunk")]
)
def test_what_presses_do_not_do_is_refused(environment, command, option):
    result = run("eval", command, "--model", "nowhere", "--peer", "snapkv-0.5", option, 32)
    assert_refused(result, option, "must be 0 with a press", 32)


def test_a_press_without_its_environment_says_how_to_make_it(cache_home):
    assert_refused(run("eval", "fidelity", "--model", "nowhere", "--peer", "snapkv-0.5"), "`deltakv eval peers`")


@pytest.mark.skipif(
    not (REAL_ENVIRONMENT / press_environment.CHECKED).is_file(), reason="`deltakv eval peers` has not been run here"
)
def test_presses_of_kvpress_itself_run_and_change_nothing_where_they_drop_nothing():
    found = check_environment(REAL_ENVIRONMENT)
    assert found["versions"]["kvpress"] == press_environment.KVPRESS
    assert found["presses"] == dict.fromkeys(PRESSES)
