"""Memory against context: counted in a cache that grows, and drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache import DeltaKVCache
from ..hf_compat import DynamicCache
from ..memory import MemoryReport, held_bytes

POINTS = 8
# parts of a memory report, from the bottom of the chart to its top
GROUPS = {
    "sinks, recent window": ("sinks", "recent window", "host layers"),
    "RoPE tables, bookkeeping": ("RoPE tables", "bookkeeping"),
    "references": ("references", "reference ids"),
    "residuals: scales, minima": ("residual levels",),
    "residuals: codes": ("residual codes", "codes"),
}
COLORS = ("#9aa5b1", "#cbd2d9", "#f0b429", "#62b6cb", "#1b6ca8")


@dataclass(frozen=True)
class Point:
    """Bytes held after `tokens` tokens."""

    tokens: int
    dense_bytes: int
    report: MemoryReport


class TwinCache(DeltaKVCache):
    """Fills a full cache beside itself and lets the model read that one: one pass counts the bytes of both."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.dense = DynamicCache(config=self.model_config)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores new tokens twice and returns the full cache's keys and values."""
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.dense.update(key_states, value_states, layer_idx, *args, **kwargs)


def dense_bytes(cache) -> int:
    """Bytes of the tensors that a host cache holds."""
    return held_bytes(value for layer in cache.layers for value in vars(layer).values() if torch.is_tensor(value))


@torch.no_grad()
def measure_growth(model, ids: torch.Tensor, options: dict, advance: Callable[[], None]) -> list[Point]:
    """Reads `ids` `[1, n]` in `POINTS` pieces into both caches and counts what they hold after each.

    Args:
        advance: called after every piece.
    """
    cache, points = TwinCache(model, **options), []
    for piece in ids.split(-(-ids.shape[1] // POINTS), dim=1):
        model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        points.append(Point(cache.get_seq_length(), dense_bytes(cache.dense), cache.memory_report()))
        advance()
    return points


def draw(points: list[Point], name: str, dtype: str, path: Path) -> None:
    """Writes the chart of model `name`, which ran in `dtype`, to `path` (PNG)."""
    from matplotlib.figure import Figure

    tokens = [0] + [point.tokens for point in points]
    areas = {
        label: [0.0] + [sum(point.report.parts[part] for part in parts) / 2**20 for point in points]
        for label, parts in GROUPS.items()
    }
    # a compressor has no scales, and a cache without references none of these
    shown = {label: color for (label, area), color in zip(areas.items(), COLORS, strict=True) if any(area)}
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(
        tokens, *(areas[label] for label in shown), labels=list(shown), colors=list(shown.values()), linewidth=0
    )
    stored = [0.0] + [point.report.stored_bytes / 2**20 for point in points]
    dense = [0.0] + [point.dense_bytes / 2**20 for point in points]
    axes.plot(tokens, stored, color="#102a43", marker="o", markersize=4, linewidth=1.5)
    axes.plot(tokens, dense, color="#ba2525", marker="o", markersize=4, linewidth=1.5)
    labels = [("full cache", dense[-1], "#ba2525"), ("DeltaKVCache", stored[-1], "#102a43")]
    if dtype == "float32":
        # most models run in 16 bits, where a full cache is half as large
        half = [value / 2 for value in dense]
        axes.plot(tokens, half, color="#ba2525", linestyle=":", linewidth=1.2)
        labels.append(("were it 16-bit", half[-1], "#ba2525"))
    for label, value, color in labels:
        text = f"{label}\n{value:.1f} MiB"
        axes.annotate(text, (tokens[-1], value), xytext=(8, 0), textcoords="offset points", color=color, va="center")
    axes.set_xlim(0, tokens[-1] * 1.24)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, max(dense[-1], stored[-1]) * 1.08)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("bytes held by the cache, MiB")
    share = f"{stored[-1] / dense[-1]:.1%} of the full cache at {tokens[-1]:,} tokens"
    axes.set_title(f"{name}, {dtype}\n{share}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", frameon=False, title="DeltaKVCache, by part")
    figure.savefig(path, dpi=150, format="png")
