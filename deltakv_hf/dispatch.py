"""The only place that imports kernels: one function per op, backend chosen here."""

from __future__ import annotations

from .kernels.reference import (
    LINEAR_MAPS,
    Attended,
    attend,
    dequantize,
    feed_forward,
    grid_limit,
    nearest_references,
    predict,
    quantize,
    reconstruct,
    vector_dequantize,
    vector_quantize,
)

__all__ = [
    "LINEAR_MAPS",
    "Attended",
    "attend",
    "dequantize",
    "feed_forward",
    "grid_limit",
    "nearest_references",
    "predict",
    "quantize",
    "reconstruct",
    "vector_dequantize",
    "vector_quantize",
]
