"""What a calibration reads: windows of ids, of texts or as given, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoTokenizer

from ..errors import CacheStateError, InvalidOptionError
from ..support import check_length, longrope_switch, max_positions
from .settings import CalibrationSettings
from .texts import MOST_HELD_OUT, token_windows

# of so many windows of given ids, one is held out
FEWEST_IDS = 5


def calibration_windows(model, texts, tokenizer, settings: CalibrationSettings, measured_windows: int | None):
    """Ids to calibrate on and ids held out."""
    if isinstance(texts, torch.Tensor):
        held = min(MOST_HELD_OUT, len(texts) // FEWEST_IDS) if measured_windows is None else measured_windows
        # a copy: ids that were made in inference mode cannot be used outside
        windows, held_out = texts.clone().tensor_split([max(len(texts) - held, 0)])
    else:
        if tokenizer is None and not model.config.name_or_path:
            raise InvalidOptionError("`tokenizer` must be given for a model that was not loaded, got None.")
        if tokenizer is None:
            tokenizer = _tokenizer(model.config.name_or_path)
        windows, held_out = token_windows(
            tokenizer,
            texts,
            num_tokens=settings.num_tokens,
            num_uncounted=settings.predicted,
            window=settings.window,
            seed=settings.seed,
            num_held_out=measured_windows,
        )
    settings.check_enough(len(windows) * (settings.stored - settings.num_sink_tokens))
    return windows, held_out


def nothing_held_out(num_windows: int, measured_windows: int | None) -> InvalidOptionError:
    """Why there is no `target_kl` without held-out text."""
    if measured_windows == 0:
        return InvalidOptionError(
            "`measured_windows` must not be 0 with `target_kl`, which is searched on held-out text: leave it out."
        )
    return InvalidOptionError(
        f"`texts` must hold at least {FEWEST_IDS} windows of ids with `target_kl`, which is searched on a fifth of "
        f"them, got {num_windows}: give more, or set `measured_windows`."
    )


def sources_of(texts: Mapping) -> list[dict[str, str]]:
    """What a config notes of several sources; who knows their licences writes them in."""
    return [{"source": str(name), "license": "not stated"} for name in texts]


def _tokenizer(name: str):
    """The tokenizer of a model that was loaded by `name`."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidOptionError(
            f"`tokenizer` must be given for a model that has none where it was loaded from ({name!r}), got None: "
            f"{reason}"
        ) from error


def check_positions(model, settings: CalibrationSettings) -> None:
    """Raises for windows that the model has no positions for, or in which it changes its frequencies."""
    limit = max_positions(model)
    if limit is not None and settings.window > limit:
        raise InvalidOptionError(
            f"`window` must fit the {limit} positions of the model, got {settings.window}: take {limit} or less."
        )
    switch = longrope_switch(model.config.get_text_config(decoder=True))
    try:
        check_length(switch, 0, settings.stored)
        check_length(switch, settings.stored, settings.predicted)
    except CacheStateError as error:
        raise InvalidOptionError(
            f"`window` must stay below {switch} tokens (`original_max_position_embeddings`), where this longrope model "
            f"changes its frequencies, or go so far beyond that it is read beyond it at once, got {settings.window}: "
            f"take {switch - 1} or less."
        ) from error


def check_differentiable(model) -> None:
    """Raises for a model that no gradient can go through."""
    if any(part.is_inference() for part in (*model.parameters(), *model.buffers())):
        raise InvalidOptionError(
            "`model` must be differentiable, got one that was loaded under `torch.inference_mode()`, which rules that "
            "out for ever. Load it outside; this function itself may be called inside."
        )


def check_ids(model, ids: torch.Tensor) -> torch.Tensor:
    """`ids` themselves; raises unless they are `[windows, tokens]` int64 that the model knows."""
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InvalidOptionError(f"`texts` must be int64 ids [windows, tokens], got {ids.dtype} {tuple(ids.shape)}.")
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and not (0 <= ids.min() and ids.max() < known):
        raise InvalidOptionError(
            f"`texts` must be ids from 0 to {known - 1}, which the model knows, got {ids.min()} to {ids.max()}."
        )
    return ids
