"""A compressed KV cache for Hugging Face transformers: `model.generate(past_key_values=DeltaKVCache(model))`."""

from . import attention as _attention
from .attach import detach
from .cache import DeltaKVCache
from .compressor.kv_compressor import KVCompressor
from .config import DeltaKVConfig
from .default_cache import set_default_cache
from .errors import (
    CacheStateError,
    CompressorError,
    DeltaKVError,
    InvalidOptionError,
    NotPicklableError,
    TrainingError,
    UnsupportedModelError,
)
from .joint import JointEncodedCache
from .joint_config import JointEncodingConfig
from .memory import MemoryReport
from .releasing import ReleaseFinished
from .stats import CacheStats

__version__ = "0.1.0"

__all__ = [
    "CacheStateError",
    "CacheStats",
    "CompressorError",
    "DeltaKVCache",
    "DeltaKVConfig",
    "DeltaKVError",
    "InvalidOptionError",
    "JointEncodedCache",
    "JointEncodingConfig",
    "KVCompressor",
    "MemoryReport",
    "NotPicklableError",
    "ReleaseFinished",
    "TrainingError",
    "UnsupportedModelError",
    "detach",
    "set_default_cache",
]

_attention.register()
