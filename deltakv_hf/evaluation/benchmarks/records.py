"""Lines of the files that benchmarks are published in, and the users' files of prompts, each checked field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        got = f"got {_short(self.fields[name])}" if name in self.fields else "which is missing"
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
            f"`file` {path.name!r}, line {number}: must be a JSON object (JSON Lines), got {_short(line)}: {error}."
        ) from error
    if not isinstance(found, dict):
        raise InvalidOptionError(f"`file` {path.name!r}, line {number}: must be a JSON object, got {_short(found)}.")
    return found


def task_of(path: Path, task: str | None) -> str:
    """`task`, or what the file is called; what its folder is called if its name only says which split it is."""
    return task or (path.absolute().parent.name if path.stem in SPLITS else path.stem)


@dataclass(frozen=True)
class Wording:
    """The user's prompts and lengths, by dataset.

    Attributes:
        prompts: templates with fields of the item in braces, or None.
        max_lengths: most tokens of an answer, by dataset or of all; or None.
    """

    prompts: Mapping[str, Any] | None = None
    max_lengths: Mapping[str, int] | int | None = None

    def prompt(self, dataset: str, own: Any) -> Any:
        """The user's for `dataset`, or else `own`."""
        return own if self.prompts is None else self._pick("prompts", self.prompts, dataset)

    def max_new_tokens(self, dataset: str, usual: int) -> int:
        """The user's for `dataset`, or else `usual`."""
        if isinstance(self.max_lengths, int):
            return self.max_lengths
        return usual if self.max_lengths is None else self._pick("max_lengths", self.max_lengths, dataset)

    def _pick(self, argument: str, by_dataset: Mapping[str, Any], dataset: str) -> Any:
        if dataset not in by_dataset:
            raise InvalidOptionError(f"`{argument}` must have an entry for the dataset {dataset!r}, which is missing.")
        return by_dataset[dataset]


def read_wording(prompts: Path | None = None, max_lengths: Path | int | None = None) -> Wording:
    """Reads the files, JSON objects by dataset; a number for `max_lengths` holds for all.

    Raises:
        InvalidOptionError: a file cannot be read or holds something else.
    """
    given = None if prompts is None else _read_object(prompts, "prompts", (str, dict), "templates")
    if max_lengths is None or isinstance(max_lengths, int):
        if max_lengths is not None and max_lengths < 1:
            raise InvalidOptionError(f"`max_lengths` must be a positive number or a file, got {max_lengths}.")
        return Wording(given, max_lengths)
    return Wording(given, _read_object(max_lengths, "max_lengths", int, "numbers"))


def _read_object(path: Path, argument: str, kind: type | tuple, what: str) -> dict:
    try:
        found = json.loads(read_text(path, argument))
    except json.JSONDecodeError as error:
        raise InvalidOptionError(f"`{argument}` must be a JSON file, got {path.name!r}: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(value, kind) for value in found.values()):
        raise InvalidOptionError(f"`{argument}` must hold an object of {what} by dataset, got {path.name!r}.")
    return found


def fill(template: Any, fields: Mapping[str, Any], dataset: str) -> str:
    """`template` with `fields` in its braces."""
    try:
        return template.format_map(fields)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        names = ", ".join(f"{{{name}}}" for name in fields)
        raise InvalidOptionError(
            f"`prompts` of the dataset {dataset!r} must be a template with no other fields than {names}, got "
            f"{_short(template)}: {type(error).__name__}: {error}."
        ) from error


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"
