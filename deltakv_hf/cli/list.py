"""`deltakv list`: the compressors that are on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from ..compressor.folder import TENSORS, read_config
from ..compressor.published import is_published
from ..errors import CompressorError
from ..hub import bundled, cached
from .console import console

NOTHING = (
    "no compressor here: none comes with the package and none was downloaded. "
    'DeltaKVCache.from_pretrained("owner/name", model=model) downloads one.'
)


@dataclass(frozen=True)
class Entry:
    """One compressor.

    Attributes:
        name: what `from_pretrained` takes.
        base_model: id of the model that it was made for, or None.
        share: bytes compressed over bytes in the full cache, or None.
        bytes: size of its tensors on disk; None if it cannot be used.
        where: "bundled" or "Hub cache".
        revision: its commit on the Hub, or None.
        path: its folder.
        problem: why it cannot be used, or None.
    """

    name: str
    base_model: str | None
    share: float | None
    bytes: int | None
    where: str
    revision: str | None
    path: str
    problem: str | None


def run_list(as_json: bool) -> None:
    """Prints one line for each compressor."""
    entries = find_entries()
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=2))
    elif entries:
        console.print(entry_table(entries))
    else:
        console.print(NOTHING, markup=False, soft_wrap=True)


def find_entries() -> list[Entry]:
    """Those that come with the package, then those in the cache of the Hub."""
    entries = [_entry(path.name, path, "bundled", None) for path in bundled()]
    return entries + [_entry(one.repo_id, one.path, "Hub cache", one.revision) for one in cached()]


def _entry(name: str, path: Path, where: str, revision: str | None) -> Entry:
    if is_published(path):
        # made elsewhere: what it costs is known once it is loaded
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return Entry(name, None, None, size, where, revision, str(path), None)
    try:
        config = read_config(path)
        num_bytes = (path / TENSORS).stat().st_size
    except (CompressorError, OSError) as error:
        return Entry(name, None, None, None, where, revision, str(path), str(error))
    model, share = config.get("model"), config.get("share")
    base = model.get("id") if isinstance(model, dict) else None
    share = share if isinstance(share, (int, float)) else None
    return Entry(name, base, share, num_bytes, where, revision, str(path), None)


def entry_table(entries: list[Entry]) -> Table:
    """The table on the screen."""
    table = Table(title="compressors on this machine", title_justify="left")
    for header in ("name", "base model"):
        table.add_column(header, overflow="fold")
    for header in ("share", "bytes"):
        table.add_column(header, justify="right")
    table.add_column("where")
    for entry in entries:
        share = "" if entry.share is None else f"{entry.share:.1%}"
        num_bytes = "cannot be used" if entry.bytes is None else f"{entry.bytes:,}"
        where = f"{entry.where}, {entry.revision[:8]}" if entry.revision else entry.where
        table.add_row(escape(entry.name), escape(str(entry.base_model or "")), share, num_bytes, where)
    return table
