"""What one layer of a `DeltaKVCache` holds: raw parts and packed tokens, replaced whole at every change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from .compressor import TokenStore
from .hf_compat import upload
from .layout import Crop


@dataclass(frozen=True)
class LayerState:
    """Tensors of one layer. Raw parts are as received, keys after rotation.

    Attributes:
        sink_keys, sink_values: `[batch, num_key_value_heads, 0 or num_sink_tokens, head_dim]`.
        tail_keys, tail_values: `[batch, num_key_value_heads, tail_width, head_dim]`, rows left-aligned.
        pending_keys, pending_values: `[batch, num_key_value_heads, columns, head_dim]`, newest columns, pads included.
        store: packed tokens.
        columns: columns that the parts stand for.
        num_flushes: flushes done.
    """

    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    tail_keys: torch.Tensor
    tail_values: torch.Tensor
    pending_keys: torch.Tensor
    pending_values: torch.Tensor
    store: TokenStore
    columns: int = 0
    num_flushes: int = 0

    def raw(self) -> dict[str, torch.Tensor]:
        """The raw parts by name."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in held.items() if isinstance(part, torch.Tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerState:
        """A state whose every tensor, the store's included, is `change(tensor)`."""
        changed = {name: change(part) for name, part in self.raw().items()}
        return replace(self, **changed, store=self.store.map(change))

    def crop(self, crop: Crop, cut: Callable[[TokenStore, list[int]], TokenStore]) -> LayerState:
        """The state without the newest columns; `cut` keeps so many tokens of each row of a store."""
        width, store = max(crop.tail_lengths), self.store
        parts = {name: part[:, :, : crop.pending].clone() for name, part in self.raw().items() if "pending" in name}
        for kind in ("keys", "values"):
            sink, tail = getattr(self, f"sink_{kind}"), getattr(self, f"tail_{kind}")
            if any(crop.returned):
                returned = upload(torch.tensor(crop.returned), tail.device)[:, None, None, None]
                tail = torch.where(returned, _widen(sink, width), _widen(tail, width))
            if width < tail.shape[2]:
                tail = tail[:, :, :width].clone()
            parts[f"tail_{kind}"] = tail
        if crop.num_dropped:
            store = cut(store, crop.compressed)
        cropped = replace(self, **parts, store=store, columns=crop.columns)
        return cropped if any(crop.compressed) else cropped.without_sinks()

    def without_sinks(self) -> LayerState:
        """The state of rows none of which has a compressed token: their sinks stand in the tail."""
        none = {name: part[:, :, :0].clone() for name, part in self.raw().items() if "sink" in name}
        return replace(self, **none)


def append(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Joins along tokens without copying where one side is empty."""
    if held.shape[2] == 0:
        return new
    return held if new.shape[2] == 0 else torch.cat([held, new], dim=2)


def _widen(held: torch.Tensor, width: int) -> torch.Tensor:
    """`[batch, heads, n, head_dim]` -> `[batch, heads, width, head_dim]`, cut or filled with zeros at the end."""
    return torch.nn.functional.pad(held, (0, 0, 0, width - held.shape[2]))


def pick_tokens(source: torch.Tensor, rows, idx: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """Tokens `start .. stop - 1` of `rows`, in each row's own order: `[rows, heads, stop - start, head_dim]`."""
    if idx is None:
        return source[rows, :, start:stop]
    return gather(source[rows], idx[rows, start:stop])


def gather(source: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """source `[batch, heads, n, head_dim]`, idx `[batch, m]` -> `[batch, heads, m, head_dim]`."""
    return source.gather(2, idx[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3]))


def write_rows(held: torch.Tensor, new: torch.Tensor, rows) -> torch.Tensor:
    """Sinks of `rows` become `new`; the first to arrive makes room for every row."""
    if isinstance(rows, slice):
        return new.clone()
    if held.shape[2] == 0:
        held = held.new_zeros(held.shape[0], held.shape[1], new.shape[2], held.shape[3])
    written = held.clone()
    written[rows] = new
    return written
