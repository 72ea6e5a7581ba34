"""Settings of a calibration, checked once."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..config import COMPRESSOR_WINDOW, DeltaKVConfig, check_integer, refuse_unknown
from ..errors import InvalidOptionError

# tokens without which 256 vectors a group cannot be fitted
FEWEST_TOKENS = 2048
REFERENCE_STRIDE = 8
# what a measured context must hold: all that stays raw, a block that may just be waiting, and one that is compressed;
# where nothing is, every compressor measures as the full cache
FEWEST_STORED = DeltaKVConfig.num_sink_tokens + COMPRESSOR_WINDOW + 2 * DeltaKVConfig.block_size
SHORTEST_WINDOW = -(-FEWEST_STORED * 4 // 3)


@dataclass(frozen=True)
class CalibrationSettings:
    """How a compressor is fitted.

    Args:
        num_tokens: tokens of text to store and learn from.
        window: tokens of a window, 176 at least; its last quarter is predicted from the stored rest.
        reference_stride: one token in so many is a reference where references pay; 1 leaves them out. None takes 8, and
            1 with `heads_per_group`.
        heads_per_group: heads of K and V that are coded jointly, so that a group fits one part of a model that is split
            over devices; None codes all heads of a layer jointly, which is best. Groups share nothing, so there are no
            references: a token's nearest one would be found with the heads of all.
        sensitivity_windows: windows whose predictions are differentiated.
        draws: answers drawn from each of these predictions.
        num_sink_tokens: first tokens of a window, which a cache leaves as they are.
        keep_statistics: store second moments of tokens and gradients in the folder.
        seed: of every random choice.
    """

    num_tokens: int = 100_000
    window: int = 4096
    reference_stride: int | None = None
    heads_per_group: int | None = None
    sensitivity_windows: int = 12
    draws: int = 1
    num_sink_tokens: int = 4
    keep_statistics: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("num_tokens", self.num_tokens, low=FEWEST_TOKENS)
        check_integer("window", self.window, low=SHORTEST_WINDOW)
        if self.reference_stride is None:
            object.__setattr__(self, "reference_stride", REFERENCE_STRIDE if self.heads_per_group is None else 1)
        check_integer("reference_stride", self.reference_stride, low=1)
        check_integer("sensitivity_windows", self.sensitivity_windows, low=1)
        check_integer("draws", self.draws, low=1)
        check_integer("num_sink_tokens", self.num_sink_tokens, low=0, high=self.window // 2)
        check_integer("seed", self.seed, low=0)
        if self.heads_per_group is not None:
            check_integer("heads_per_group", self.heads_per_group, low=1)
            if self.reference_stride != 1:
                raise InvalidOptionError(
                    f"`reference_stride` must be 1 with `heads_per_group`, got {self.reference_stride}: groups of "
                    "heads share no references. Leave one of them out."
                )
        if not isinstance(self.keep_statistics, bool):
            raise InvalidOptionError(f"`keep_statistics` must be True or False, got {self.keep_statistics!r}.")

    @classmethod
    def from_options(cls, options: dict) -> CalibrationSettings:
        """Makes settings from keyword options, refusing unknown names with the nearest known one.

        Args:
            options: values by the name of a field.

        Returns:
            The settings.

        Raises:
            InvalidOptionError: a name is unknown or a value out of range.
        """
        refuse_unknown(options, [field.name for field in fields(cls)])
        return cls(**options)

    @property
    def predicted(self) -> int:
        """Last tokens of a window, which are predicted."""
        return self.window // 4

    @property
    def stored(self) -> int:
        """First tokens of a window, which the others are predicted from."""
        return self.window - self.predicted

    def num_splits(self, heads: int) -> int:
        """Counts the parts that a layer is coded in.

        Args:
            heads: its key-value heads.

        Returns:
            One without `heads_per_group`.

        Raises:
            InvalidOptionError: `heads_per_group` does not divide them.
        """
        if self.heads_per_group is None:
            return 1
        if heads % self.heads_per_group:
            raise InvalidOptionError(
                f"`heads_per_group` must divide the {heads} key-value heads of a layer, got {self.heads_per_group}."
            )
        return heads // self.heads_per_group

    def check_enough(self, tokens: int) -> None:
        """Checks that 256 vectors can be fitted to a group.

        Args:
            tokens: tokens to learn from.

        Raises:
            InvalidOptionError: they are too few.
        """
        if tokens < FEWEST_TOKENS:
            raise InvalidOptionError(
                f"`texts` must hold at least {FEWEST_TOKENS} tokens to store and learn from, got {tokens}: give more "
                "text, or a larger `num_tokens` to take more of it."
            )
