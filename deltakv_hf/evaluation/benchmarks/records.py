"""Lines of the files that benchmarks are published in, checked field by field."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...errors import InvalidOptionError
from ..texts import read_text

# names that say which split a file is, not which task
SPLITS = ("validation", "test", "train", "dev")


@dataclass(frozen=True)
class Record:
    """One line of a file: a JSON object.

    Attributes:
        path: of the file.
        line: number, from 1.
        fields: of the object.
        place: where in it, for errors.
    """

    path: Path
    line: int
    fields: dict[str, Any]
    place: str = ""

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raises `InvalidOptionError` that names the file, the line, the field and its value."""
        got = f"got {shorten(self.fields[name])}" if name in self.fields else "which is missing"
        raise InvalidOptionError(
            f"`file` {self.path.name!r}, line {self.line}: `{self.place}{name}` must be {rule}, {got}."
        )

    def text(self, name: str) -> str:
        """The field `name`, a text."""
        if not isinstance(self.fields.get(name), str):
            self.refuse(name, "a text")
        return self.fields[name]

    def value(self, name: str) -> str:
        """The field `name`, a text or a number."""
        if not isinstance(self.fields.get(name), (str, int, float)):
            self.refuse(name, "a text or a number")
        return str(self.fields[name])

    def texts(self, name: str) -> tuple[str, ...]:
        """The field `name`, a list of texts or numbers with one or more."""
        found = self.fields.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(part, (str, int, float)) for part in found):
            self.refuse(name, "a list of texts, one or more")
        return tuple(map(str, found))

    def parts(self, name: str) -> list[Record]:
        """The field `name`, a list of objects with one or more."""
        found = self.fields.get(name)
        if not isinstance(found, list) or not found or not all(isinstance(part, dict) for part in found):
            self.refuse(name, "a list of objects, one or more")
        return [Record(self.path, self.line, part, f"{name}[{i}].") for i, part in enumerate(found)]

    def first_of(self, *names: str) -> str:
        """The first of `names` that the object has, or the first of all."""
        return next((name for name in names if name in self.fields), names[0])


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """The lines of a JSON Lines file, or the first `limit`; empty ones are left out.

    Raises:
        InvalidOptionError: the file cannot be read, or a line is not a JSON object.
    """
    records = []
    # not splitlines: a text may hold other characters that separate lines, unescaped
    for number, line in enumerate(read_text(path, "file").split("\n"), 1):
        if limit is not None and len(records) == limit:
            break
        if line.strip():
            records.append(Record(path, number, _parse(path, number, line)))
    return records


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidOptionError(
            f"`file` {path.name!r}, line {number}: must be a JSON object (JSON Lines), got {shorten(line)}: {error}."
        ) from error
    if not isinstance(found, dict):
        raise InvalidOptionError(f"`file` {path.name!r}, line {number}: must be a JSON object, got {shorten(found)}.")
    return found


def task_of(path: Path, task: str | None) -> str:
    """`task`, or what the file is called; what its folder is called if its name only says which split it is."""
    return task or (path.absolute().parent.name if path.stem in SPLITS else path.stem)


def shorten(value: Any) -> str:
    """A value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"
