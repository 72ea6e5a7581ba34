"""What a cache holds, counted in the bytes of the tensors that it keeps alive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from . import host_layers

PARTS = (
    "sinks",
    "recent window",
    "references",
    "residual codes",
    "residual levels",
    "reference ids",
    "codes",
    "filter layers",
    "blocks",
    "block tables",
    "RoPE tables",
    "bookkeeping",
    "host layers",
)
# what compressed tokens take, by field of a store; fields of a compressor from elsewhere are "codes"
STORE_PARTS = {
    "reference_codes": "references",
    "reference_levels": "references",
    "reference_tokens": "references",
    "residual_codes": "residual codes",
    "latents": "residual codes",
    "residual_levels": "residual levels",
    "latent_levels": "residual levels",
    "reference_idx": "reference ids",
    "key_codes": "filter layers",
    "key_levels": "filter layers",
    "value_codes": "filter layers",
    "value_levels": "filter layers",
    "blocks": "blocks",
    "block_table": "block tables",
    "row_groups": "block tables",
    "leader": "block tables",
    "scale": "block tables",
    "homes": "block tables",
    "least": "block tables",
    "mean": "blocks",
}


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: a view counts all that it keeps alive, a share counts once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a cache by part, beside what a `DynamicCache` of the same tokens would hold.

    Attributes:
        parts: bytes by part of the cache.
        dense_bytes: bytes that `DynamicCache` would hold for the same columns, padding included as it would be.
        columns: columns seen, per row.
        tokens: real tokens of all rows.
        compressed_tokens: of these, packed in every layer of ours.
        compressed_dense_bytes: bytes that `DynamicCache` would hold for these in our layers.
        compressor_bytes: bytes of the compressor on the layers' devices, which all caches that use it share; no part of
            `stored_bytes`.
    """

    parts: dict[str, int]
    dense_bytes: int
    columns: int
    tokens: int
    compressed_tokens: int
    compressed_dense_bytes: int
    compressor_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes held, all parts together."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Stored bytes over dense bytes (0 for an empty cache)."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 0.0

    @property
    def _compressed_bytes(self) -> int:
        return sum(self.parts[name] for name in {"codes", *STORE_PARTS.values()})

    @property
    def break_even_tokens(self) -> int | None:
        """Compressed tokens whose saved bytes are the compressor's own; None before any token is compressed."""
        saved = self.compressed_dense_bytes - self._compressed_bytes
        return -(-self.compressor_bytes * self.compressed_tokens // saved) if saved > 0 else None

    @property
    def compressed_share(self) -> float:
        """Bytes of the compressed tokens alone (codes, levels, references, ids) over dense ones; 0 without any."""
        return self._compressed_bytes / self.compressed_dense_bytes if self.compressed_dense_bytes else 0.0

    def __str__(self) -> str:
        rows = [(name, size) for name, size in self.parts.items() if size]
        rows += [("stored", self.stored_bytes), ("dense", self.dense_bytes)]
        width = max(len(name) for name, _ in rows)
        how = "in blocks" if self.parts.get("block tables") else "compressed"
        lines = [f"{self.tokens} tokens, {self.compressed_tokens} of them {how}"]
        for name, size in rows:
            share = f"{size / self.dense_bytes:7.1%}" if self.dense_bytes else ""
            lines.append(f"{name:<{width}}  {size / 2**20:10.3f} MiB  {share}".rstrip())
        if self.compressor_bytes:
            even = "" if self.break_even_tokens is None else f", paid for after {self.break_even_tokens:,} tokens"
            lines.append(f"compressor, shared by all caches: {self.compressor_bytes / 2**20:.3f} MiB{even}")
        return "\n".join(lines)


def report(layers: list, ledger, registry, extra: list[torch.Tensor]) -> MemoryReport:
    """Counts a cache's layers, the RoPE tables of `registry`, the index tensors of `ledger` and `extra` tensors."""
    ledger.settle()
    parts = dict.fromkeys(PARTS, 0)
    dense, compressed, compressed_dense, used = 0, 0, 0, []
    for layer in layers:
        if not hasattr(layer, "held"):
            size = held_bytes(host_layers.tensors(layer))
            parts["host layers"] += size
            dense += held_bytes(host_layers.tensors(host_layers.growing(layer)))
        elif layer.held is not None:
            state = layer.held
            raw = [state.tail_keys, state.tail_values, state.pending_keys, state.pending_values]
            parts["recent window"] += held_bytes(raw)
            # in a layer of fixed size they stand in the room of the window
            parts["sinks"] += held_bytes([state.sink_keys, state.sink_values, *raw]) - held_bytes(raw)
            for name, part in layer.packed().items():
                parts[STORE_PARTS.get(name, "codes")] += held_bytes([part])
            used += layer.compressor.tensors()
            for raw in (state.tail_keys, state.tail_values):
                token_bytes = raw.shape[1] * raw.shape[3] * raw.element_size()
                dense += ledger.batch_size * layer.columns * token_bytes
                compressed_dense += sum(ledger.compressed) * token_bytes
            compressed = sum(ledger.compressed)
        else:
            parts["recent window"] += held_bytes(layer.spare())
    parts["RoPE tables"] = held_bytes(
        table for tables in registry.tables for table in (tables.cos, tables.sin) if table is not None
    )
    parts["bookkeeping"] = held_bytes(ledger.tensors() + extra)
    return MemoryReport(parts, dense, ledger.columns, sum(ledger.seen), compressed, compressed_dense, held_bytes(used))
