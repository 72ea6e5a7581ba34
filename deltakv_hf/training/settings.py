"""Settings of a training, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..calibration.settings import FEWEST_TOKENS, SHORTEST_WINDOW, CalibrationSettings
from ..config import DeltaKVConfig, check_integer, refuse_unknown
from ..errors import InvalidOptionError

LOSSES = ("kl", "paper")


@dataclass(frozen=True)
class TrainingSettings:
    """How a compressor is trained.

    Args:
        loss: "kl": KL(full || compressed) of predictions after a context that was read exactly and then compressed, as
            a cache does it; contexts are of several lengths. "paper": next-token loss with every layer attending to
            what its tokens read back as, plus squared errors (arXiv 2602.08005, section 4).
        num_steps: steps of the optimiser; 0 measures the beginning and leaves it as it is.
        batch_size: windows read at once; with several processes, by each of them.
        gradient_accumulation_steps: batches of a step, one after the other.
        window: tokens of a window, 176 at least; with "kl" a quarter of so many is predicted from the rest.
        num_tokens: tokens of text to learn from; they come again once all were seen.
        learning_rate: largest step, of a vector in units of its layer's coding error or of a network's weight; None
            takes 5e-2 for a calibrated compressor and 6e-5 for a learned one.
        warmup: share of the steps in which the rate rises to that; after them it falls to nothing along a cosine.
        max_grad_ratio: gradients longer than so many times the median of the steps before are scaled down to that.
        eval_every: steps between two looks at the held-out windows; the best look is what is kept.
        patience: looks without a better one after which training stops.
        num_sink_tokens: first tokens of a window, which a cache leaves as they are.
        recent_window: newest tokens of a context that a cache leaves as they are ("kl").
        gradient_checkpointing: compress again in the backward pass instead of keeping what it needs.
        seed: of every random choice.
    """

    loss: str = "kl"
    num_steps: int = 400
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    window: int = 4096
    num_tokens: int = 2_000_000
    learning_rate: float | None = None
    warmup: float = 0.05
    max_grad_ratio: float = 3.0
    eval_every: int = 50
    patience: int = 4
    num_sink_tokens: int = 4
    recent_window: int = 64
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidOptionError(f"`loss` must be {' or '.join(LOSSES)}, got {self.loss!r}.")
        check_integer("window", self.window, low=SHORTEST_WINDOW)
        check_integer("num_steps", self.num_steps, low=0)
        for name in ("batch_size", "gradient_accumulation_steps", "num_tokens", "eval_every", "patience"):
            check_integer(name, getattr(self, name), low=1)
        check_integer("num_sink_tokens", self.num_sink_tokens, low=0, high=self.window // 2)
        check_integer("recent_window", self.recent_window, low=0, high=self.window // 2)
        check_integer("seed", self.seed, low=0)
        for name, limit in (("learning_rate", 1.0), ("max_grad_ratio", float("inf"))):
            value = getattr(self, name)
            if value is None and name == "learning_rate":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= limit:
                raise InvalidOptionError(f"`{name}` must be above 0 and at most {limit:g}, got {value!r}.")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, (int, float)) or not 0 <= self.warmup < 1:
            raise InvalidOptionError(f"`warmup` must be from 0 to below 1, got {self.warmup!r}.")
        if not isinstance(self.gradient_checkpointing, bool):
            raise InvalidOptionError(
                f"`gradient_checkpointing` must be True or False, got {self.gradient_checkpointing!r}."
            )

    @classmethod
    def from_options(cls, options: dict) -> TrainingSettings:
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
    def context(self) -> int:
        """First tokens of a window, which the others are predicted from."""
        return self.window - self.window // 4

    def context_of(self, number: int) -> int:
        """The context that a batch is trained with: all of it, or now and then a half or a quarter.

        What is learnt from long contexts alone helps short ones less.

        Args:
            number: of the batch.

        Returns:
            Tokens of the context.
        """
        fewest = self.num_sink_tokens + self.recent_window + 2 * DeltaKVConfig.block_size
        return max(self.context // (1, 2, 1, 4)[number % 4], min(fewest, self.context))

    def stored(self, context: int) -> slice:
        """Finds what a cache compresses of a context: whole blocks between the sinks and the recent window.

        Args:
            context: tokens of the context.

        Returns:
            The place of these tokens.
        """
        block, first = DeltaKVConfig.block_size, self.num_sink_tokens
        return slice(first, first + max(context - first - self.recent_window, 0) // block * block)

    def rate(self, step: int) -> float:
        """Warms up, then falls along a cosine.

        Args:
            step: number of the step, from 0.

        Returns:
            Share of the learning rate that the step takes.
        """
        warm = max(1, round(self.warmup * self.num_steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.num_steps - warm)))

    def reading(self) -> CalibrationSettings:
        """Says how windows are cut from texts: as for a calibration.

        Returns:
            Settings of such a calibration.
        """
        own = {name: getattr(self, name) for name in ("window", "num_sink_tokens", "seed")}
        return CalibrationSettings(num_tokens=max(self.num_tokens, FEWEST_TOKENS), **own)
