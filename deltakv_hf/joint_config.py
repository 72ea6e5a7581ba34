"""Options of `JointEncodedCache`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from .config import check_integer, refuse_unknown
from .errors import InvalidOptionError


@dataclass(frozen=True)
class JointEncodingConfig:
    """Options of `JointEncodedCache`, with which equal blocks are stored once.

    Args:
        block_size: tokens of a block (>= 1); what a row has beyond its last whole block is its own.
        groups: a number for each row of the first call (a tuple of integers >= 0); rows of different numbers never
            share a block. None: all rows may.
    """

    # every whole block of a row is stored as one
    num_sink_tokens: ClassVar[int] = 0
    recent_window: ClassVar[int] = 0
    reference_stride: ClassVar[int] = 1
    reference_growth: ClassVar[float] = 0.0

    block_size: int = 16
    groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, low=1)
        if self.groups is None:
            return
        if not isinstance(self.groups, (tuple, list)) or not self.groups:
            raise InvalidOptionError(f"`groups` must be a number for each row, or None, got {self.groups!r}.")
        for group in self.groups:
            check_integer("groups", group, low=0)
        object.__setattr__(self, "groups", tuple(self.groups))

    @classmethod
    def from_options(cls, options: dict) -> JointEncodingConfig:
        """Makes a config from keyword options, refusing unknown names with the nearest known one."""
        refuse_unknown(options, [field.name for field in dataclasses.fields(cls)])
        return cls(**options)
