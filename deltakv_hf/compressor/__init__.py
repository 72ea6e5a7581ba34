"""Compressors: how tokens become bytes and come back. One file each, one interface."""

from .coder import Coder, ResidualCoder, TokenCoder
from .direct import DirectCompressor, DirectStore
from .int4 import Int4Compressor, Int4Store
from .learned import Learned, LearnedCompressor, LearnedStore, Network
from .store import TokenStore
from .transform import Transform, TransformCompressor, TransformStore, project

__all__ = [
    "Coder",
    "DirectCompressor",
    "DirectStore",
    "Int4Compressor",
    "Int4Store",
    "Learned",
    "LearnedCompressor",
    "LearnedStore",
    "Network",
    "ResidualCoder",
    "TokenCoder",
    "TokenStore",
    "Transform",
    "TransformCompressor",
    "TransformStore",
    "project",
]
