"""Compressors: how tokens become bytes and come back. One file each, one interface."""

from .direct import DirectCompressor, DirectStore
from .learned import Learned, LearnedCompressor, LearnedStore, Network
from .store import TokenStore
from .transform import Transform, TransformCompressor, TransformStore, project

__all__ = [
    "DirectCompressor",
    "DirectStore",
    "Learned",
    "LearnedCompressor",
    "LearnedStore",
    "Network",
    "TokenStore",
    "Transform",
    "TransformCompressor",
    "TransformStore",
    "project",
]
