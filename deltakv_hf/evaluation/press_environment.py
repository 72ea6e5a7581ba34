"""The environment of kvpress: packages in a folder of the user's cache that come before those of this environment.

kvpress wants an older transformers. What the two need in versions of their own is installed there; torch and all else
are those of the environment that we run in.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import DeltaKVError, InvalidOptionError
from ..files import replacing_folder
from .model import cache_root
from .press_process import answers, last_line

KVPRESS, TRANSFORMERS = "0.5.5", "5.2.0"

# in these versions, whatever is here
PINNED = (
    f"kvpress=={KVPRESS}",
    f"transformers=={TRANSFORMERS}",
    "tokenizers==0.22.2",
    "huggingface_hub==1.33.0",
    "datasets==4.8.5",
    "fsspec==2026.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "xxhash==3.7.0",
    "cachetools==5.5.2",
    "fire==0.6.0",
    "termcolor==3.1.0",
)

# by module, only where there is none here yet
BORROWED = {
    "pyarrow": "pyarrow==24.0.0",
    "pandas": "pandas==2.3.3",
    "pytz": "pytz==2025.2",
    "dateutil": "python_dateutil==2.9.0.post0",
    "six": "six==1.17.0",
    "tzdata": "tzdata==2025.2",
    "httpx": "httpx==0.28.1",
    "httpcore": "httpcore==1.0.9",
    "requests": "requests==2.32.5",
    "urllib3": "urllib3==2.5.0",
    "charset_normalizer": "charset_normalizer==3.4.4",
}
CHECKED = "checked.json"


def environment_folder() -> Path:
    """Where the environment for this Python is, or would be."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache_root() / f"kvpress-{KVPRESS}-transformers-{TRANSFORMERS}-python-{python}"


def find_environment() -> Path:
    """The folder of the environment.

    Raises:
        DeltaKVError: it has not been made.
    """
    folder = environment_folder()
    if not (folder / CHECKED).is_file():
        raise DeltaKVError(
            "presses of kvpress run in an environment of their own, with an older transformers, which is not there "
            "yet: `deltakv eval peers` makes it, once."
        )
    return folder


def versions() -> dict[str, str]:
    """Of the packages in the environment that figures must carry."""
    return json.loads((find_environment() / CHECKED).read_text())["versions"]


def check_environment(folder: Path) -> dict[str, dict]:
    """Runs every press on a tiny model.

    Returns:
        `versions` by package, and `presses`: None for each that runs, or its error.

    Raises:
        DeltaKVError: kvpress cannot be imported there.
    """
    [found] = answers(folder, {"check": True})
    return found


def make_environment(wheels: Path | None = None, progress: Callable[[Iterable], Iterator] = iter) -> dict[str, dict]:
    """Makes the environment whole or not at all, in the place of one that is there, and checks it.

    Args:
        wheels: a folder with the wheels, for machines without a network; None fetches them. Those that were fetched
            before a call was broken off are not fetched again.
        progress: wraps the iteration over packages (for a progress bar).

    Returns:
        what `check_environment` found.

    Raises:
        InvalidOptionError: `wheels` lacks some.
        DeltaKVError: pip is missing or failed, or what it installed does not run.
    """
    if importlib.util.find_spec("pip") is None:
        raise DeltaKVError("the environment of kvpress is made with pip, which is not installed: python -m ensurepip")
    folder, needed = environment_folder(), requirements()
    fetched = folder.with_name(f"{folder.name}-wheels")
    if wheels is not None:
        missing = [requirement for requirement in needed if not _has_wheel(wheels, requirement)]
        if missing:
            raise InvalidOptionError(
                f"`wheels` must be a folder with all wheels that are needed here, got {str(wheels)!r}, "
                f"which lacks {', '.join(missing)}."
            )
    with replacing_folder(folder) as made:
        for requirement in progress(needed):
            if wheels is None and not _has_wheel(fetched, requirement):
                _pip("wheel", "--no-deps", "--wheel-dir", str(fetched), requirement)
            source = "--no-index", "--find-links", str(wheels or fetched)
            _pip("install", *source, "--no-deps", "--target", str(made), requirement)
        found = check_environment(made)
        (made / CHECKED).write_text(json.dumps(found, indent=2))
    shutil.rmtree(fetched, ignore_errors=True)
    return found


def requirements() -> list[str]:
    """What is to be installed beside what is here."""
    borrowed = [name for module, name in BORROWED.items() if importlib.util.find_spec(module) is None]
    return [*PINNED, *borrowed]


def _has_wheel(folder: Path, requirement: str) -> bool:
    """Whether a whole wheel of it is in `folder`."""
    return any(zipfile.is_zipfile(path) for path in folder.glob(f"{requirement.replace('==', '-')}-*.whl"))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DeltaKVError(f"pip {arguments[0]} failed: {last_line(done.stderr or done.stdout)}")
