"""The only place that imports kernels: one function per op, backend chosen here."""

from __future__ import annotations

from .kernels.reference import dequantize, nearest_references, predict, quantize, reconstruct

__all__ = ["dequantize", "nearest_references", "predict", "quantize", "reconstruct"]
