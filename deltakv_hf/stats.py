"""What a cache has done so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made or reset; tokens and columns are those of one layer.

    Attributes:
        forwards: forwards that went through every layer.
        encoded_tokens: tokens that were compressed, over all rows; a token that comes again after a crop counts again.
        crops, cropped_columns: calls of `crop` that removed something, and the columns that they removed.
        deep_crops, dropped_tokens: crops that reached into compressed tokens, and how many of these they dropped, over
            all rows.
    """

    forwards: int = 0
    encoded_tokens: int = 0
    crops: int = 0
    cropped_columns: int = 0
    deep_crops: int = 0
    dropped_tokens: int = 0

    def plus(self, **more: int) -> CacheStats:
        """These counts and `more`."""
        return CacheStats(**{name: count + more.get(name, 0) for name, count in asdict(self).items()})
