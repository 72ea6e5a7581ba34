"""What a cache has done so far."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SelectionStats:
    """What decode steps with a `selection` have read, over all layers that chose.

    Attributes:
        layer_steps: times that a layer chose.
        tokens_read, tokens_held: compressed tokens that were read then, and that could have been, over all rows.
        recall: share of the attention that went to what was read (sinks and window included), mean of the steps that
            `sample_every` took; None if it took none.
    """

    layer_steps: int
    tokens_read: int
    tokens_held: int
    recall: float | None


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made or reset; tokens and columns are those of one layer.

    Attributes:
        forwards: forwards that went through every layer.
        encoded_tokens: tokens that were compressed, over all rows; a token that comes again after a crop counts again.
        crops, cropped_columns: calls of `crop` that removed something, and the columns that they removed.
        deep_crops, dropped_tokens: crops that reached into compressed tokens, and how many of these they dropped, over
            all rows.
        selection: of decode steps that chose what they read, or None without a `selection`.
    """

    forwards: int = 0
    encoded_tokens: int = 0
    crops: int = 0
    cropped_columns: int = 0
    deep_crops: int = 0
    dropped_tokens: int = 0
    selection: SelectionStats | None = None

    def plus(self, **more: int) -> CacheStats:
        """Adds to the counts.

        Args:
            **more: what to add, by the name of a count.

        Returns:
            These counts and `more`.
        """
        return replace(self, **{name: getattr(self, name) + count for name, count in more.items()})
