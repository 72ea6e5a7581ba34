"""Licences of the texts that a compressor learns from."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidOptionError


def licenses_of(entries: list[str], texts: list[str]) -> dict[str, str]:
    """Licences by text, of entries `FILE=LICENCE`; a file may be named with its ending or without."""
    licenses = {}
    for entry in entries:
        name, equals, licence = entry.partition("=")
        named = [text for text in texts if name in (text, Path(text).stem)]
        if not equals or not licence or not named:
            raise InvalidOptionError(
                f"`--text-license` must be FILE=LICENCE of one of {', '.join(texts)}, got {entry!r}."
            )
        licenses |= dict.fromkeys(named, licence)
    return licenses


def note_licenses(sources: list[dict[str, str]], licenses: dict[str, str]) -> None:
    """Writes what is known of licences into a config's sources of text."""
    for source in sources:
        source["license"] = licenses.get(source["source"], source["license"])
