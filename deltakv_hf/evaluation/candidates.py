"""What is measured: a cache with a name, where it comes from, and how an empty one is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..hf_compat import Cache, DynamicCache
from .presses import Press
from .runner import FULL

OURS, PEER, PAPER, REFERENCE = "ours", "peer", "paper", "full cache"


@dataclass(frozen=True)
class Candidate:
    """A cache to measure.

    Attributes:
        name: in tables.
        source: where it comes from, for JSON: its options, its compressor or the peer's name.
        make: makes an empty one for a model; None for a press.
        role: "ours", "peer", "paper" (ours in the form of the paper, a learned compressor) or "full cache".
        press: measured by a process of its own; None for what is made in this one.
    """

    name: str
    source: dict
    make: Callable[..., Cache] | None
    role: str = OURS
    press: Press | None = None

    @property
    def label(self) -> str:
        """The shortest name: a peer's, a compressor's without its folder, its options, or the name in tables."""
        source = self.portable_source
        if "options" in source:
            return ", ".join(f"{option}={value}" for option, value in source["options"].items()) or self.name
        return source.get("peer") or source.get("compressor") or self.name

    @property
    def portable_source(self) -> dict:
        """The source with the names alone of places on this machine."""
        return _without_folders(self.source)

    @property
    def file_name(self) -> str:
        """The label as the name of a JSON file."""
        return re.sub(r"[^A-Za-z0-9.=_]+", "-", self.label).strip("-")[:100] + ".json"


def _without_folders(held):
    if isinstance(held, dict):
        return {name: _without_folders(value) for name, value in held.items()}
    return Path(held).name if isinstance(held, str) and Path(held).is_dir() else held


def _dense(model) -> Cache:
    return DynamicCache(config=model.config)


# what all others are compared with
FULL_CACHE = Candidate(FULL, {"cache": "full"}, _dense, REFERENCE)
