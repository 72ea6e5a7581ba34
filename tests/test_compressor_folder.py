"""A compressor folder is whole or not there, is the same bytes for the same content, and is checked before its use."""

import errno
import hashlib
import inspect
import json
import math
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from deltakv_hf import CompressorError, InvalidOptionError, files
from deltakv_hf.compressor import folder as folders
from deltakv_hf.compressor.folder import DTYPES, read_config, read_folder, write_folder

TENSOR_FILE = "compressor.safetensors"


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def path(tmp_path):
    """A compressor, alone in its folder."""
    path = tmp_path / "here" / "compressor"
    write_folder(path, {"kind": "old"}, {"a": torch.arange(4)}, {"README.md": b"old"})
    return path


def write_new(path):
    write_folder(path, {"kind": "new"}, {"b": torch.arange(9.0)}, {"report.json": b"{}"})


def with_config(path, **changes):
    """The same folder with another config.json, without a look at what it says."""
    config = {**json.loads((path / "config.json").read_bytes()), **changes}
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))
    return path


def refused(path):
    with pytest.raises(CompressorError) as error:
        read_folder(path)
    text = str(error.value)
    assert text.startswith("`path` must be a") and str(path) in text
    return text


# -- what is written is read -------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(
    st.dictionaries(texts.filter(lambda name: name not in ("format", "version", "sha256")), values, max_size=4),
    st.dictionaries(
        texts.filter(lambda name: name != "__metadata__"), st.tuples(shapes, st.sampled_from(DTYPES)), max_size=4
    ),
    st.binary(max_size=20),
)
def test_a_folder_comes_back_as_it_was(tmp_path_factory, config, kinds, readme):
    path = tmp_path_factory.getbasetemp() / "folder-property"
    tensors = {name: (torch.rand(shape) * 100).to(dtype) for name, (shape, dtype) in kinds.items()}
    write_folder(path, config, tensors, {"README.md": readme})
    found, read = read_folder(path)
    assert found == read_config(path)
    assert {name: found[name] for name in config} == config
    assert found.keys() - config.keys() == {"format", "version", "sha256"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    written = files_of(path)
    assert written["README.md"] == readme
    # in any order, and what was read can be written
    write_folder(path, dict(reversed(found.items())), dict(reversed(read.items())), {"README.md": readme})
    assert files_of(path) == written


def test_the_bytes_are_those_of_every_other_machine(tmp_path):
    tensors = {"b": torch.arange(6, dtype=torch.int8).reshape(2, 3), "a": torch.tensor([0.5, -1.0]).bfloat16()}
    write_folder(tmp_path, {"model": {"id": "someone/é"}, "kind": "test"}, tensors)
    digest = hashlib.sha256((tmp_path / TENSOR_FILE).read_bytes()).hexdigest()
    assert digest == "a5e8d0609c228c007137b7abe6327438ce0cd25383f7cc1aa880ed139f8184e0"
    assert (
        (tmp_path / "config.json").read_text(encoding="utf-8")
        == f"""{{
  "format": "deltakv-compressor",
  "kind": "test",
  "model": {{
    "id": "someone/é"
  }},
  "sha256": {{
    "compressor.safetensors": "{digest}"
  }},
  "version": 1
}}
"""
    )


def test_tensors_may_share_memory_and_need_not_be_contiguous(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "row": base[1],
        "turned": base.T,
        "again": base,
        "grad": torch.ones(2, requires_grad=True),
    }
    write_folder(tmp_path, {}, tensors)
    read = read_folder(tmp_path)[1]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in read.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, torch.ones(1), Path("x"), "\ud800", b"bytes"])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(InvalidOptionError, match="`config` must hold what JSON can hold"):
        write_folder(tmp_path / "new", {"measured": [value]}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_on_both_ways(tmp_path, dtype):
    tensor = torch.ones(3).to(dtype)
    with pytest.raises(InvalidOptionError, match="`tensors` must be of dtype .*'mask' of torch"):
        write_folder(tmp_path / "new", {}, {"mask": tensor})
    assert os.listdir(tmp_path) == []
    write_folder(tmp_path, {}, {})
    save_file({"mask": tensor}, tmp_path / TENSOR_FILE)
    digest = hashlib.sha256((tmp_path / TENSOR_FILE).read_bytes()).hexdigest()
    assert "'mask'" in refused(with_config(tmp_path, sha256={TENSOR_FILE: digest}))


@pytest.mark.parametrize("name", ["config.json", TENSOR_FILE, "../escape", "a/b", "/tmp/x", "", ".", "..", ".hidden"])
def test_further_files_are_files_of_the_folder(tmp_path, name):
    with pytest.raises(InvalidOptionError, match="`extra` must map names"):
        write_folder(tmp_path / "new", {}, {}, {name: b""})
    assert os.listdir(tmp_path) == []


# -- what is at the place already --------------------------------------------------------------------------------------


def test_an_old_compressor_is_replaced_whole(path):
    write_new(path)
    assert files_of(path).keys() == {"config.json", TENSOR_FILE, "report.json"}
    assert read_config(path)["kind"] == "new"
    assert os.listdir(path.parent) == ["compressor"]


def test_an_old_compressor_is_replaced_be_it_broken_or_of_another_version(path):
    os.truncate(path / TENSOR_FILE, 3)
    with_config(path, version=7)
    write_new(path)
    assert read_config(path)["kind"] == "new"


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    write_new(link)
    assert link.is_symlink() and read_config(path)["kind"] == "new"


def test_an_empty_folder_and_missing_parents_are_no_hindrance(tmp_path):
    write_new(tmp_path / "a" / "b" / "c")
    (tmp_path / "empty").mkdir()
    write_new(tmp_path / "empty")
    assert read_config(tmp_path / "a" / "b" / "c") == read_config(tmp_path / "empty")


@pytest.mark.parametrize("what", ["model", "text", "list", "binary", "with a folder"])
def test_a_folder_of_something_else_is_left_alone(path, what):
    if what == "with a folder":
        (path / ".git").mkdir()
    else:
        contents = {"model": b'{"model_type": "llama"}', "text": b"{", "list": b"[1]", "binary": b"\xff\x00"}
        (path / "config.json").write_bytes(contents[what])
    before = sorted(os.listdir(path))
    why = "holds the folder '.git'" if what == "with a folder" else "is no compressor folder"
    with pytest.raises(CompressorError, match=f"`path` must be a new folder .*{why}"):
        write_new(path)
    assert sorted(os.listdir(path)) == before and os.listdir(path.parent) == ["compressor"]


def test_a_file_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CompressorError, match="`path` must name a folder, got .*file.*Choose another place"):
        write_new(tmp_path / "file")
    with pytest.raises(CompressorError, match="can be written, got .*unchanged"):
        write_new(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


# -- failures on the way -----------------------------------------------------------------------------------------------

STEPS = [(files.Path, "mkdir"), (files.Path, "write_bytes"), (files, "_sync"), (files.os, "rename")]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("owner, name", STEPS, ids=[name for _, name in STEPS])
def test_whatever_fails_the_old_folder_stays(path, monkeypatch, owner, name, error):
    """Each call of each step fails once; a folder that could not be synced is the only failure that is none."""
    before, real, finished, count = files_of(path), getattr(owner, name), False, 0
    while not finished:
        calls = iter(range(100))

        def failing(*arguments, calls=calls, broken=count, **keywords):
            if next(calls) == broken:
                raise error
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                write_new(path)
            except BaseException as raised:
                assert isinstance(raised, CompressorError if isinstance(error, OSError) else type(error))
                # the last sync comes when the new folder is in its place
                assert files_of(path) == before or name == "_sync"
            else:
                finished = True
        assert os.listdir(path.parent) == ["compressor"]
        read_folder(path)
        count += 1
    assert count > 1 and read_config(path)["kind"] == "new"


def test_an_interrupt_at_any_line_leaves_the_old_folder_or_the_new(path):
    old = files_of(path)
    write_new(path)
    new = files_of(path)
    lines, first = inspect.getsourcelines(files.replacing_folder.__wrapped__)
    cleaning = first + next(i for i, line in enumerate(lines) if line.strip() == "finally:")
    watched = {files.replacing_folder.__wrapped__.__code__, write_folder.__code__}
    stop, interrupted = 0, True
    while interrupted:
        write_folder(path, {"kind": "old"}, {"a": torch.arange(4)}, {"README.md": b"old"})
        assert files_of(path) == old
        left = stop

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code not in watched:
                return None
            in_cleaning = frame.f_code is not write_folder.__code__ and frame.f_lineno >= cleaning
            if event == "line" and not in_cleaning:
                left -= 1
                if left == -1:
                    raise KeyboardInterrupt
            return trace

        before, interrupted = sys.gettrace(), False
        sys.settrace(trace)
        try:
            write_new(path)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        assert files_of(path) in (old, new)
        assert os.listdir(path.parent) == ["compressor"]
        stop += 1
    assert stop > 20


# -- checks before use -------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_cut_and_every_changed_byte_of_the_tensors_is_seen(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged"
    write_folder(path, {}, {"a": torch.arange(7.0), "b": torch.arange(3)})
    content = (path / TENSOR_FILE).read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        damaged, words = content[:place], "cut off or damaged"
    else:
        other = content[place] ^ data.draw(st.integers(1, 255))
        damaged, words = content[:place] + bytes([other]) + content[place + 1 :], "so it was"
    (path / TENSOR_FILE).write_bytes(damaged)
    assert f"{TENSOR_FILE} does not match its checksum" in refused(path) and words in refused(path)


def test_changed_numbers_are_told_from_a_cut(path):
    content = (path / TENSOR_FILE).read_bytes()
    (path / TENSOR_FILE).write_bytes(content[:-1] + b"\xff")
    assert "so it was changed. Download it again" in refused(path)
    (path / TENSOR_FILE).write_bytes(content[:-1])
    assert "so it was cut off or damaged" in refused(path)


@pytest.mark.parametrize("name", ["config.json", TENSOR_FILE])
def test_a_missing_file_is_named(path, name):
    (path / name).unlink()
    assert f"{name} is missing" in refused(path)
    (path / name).mkdir()
    assert f"{name} is missing or cannot be read (Is a directory)" in refused(path)


def test_a_missing_folder_is_named(tmp_path):
    assert "no such folder" in refused(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nul", b"PK\x03\x04"])
def test_a_config_that_is_not_json_is_refused(path, content):
    (path / "config.json").write_bytes(content)
    assert "config.json is not JSON" in refused(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"deltakv-compressor"', b'{"model_type": "llama"}'])
def test_a_config_of_something_else_is_refused(path, content):
    (path / "config.json").write_bytes(content)
    assert "A model is no compressor" in refused(path)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], "gone"])
