"""Compressors by name: what is found where, and what the Hub's answers and failures become.

The Hub is `loopback_hub.py`, on this machine. Calls over HTTP run in one other process (`hub_worker.py`), those
that are offline here, where `HF_HUB_OFFLINE=1`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub

import deltakv_hf.hub as hubs
from deltakv_hf import CompressorError
from deltakv_hf.compressor.folder import read_folder, write_folder

ROOT = Path(__file__).resolve().parents[1]
REPO = "someone/small-compressor"


class Refused(Exception):
    """What a call in the other process raised."""


class Worker:
    """The functions of `deltakv_hf.hub` in a process that has this hub for the Hub."""

    def __init__(self, url, home):
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        # TRANSFORMERS_OFFLINE counts for the Hub, too
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_VERBOSITY": "error"}
        command = [sys.executable, str(ROOT / "tests" / "hub_worker.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=env, text=True, **pipes)

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            self.process.stdin.write(json.dumps([name, arguments, keywords], default=str) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
            if "error" in answer:
                raise Refused(": ".join(answer["error"]))
            return answer["value"]

        return call


@pytest.fixture(scope="module")
def server():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def worker(server, tmp_path_factory):
    worker = Worker(server.url, tmp_path_factory.mktemp("home"))
    with worker.process:
        yield worker
        worker.process.stdin.close()


@pytest.fixture
def hub(server):
    """The hub, empty and whole."""
    server.commits, server.fault, server.token, server.requests = {}, None, None, []
    return server


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "compressor"
    write_folder(path, {"kind": "test"}, {"a": torch.arange(5.0)}, {"README.md": b"# mine\n", "chart.png": b"\x89PNG"})
    return path


def files_of(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def test_a_compressor_goes_to_the_hub_and_comes_back_at_any_revision(hub, worker, folder, tmp_path):
    url = worker.push_folder(folder, REPO)
    first, held = hub.commits[REPO][-1]
    assert url == f"{hub.url}/{REPO}/commit/{first}"
    assert held == files_of(folder)

    old = files_of(folder)
    write_folder(folder, {"kind": "test"}, {"a": torch.arange(6.0)})
    worker.push_folder(folder, REPO, commit_message="Longer")
    cache = {"cache_dir": tmp_path / "cache"}
    new = Path(worker.resolve_folder(REPO, **cache))
    assert files_of(new) == files_of(folder)
    at_first = Path(worker.resolve_folder(REPO, revision=first, **cache))
    # what is not needed is not downloaded
    assert files_of(at_first) == {name: old[name] for name in ("config.json", "compressor.safetensors")}
    assert read_folder(at_first)[1]["a"].tolist() == [0, 1, 2, 3, 4]

    # this process is offline
    assert hubs.resolve_folder(REPO, **cache) == new
    assert hubs.resolve_folder(REPO, revision=first, **cache) == at_first
    found = hubs.cached(**cache)
    assert [(one.repo_id, one.revision) for one in found] == sorted((REPO, path.name) for path in (new, at_first))
    assert {one.path for one in found} == {new, at_first}


def test_only_files_of_the_folder_itself_are_uploaded(hub, worker, folder):
    (folder / ".secret").write_text("no")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("no")
    worker.push_folder(folder, REPO)
    assert hub.commits[REPO][-1][1].keys() == {"config.json", "compressor.safetensors", "README.md", "chart.png"}


def test_the_cache_serves_while_the_hub_does_not(hub, worker, folder, tmp_path):
    worker.push_folder(folder, REPO)
    cache = {"cache_dir": tmp_path / "cache"}
    path = worker.resolve_folder(REPO, **cache)
    for fault in (500, "hang", 404):
        hub.fault = fault
        assert worker.resolve_folder(REPO, **cache) == path
    hub.requests.clear()
    assert worker.resolve_folder(REPO, local_files_only=True, **cache) == path
    assert hub.requests == []
    hub.fault = 500
    with pytest.raises(Refused, match="HTTP 500"):
        worker.resolve_folder(REPO, force_download=True, **cache)


FAULTS = {
    401: ["denies access", "HTTP 401", "hf auth login", "`token`"],
    403: ["denies access", "HTTP 403", "hf auth login"],
    404: ["HTTP 404"],
    500: ["HTTP 500", "again later"],
    "gated": ["gated", "Ask for access", "hf auth login"],
    "hang": ["Timeout", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"],
    "truncate": ["transfer failed", "try again"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(hub, worker, folder, tmp_path, fault):
    worker.push_folder(folder, REPO)
    hub.fault = fault
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, cache_dir=tmp_path / "cache")
    assert_says(error, "`id_or_path`", REPO, *FAULTS[fault])
    assert list((tmp_path / "cache").rglob("compressor.safetensors")) == []
    assert hubs.cached(tmp_path / "cache") == []


def assert_says(error, *words):
    text = str(error.value)
    assert text.startswith("CompressorError: ")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_private_repository_takes_a_token(hub, worker, folder, tmp_path):
    cache, hub.token = {"cache_dir": tmp_path / "cache"}, "hf_right"
    for token in (None, False, "hf_wrong"):
        with pytest.raises(Refused, match="`repo_id`.*hf auth login"):
            worker.push_folder(folder, REPO, token=token)
    worker.push_folder(folder, REPO, token="hf_right", private=True)
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, **cache)
    assert_says(error, "no such repository, or it is private", "hf auth login")
    assert read_folder(worker.resolve_folder(REPO, token="hf_right", **cache))[0]["kind"] == "test"


def test_both_files_are_of_one_commit_whatever_is_pushed_meanwhile(hub, worker, folder, tmp_path):
    class Requests(list):
        def append(self, request):
            if len(hub.commits[REPO]) == 2 and request[1].endswith(".safetensors"):
                hub.commit(REPO, newer)
            super().append(request)

    worker.push_folder(folder, REPO)
    write_folder(folder, {"kind": "newer"}, {"a": torch.arange(6.0)})
    newer, hub.requests = files_of(folder), Requests()
    config, tensors = read_folder(worker.resolve_folder(REPO, cache_dir=tmp_path / "cache"))
    assert len(hub.commits[REPO]) == 3
    assert config["kind"] == "test" and len(tensors["a"]) == 5


def test_an_interrupted_download_is_not_taken_for_a_compressor(hub, worker, folder, tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    hub.commit(REPO, {"config.json": files_of(folder)["config.json"]})
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, **cache)
    assert_says(error, "a file is missing", "compressor.safetensors")
    assert hubs.cached(**cache) == []
    with pytest.raises(CompressorError, match="not in the local cache"):
        hubs.resolve_folder(REPO, **cache)
    # a name that the cache has never heard of
    with pytest.raises(CompressorError, match="not in the local cache, .* HF_HUB_OFFLINE=1"):
        hubs.resolve_folder("nobody/knows", **cache)


def test_what_is_not_there_is_named(hub, worker, folder, tmp_path):
    worker.push_folder(folder, REPO)
    cache = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(Refused) as error:
        worker.resolve_folder("someone/else", **cache)
    assert_says(error, "someone/else", "no such repository")
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, revision="v9", **cache)
    assert_says(error, REPO, "revision 'v9'", "no such branch, tag or commit")
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, token=True, **cache)
    assert_says(error, "`token=True`", "hf auth login")
    for name in ("a/b/c", "someone/has spaces", "someone/--"):
        with pytest.raises(Refused) as error:
            worker.resolve_folder(name, **cache)
        assert_says(error, name, "no id on the Hub (owner/name)")


def test_a_model_is_refused_before_its_weights_are_downloaded(hub, worker, tmp_path):
    hub.commit(REPO, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"})
    with pytest.raises(Refused) as error:
        worker.resolve_folder(REPO, cache_dir=tmp_path / "cache")
    assert_says(error, "deltakv-compressor", "A model is no compressor")
    assert [path for _, path in hub.requests if path.endswith(".safetensors")] == []


def test_tensors_that_were_changed_on_the_hub_are_refused(hub, worker, folder, tmp_path):
    worker.push_folder(folder, REPO)
    content = bytearray(hub.commits[REPO][-1][1]["compressor.safetensors"])
    content[-1] ^= 1
    hub.commit(REPO, {"compressor.safetensors": bytes(content)})
    path = worker.resolve_folder(REPO, cache_dir=tmp_path / "cache")
    with pytest.raises(CompressorError, match="compressor.safetensors does not match its checksum.* it was changed"):
        read_folder(path)


@pytest.mark.parametrize("fault", [401, 403, 500])
def test_an_upload_that_fails_says_what_to_do(hub, worker, folder, fault):
    hub.fault = fault
    with pytest.raises(Refused) as error:
        worker.push_folder(folder, REPO)
    assert_says(error, "`repo_id`", REPO, "hf auth login" if fault != 500 else "HTTP 500")
    assert hub.commits == {}


def test_only_whole_compressors_are_uploaded(hub, worker, folder):
    worker.push_folder(folder, REPO)
    with pytest.raises(Refused) as error:
        worker.push_folder(folder, REPO, revision="nowhere")
    assert_says(error, "revision 'nowhere'", "no such branch")
    hub.requests.clear()
    os.truncate(folder / "compressor.safetensors", 20)
    with pytest.raises(Refused, match="cut off or damaged"):
        worker.push_folder(folder, REPO)
    with pytest.raises(Refused, match="no such folder"):
        worker.push_folder(folder / "nothing", REPO)
    assert hub.requests == []


def test_a_folder_wins(folder, monkeypatch):
    assert hubs.resolve_folder(folder) == folder
    assert hubs.resolve_folder(str(folder)) == folder
    monkeypatch.chdir(folder.parent.parent)
    relative = f"{folder.parent.name}/{folder.name}"
    assert hubs.resolve_folder(relative) == Path(relative)


@pytest.mark.parametrize("path", ["/nowhere/at-all", "./nowhere", "../nowhere", "~/nowhere/at-all", Path("nowhere")])
def test_a_path_is_never_looked_for_on_the_hub(path):
    with pytest.raises(CompressorError, match="`id_or_path` must be a compressor folder, got .*nowhere.* no such"):
        hubs.resolve_folder(path)


def test_a_file_is_no_folder(folder):
    with pytest.raises(CompressorError, match="config.json.*which is a file"):
        hubs.resolve_folder(folder / "config.json")


@pytest.mark.parametrize("wrong", [None, 3, b"folder", ["folder"]])
def test_what_is_no_name_is_refused(wrong):
    with pytest.raises(CompressorError, match="`id_or_path` must be a folder, an id on the Hub .*, got "):
        hubs.resolve_folder(wrong)


@pytest.mark.parametrize("name", ["n" * 300, "someone/" + "n" * 300, "/" + "n" * 300, Path("n" * 300), "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(name):
    """The system's error came through."""
    with pytest.raises(CompressorError, match="`id_or_path` must be"):
        hubs.resolve_folder(name)


