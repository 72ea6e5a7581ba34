"""Options of `JointEncodedCache`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .config import COMPRESSOR_WINDOW, check_integer, refuse_unknown
from .errors import InvalidOptionError
from .fusion import SCOPES

ROPE = ("stripped", "rotated")
# tokens that attention falls back to
COMPRESSOR_SINKS = 4
# with a ratio to aim at and no error to keep to
LARGEST_ERROR = 0.95


@dataclass(frozen=True)
class JointEncodingConfig:
    """Options of `JointEncodedCache` (arXiv 2601.03067). By default equal blocks are stored once and nothing is lost.

    Args:
        block_size: tokens of a block (>= 1); what a row has beyond its last whole block is its own. With a compressor
            whole strides of its references.
        num_sink_tokens: first tokens of each row that are kept as they are, by each row (>= 0; 4 with a compressor).
        recent_window: newest tokens that are kept so (>= 0; 64 with a compressor).
        scope: which similar blocks may share storage: "all" of a group; "batch", of different requests; "same_index",
            of different requests and at the same place; "intra", of one request; "none".
        max_relative_error: largest distance of a block's keys, and of its values, from what is read, relative to their
            distance from the mean of the layer (0 <= it < 1). 0: only equal blocks share, and nothing is lost.
        target_ratio: share of the blocks that may stay in a layer (0 < it < 1): the least error that is predicted to
            give it is allowed, at most `max_relative_error` unless that is 0. None: no aim.
        rope: how keys of blocks that similar ones share are compared and stored: "stripped" of their rotation, so that
            positions make no difference, or "rotated".
        groups: a number for each row of the first call (a tuple of integers >= 0); rows of different numbers never
            share a block. None: all rows may.

    Raises:
        InvalidOptionError: a value is out of range; the message names it.

    Examples:
        >>> JointEncodingConfig().fuses  # equal blocks alone, nothing is lost
        False
        >>> JointEncodingConfig(max_relative_error=0.3).fuses
        True
    """

    block_size: int = 16
    scope: str = "all"
    max_relative_error: float = 0.0
    target_ratio: float | None = None
    rope: str = "stripped"
    groups: tuple[int, ...] | None = None
    num_sink_tokens: int = 0
    recent_window: int = 0

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, low=1)
        check_integer("num_sink_tokens", self.num_sink_tokens, low=0)
        check_integer("recent_window", self.recent_window, low=0)
        for name, known in (("scope", SCOPES), ("rope", ROPE)):
            if getattr(self, name) not in known:
                raise InvalidOptionError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        error, ratio = self.max_relative_error, self.target_ratio
        if not _is_number(error) or not 0 <= error < 1:
            raise InvalidOptionError(f"`max_relative_error` must be a number from 0 to below 1, got {error!r}.")
        if ratio is not None and (not _is_number(ratio) or not 0 < ratio < 1):
            raise InvalidOptionError(
                f"`target_ratio` must be a number between 0 and 1, the share of the blocks that may stay, or None, got "
                f"{ratio!r}."
            )
        if self.groups is None:
            return
        if not isinstance(self.groups, (tuple, list)) or not self.groups:
            raise InvalidOptionError(f"`groups` must be a number for each row, or None, got {self.groups!r}.")
        for group in self.groups:
            check_integer("groups", group, low=0)
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def fuses(self) -> bool:
        """Whether similar blocks may share storage, so that something is lost."""
        return self.max_relative_error > 0 or self.target_ratio is not None

    @property
    def strips_rope(self) -> bool:
        """Whether keys are stored without their rotation."""
        return self.fuses and self.rope == "stripped"

    @property
    def largest_error(self) -> float:
        """What no block's error may go beyond."""
        return self.max_relative_error or LARGEST_ERROR

    @classmethod
    def from_options(cls, options: dict, residual=None) -> JointEncodingConfig:
        """Makes a config from keyword options, refusing unknown names with the nearest known one.

        Args:
            options: values by the name of a field.
            residual: a `KVCompressor`, or None.

        Returns:
            The config.

        Raises:
            InvalidOptionError: a name is unknown, a value out of range, or both exclude each other.
        """
        refuse_unknown(options, [field.name for field in dataclasses.fields(cls)])
        if residual is None:
            return cls(**options)
        made = cls(**{"num_sink_tokens": COMPRESSOR_SINKS, "recent_window": COMPRESSOR_WINDOW} | options)
        if made.fuses:
            raise InvalidOptionError(
                "`residual` must be None where similar blocks share storage, got a compressor with "
                f"`max_relative_error` {made.max_relative_error} and `target_ratio` {made.target_ratio}. Leave one of "
                "the two out."
            )
        if residual.reference_growth or made.block_size % residual.reference_stride:
            raise InvalidOptionError(
                f"`block_size` must be a multiple of the compressor's stride of references, which must not grow: got "
                f"{made.block_size} for {residual.name} with stride {residual.reference_stride} and growth "
                f"{residual.reference_growth}."
            )
        return made


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
