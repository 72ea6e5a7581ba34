"""The caches that the compatibility matrix is run for. A new cache class, or a new storage, is one more line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from helpers import LOSSLESS, TIGHT
from transformers import Cache, PreTrainedModel

from deltakv_hf import DeltaKVCache


@dataclass(frozen=True)
class Kind:
    """A way to make a cache.

    Attributes:
        name: of the kind.
        make: function `model -> cache`.
        lossless: whether it must say what `DynamicCache` says, bit for bit; if not, it must hold compressed tokens
            after the prompt of a test, and is compared with itself in other modes.
    """

    name: str
    make: Callable[[PreTrainedModel], Cache]
    lossless: bool

    def check_active(self, cache: Cache) -> None:
        """Raises unless the cache compresses."""
        report = cache.memory_report()
        assert report.compressed_tokens > 0, "nothing was compressed"
        assert report.stored_bytes < report.dense_bytes, f"stored {report.stored_bytes} of {report.dense_bytes}"


KINDS = [
    Kind("lossless", lambda model: DeltaKVCache(model, **LOSSLESS), lossless=True),
    Kind("compressed", lambda model: DeltaKVCache(model, **TIGHT), lossless=False),
]
