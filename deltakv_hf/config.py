"""Options of the caches: frozen dataclasses, checked once when they are made."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from .errors import InvalidOptionError

# options that do not say how a token is coded
FREE = ("num_sink_tokens", "recent_window", "block_size", "selection", "keep", "index_bytes", "sample_every")
SELECTIONS = ("all", "coarse_to_fine")
# raw tokens cost more, and errors of a calibrated compressor less: a smaller window is the better bargain
COMPRESSOR_WINDOW = 64


@dataclass(frozen=True)
class DeltaKVConfig:
    """Options of `DeltaKVCache` (arXiv 2602.08005, section 3, in the training-free form).

    Every count is in real tokens of a row; padding is never counted.

    Args:
        num_sink_tokens: first tokens of a row that stay raw for ever (>= 0).
        recent_window: newest tokens of a row that stay raw at least (>= 0).
        block_size: tokens leave the window in whole blocks of this many (>= 1); between two flushes a row
            holds `recent_window` to `recent_window + block_size - 1` raw tokens behind its sinks.
        reference_stride: every so many compressed tokens one is a reference (>= 1).
        reference_growth: growing stride of the paper: after a reference at compressed position `p` the next one
            follows `reference_stride + int(reference_growth * p)` tokens later (>= 0; 0 keeps the stride fixed).
        top_k: references whose mean predicts a token (1 to 16).
        nbits: bits per stored residual number (2, 4 or 8).
        reference_nbits: bits per stored number of a reference (2, 4 or 8).
        group_size: numbers that share one fp16 scale and minimum (>= 1). Where it does not divide
            `num_key_value_heads * head_dim`, the largest divisor below it is used.
        selection: which compressed tokens a decode step reads: "all", or "coarse_to_fine", those whose codes begin
            most promisingly (needs a calibrated compressor). Calls of several tokens read all.
        keep: compressed tokens of a row that a step reads with "coarse_to_fine": a number (>= 1), or a share of them
            (a float above 0, up to 1). Where no more are held, all are read.
        index_bytes: bytes at the beginning of a token by which it is scored then (>= 1); layers whose tokens have no
            more are read whole.
        sample_every: one of so many such steps also reads everything, for `cache.stats()` to tell what the others miss
            (>= 0; 0: none).
    """

    num_sink_tokens: int = 4
    recent_window: int = 128
    block_size: int = 32
    reference_stride: int = 32
    reference_growth: float = 0.0
    top_k: int = 1
    nbits: int = 4
    reference_nbits: int = 8
    group_size: int = 64
    selection: str = "all"
    keep: int | float = 2048
    index_bytes: int = 32
    sample_every: int = 0

    def __post_init__(self) -> None:
        check_integer("num_sink_tokens", self.num_sink_tokens, low=0)
        check_integer("recent_window", self.recent_window, low=0)
        check_integer("block_size", self.block_size, low=1)
        check_integer("reference_stride", self.reference_stride, low=1)
        check_integer("top_k", self.top_k, low=1, high=16)
        check_integer("group_size", self.group_size, low=1)
        for name in ("nbits", "reference_nbits"):
            if getattr(self, name) not in (2, 4, 8) or isinstance(getattr(self, name), bool):
                raise InvalidOptionError(f"`{name}` must be one of 2, 4, 8, got {getattr(self, name)!r}.")
        if self.selection not in SELECTIONS:
            raise InvalidOptionError(f"`selection` must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        check_keep(self.keep)
        check_integer("index_bytes", self.index_bytes, low=1)
        check_integer("sample_every", self.sample_every, low=0)
        growth = self.reference_growth
        if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 0 <= growth < float("inf"):
            raise InvalidOptionError(f"`reference_growth` must be a finite number >= 0, got {growth!r}.")

    @classmethod
    def from_options(cls, options: dict, compressor=None) -> DeltaKVConfig:
        """Makes a config from keyword options, refusing unknown names with the nearest known one.

        Args:
            compressor: a `KVCompressor`, which fixes how tokens are coded, or None.
        """
        refuse_unknown(options, [field.name for field in dataclasses.fields(cls)])
        if compressor is None:
            return cls(**options)
        fixed = [name for name in options if name not in FREE]
        if fixed:
            raise InvalidOptionError(
                f"`{fixed[0]}` must be left out with a compressor, which fixes it, got {options[fixed[0]]!r}. Only "
                f"{', '.join(FREE)} can be chosen."
            )
        lattice = {"reference_stride": compressor.reference_stride, "reference_growth": compressor.reference_growth}
        return cls(**{"recent_window": COMPRESSOR_WINDOW} | options, **lattice)


def refuse_unknown(options: dict, known: list[str]) -> None:
    """Raises for a name that is not in `known`, with the nearest that is."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InvalidOptionError(f"`{name}` is not an option; the options are {', '.join(known)}.{hint}")


def check_keep(keep: object) -> None:
    """Raises unless `keep` is a number of tokens or a share."""
    if isinstance(keep, float) and 0 < keep <= 1:
        return
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise InvalidOptionError(
            f"`keep` must be a number of tokens (an integer >= 1) or a share of them (a float above 0, up to 1), "
            f"got {keep!r}."
        )


def check_integer(name: str, value: object, *, low: int | None = None, high: int | None = None) -> None:
    """Raises unless `value` is an integer, at least `low` and (given with `low`) at most `high`."""
    rule = "" if low is None else f" >= {low}" if high is None else f" from {low} to {high}"
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        raise InvalidOptionError(f"`{name}` must be an integer{rule}, got {value!r}.")