def test_another_version_is_refused(path, version):
    text = refused(with_config(path, version=version))
    assert "of version 1" in text and "the version of deltakv-hf that wrote it" in text


@pytest.mark.parametrize("sums", ["gone", None, {}, [], {TENSOR_FILE: None}, {TENSOR_FILE: 3}, {"other": "0"}])
def test_a_config_without_checksum_is_refused(path, sums):
    assert '"sha256"' in refused(with_config(path, sha256=sums))


class Danger:
    def __reduce__(self):
        return os.abort, ()


def test_a_pickle_is_never_opened(path):
    (path / TENSOR_FILE).write_bytes(pickle.dumps(Danger()))
    assert "does not match its checksum" in refused(path)
    digest = hashlib.sha256((path / TENSOR_FILE).read_bytes()).hexdigest()
    assert "is no safetensors file" in refused(with_config(path, sha256={TENSOR_FILE: digest}))


def test_a_type_that_torch_does_not_know_is_refused(path):
    content = save({"a": torch.ones(4, dtype=torch.uint8)}).replace(b'"U8"', b'"X9"')
    (path / TENSOR_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert "is no safetensors file" in refused(with_config(path, sha256={TENSOR_FILE: digest}))


def test_is_compressor_asks_for_the_format_alone(path, tmp_path):
    assert folders.is_compressor(with_config(path, version=9))
    assert not folders.is_compressor(tmp_path)
