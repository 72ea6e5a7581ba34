"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty file beside `path` to write to; it becomes `path` when the block ends, and goes if it raises.

    Readers see the old file or the new one, never a part, also after a power cut.
    """
    # a link stays a link; a rename is only atomic within a folder
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    with open(temporary, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    try:
        yield temporary
        # the writer may have put a private file of its own here
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # not every system lets a folder be opened
    with suppress(OSError):
        _sync(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives an empty folder beside `path` to fill with files; it becomes `path` when the block ends, and goes if it
    raises.

    A folder that is at `path` is replaced whole: it is set aside, and deleted once the new one is in its place. If
    anything fails on the way, an interrupt too, the old folder is at `path` again. (Two folders cannot be exchanged at
    once: a reader may find nothing at `path` for the moment between two renames.)
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}")
    aside = temporary.with_name(f"{temporary.name}.old")
    try:
        temporary.mkdir()
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        # not every system lets a folder be opened
        with suppress(OSError):
            _sync(path.parent)
    finally:
        # what is where tells how far it came
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path`; readers see the old file or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
