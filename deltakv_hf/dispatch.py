"""The only place that imports kernels: one function per op, backend chosen here."""

from __future__ import annotations

from .kernels.reference import (
    Attended,
    attend,
    dequantize,
    grid_limit,
    nearest_references,
    predict,
    quantize,
    reconstruct,
    vector_dequantize,
    vector_quantize,
)

__all__ = [
    "Attended",
    "attend",
    "dequantize",
    "grid_limit",
    "nearest_references",
    "predict",
    "quantize",
    "reconstruct",
    "vector_dequantize",
    "vector_quantize",
]
