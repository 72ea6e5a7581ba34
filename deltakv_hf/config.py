"""Options of the caches: frozen dataclasses, checked once when they are made."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from .errors import InvalidOptionError

# options that do not say how a token is coded
SELECTION = ("selection", "keep", "index_bytes", "layers_per_choice", "filter_layers", "sample_every")
FREE = ("num_sink_tokens", "recent_window", "block_size", *SELECTION)
SELECTIONS = ("all", "coarse_to_fine", "filter_layers")
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
        selection: which compressed tokens a decode step reads: "all"; "coarse_to_fine", those whose codes begin
            most promisingly; or "filter_layers", those that matter most to some layers, which hold all tokens in four
            bits and choose for the layers behind them. Both need a calibrated compressor. Calls of several tokens read
            all.
        keep: compressed tokens of a row that a step reads then: a number (>= 1), or a share of them (a float above 0,
            up to 1). Where no more are held, all are read. A tuple has one for each compressed layer (of layers that
            share a choice, that of the one that chooses counts).
        index_bytes: with "coarse_to_fine", bytes at the beginning of a token by which it is scored (>= 1); layers whose
            tokens have no more are read whole.
        layers_per_choice: with "coarse_to_fine", layers in a row that read what the first of them has chosen (>= 1).
        filter_layers: with "filter_layers", their numbers, ascending, the first compressed layer among them; None:
            those that come with the compressor (`deltakv calibrate --select-layers`) or are known for the model.
            `block_size` must be a multiple of 32 then.
        sample_every: one of so many such steps also reads everything, for `cache.stats()` to tell what the others miss
            (>= 0; 0: none).

    Raises:
        InvalidOptionError: a value is out of range; the message names it.

    Examples:
        >>> DeltaKVConfig(recent_window=64).nbits
        4
        >>> DeltaKVConfig(nbits=3)
        Traceback (most recent call last):
        ...
        deltakv_hf.errors.InvalidOptionError: `nbits` must be one of 2, 4, 8, got 3.
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
    keep: int | float | tuple[int | float, ...] = 2048
    index_bytes: int = 32
    layers_per_choice: int = 1
    filter_layers: tuple[int, ...] | None = None
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
        self._check_keep()
        check_integer("index_bytes", self.index_bytes, low=1)
        check_integer("layers_per_choice", self.layers_per_choice, low=1)
        self._check_filter_layers()
        check_integer("sample_every", self.sample_every, low=0)
        growth = self.reference_growth
        if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 0 <= growth < float("inf"):
            raise InvalidOptionError(f"`reference_growth` must be a finite number >= 0, got {growth!r}.")

    def _check_keep(self) -> None:
        if isinstance(self.keep, (tuple, list)):
            # a list comes from JSON
            object.__setattr__(self, "keep", tuple(self.keep))
        for keep in self.keep if isinstance(self.keep, tuple) else [self.keep]:
            check_keep(keep)

    def _check_filter_layers(self) -> None:
        if self.selection == "filter_layers" and self.block_size % 32:
            raise InvalidOptionError(
                f'`block_size` must be a multiple of 32 with `selection="filter_layers"`, got {self.block_size}.'
            )
        given = self.filter_layers
        if given is None:
            return
        if self.selection != "filter_layers":
            raise InvalidOptionError(
                f'`filter_layers` must be left out unless `selection="filter_layers"`, got {given!r} with '
                f"{self.selection!r}."
            )
        is_list = isinstance(given, (tuple, list)) and all(type(idx) is int and idx >= 0 for idx in given)
        if not is_list or not given or list(given) != sorted(set(given)):
            raise InvalidOptionError(f"`filter_layers` must be numbers of layers, ascending, got {given!r}.")
        # a list comes from JSON
        object.__setattr__(self, "filter_layers", tuple(given))

    @classmethod
    def from_options(cls, options: dict, compressor=None) -> DeltaKVConfig:
        """Makes a config from keyword options, refusing unknown names with the nearest known one.

        Args:
            options: values by the name of a field.
            compressor: a `KVCompressor`, which fixes how tokens are coded, or None.

        Returns:
            The config.

        Raises:
            InvalidOptionError: a name is unknown, a value out of range, or both exclude each other.
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