def test_compressors_that_come_with_the_package(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hubs, "BUNDLED", tmp_path / "none")
    assert hubs.bundled() == []
    with pytest.raises(CompressorError, match=r"owner/name.*\(there is none\), got 'smollm2'"):
        hubs.resolve_folder("smollm2")
    monkeypatch.setattr(hubs, "BUNDLED", tmp_path)
    (tmp_path / "half-done").mkdir()
    (tmp_path / "a-file").write_text("")
    folder.rename(tmp_path / "smollm2-135m-4x")
    write_folder(tmp_path / "qwen3-4x", {}, {})
    assert [path.name for path in hubs.bundled()] == ["qwen3-4x", "smollm2-135m-4x"]
    assert hubs.resolve_folder("qwen3-4x") == tmp_path / "qwen3-4x"
    with pytest.raises(CompressorError, match=r"\(qwen3-4x, smollm2-135m-4x\), got 'smollm-4x'. .*'smollm2-135m-4x'\?"):
        hubs.resolve_folder("smollm-4x")


def test_no_cache_holds_nothing(tmp_path):
    assert hubs.cached(tmp_path / "none") == []
    (tmp_path / "file").write_text("")
    assert hubs.cached(tmp_path / "file") == hubs.cached(tmp_path / "file" / "below") == []


def test_a_published_compressor_comes_with_all_its_files(hub, worker, tmp_path):
    """Its weights have another name, in one file or several; of anything else nothing but the config is fetched."""
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    config = json.dumps({"model_type": "llama", "kv_compressed_size": 16}).encode()
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    hub.commit(REPO, {"config.json": config, "model.safetensors": b"whole", "optimizer.pt": b"not this"})
    one = Path(worker.resolve_folder(REPO, cache_dir=tmp_path / "cache"))
    assert files_of(one) == {"config.json": config, "model.safetensors": b"whole"}
    several = dict.fromkeys(names, b"part") | {"model.safetensors.index.json": index}
    hub.commit(REPO, {"model.safetensors": None} | several)
    two = Path(worker.resolve_folder(REPO, cache_dir=tmp_path / "cache"))
    assert files_of(two) == {"config.json": config} | several
    assert hubs.resolve_folder(REPO, cache_dir=tmp_path / "cache") == two
    assert {found.path for found in hubs.cached(tmp_path / "cache")} == {one, two}
    hub.commit(REPO, {name: None for name in several})
    with pytest.raises(Refused, match="file is missing"):
        worker.resolve_folder(REPO, cache_dir=tmp_path / "cache")
