"""Compressors: how tokens become bytes and come back. One file each, one interface."""

from .direct import DirectCompressor, DirectStore

__all__ = ["DirectCompressor", "DirectStore"]
