"""The user's own prompts and lengths of answers, as LongBench publishes them: JSON files by dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidOptionError
from ..texts import read_text
from .records import shorten


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
    lengths = _read_object(max_lengths, "max_lengths", int, "numbers")
    for dataset, length in lengths.items():
        if length < 1:
            raise InvalidOptionError(f"`max_lengths` of the dataset {dataset!r} must be positive, got {length}.")
    return Wording(given, lengths)


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
            f"{shorten(template)}: {type(error).__name__}: {error}."
        ) from error
