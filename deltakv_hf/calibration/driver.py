"""`calibrate`: from a model and texts to a `KVCompressor`."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..attach import unwrap
from ..compressor.kv_compressor import KVCompressor
from ..config import check_integer
from ..errors import InvalidOptionError
from .capture import evaluating
from .inputs import calibration_windows, check_differentiable, check_ids, check_positions, nothing_held_out, sources_of
from .run import Clock, Progress, Run, workspace_key
from .select_layers import check_number, select_filter_layers
from .settings import CalibrationSettings
from .workspace import Workspace

# windows whose attention says which layers choose
LOOKED_AT = 8
# ratios tried for a KL, unless all are too large
TRIES = 4
LEAST_RATIO, MOST_RATIO = 1.5, 200


def calibrate(
    model: PreTrainedModel,
    texts,
    *,
    ratio: float | None = None,
    target_kl: float | None = None,
    tokenizer=None,
    workspace: str | os.PathLike | None = None,
    measured_windows: int | None = None,
    select_layers: int | None = None,
    progress: Progress = lambda stage, steps: lambda: None,
    **settings,
) -> KVCompressor:
    """Fits a compressor to `model` on `texts`.

    Args:
        model: of any dtype, best the one that it will run in; on the device where calibration shall run. It is left as
            it is but for the hooks that a cache puts on it; nothing is drawn from the global random generators.
        texts: documents, several sources as a dict by name (see `token_windows`), or ids `[n, window]` int64.
        ratio: bytes of a 16-bit cache over those of compressed tokens, codes, references and their numbers included
            (10 if neither this nor `target_kl` is given).
        target_kl: instead, the largest KL to the full cache, nats a token, on text that is held out; the ratio that
            reaches it is searched.
        tokenizer: of the model; None loads it from where the model came from.
        workspace: a folder of its own for what was read so far (2 bytes a number of K and V); a run that was broken
            off goes on from it, and it is kept. None takes a temporary one.
        measured_windows: windows held out for the report; 0 measures nothing; None takes one for each source, but 4 at
            least, or a fifth of given ids, and 9 at most.
        select_layers: how many filter layers to choose, for caches with `selection="filter_layers"` (see
            `select_filter_layers`); None chooses none.
        progress: told of stages and steps.
        **settings: fields of `CalibrationSettings`.

    Returns:
        a compressor whose `config` notes the settings, the goal, the names of several sources, versions, seconds and
        what was measured, and whose `report` holds the figures of every layer.

    Raises:
        InvalidOptionError: an argument is out of range, or there is too little text.
        CompressorError: the model gives numbers that are not finite.
        UnsupportedModelError: the model's attention cannot be served.
    """
    model = unwrap(model)
    settings = CalibrationSettings.from_options(settings)
    ratio = check_goal(ratio, target_kl)
    if measured_windows is not None:
        check_integer("measured_windows", measured_windows, low=0)
    if select_layers is not None:
        check_number(model, select_layers)
    check_differentiable(model)
    if isinstance(texts, torch.Tensor):
        settings = replace(settings, window=check_ids(model, texts).shape[1])
    check_positions(model, settings)
    with torch.inference_mode(False):
        windows, held_out = calibration_windows(model, texts, tokenizer, settings, measured_windows)
    if target_kl is not None and not len(held_out):
        raise nothing_held_out(len(windows), measured_windows)
    clock = Clock()
    place = nullcontext(workspace) if workspace else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with place as folder, evaluating(model):
        run = Run(model, settings, windows, Workspace(folder, workspace_key(model, settings, windows)), clock, progress)
        if target_kl is None:
            compressor = run.compressor(ratio)
            if len(held_out):
                compressor = run.measured(compressor, held_out)
        else:
            compressor = _search(run, held_out, target_kl)
        if select_layers is not None:
            looked_at = windows[:LOOKED_AT]
            advance = progress("choosing filter layers", len(looked_at))
            with clock("filter layers"):
                chosen = select_filter_layers(model, looked_at, select_layers, advance=advance)
            compressor.config["filter_layers"] = chosen
            compressor.config["calibration"]["seconds"] = clock.seconds
    calibration = compressor.config["calibration"]
    calibration["goal"] = {"ratio": ratio} if target_kl is None else {"target_kl": target_kl}
    if isinstance(texts, Mapping):
        calibration["text"] = sources_of(texts)
    return compressor


def _search(run: Run, held_out: torch.Tensor, target_kl: float) -> KVCompressor:
    """The smallest compressor tried that is within `target_kl`; KL is close to a power of the bytes."""
    tried: dict[float, tuple[float, KVCompressor]] = {}
    ratio = 10.0
    while True:
        compressor = run.measured(run.compressor(ratio), held_out)
        tried[ratio] = compressor.report.fidelity.mean("kl"), compressor
        within = [r for r, (kl, _) in tried.items() if kl <= target_kl]
        ratio = _next_ratio({r: kl for r, (kl, _) in tried.items()}, target_kl)
        if len(tried) < TRIES and all(abs(ratio / known - 1) >= 0.01 for known in tried):
            continue
        if within:
            return tried[max(within)][1]
        lowest = min(tried)
        if lowest <= LEAST_RATIO:
            raise InvalidOptionError(
                f"`target_kl` must be reachable, got {target_kl}: the KL at ratio {lowest} is {tried[lowest][0]:.2g}."
            )
        # steps that small models take at once mislead the search
        ratio = max(lowest / 1.3, LEAST_RATIO)


def _next_ratio(tried: dict[float, float], target_kl: float) -> float:
    """Where `target_kl` is expected by KL at the ratios tried."""
    points = sorted((math.log(r), math.log(max(kl, 1e-9))) for r, kl in tried.items())
    slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0]) if len(points) > 1 else 2.0
    nearest = min(points, key=lambda point: abs(point[1] - math.log(target_kl)))
    # aims a little lower, so that the try counts
    wanted = nearest[0] + (math.log(0.97 * target_kl) - nearest[1]) / max(slope, 0.5)
    return min(max(math.exp(min(wanted, 5.0)), LEAST_RATIO), 60.0)


def check_goal(ratio: float | None, target_kl: float | None) -> float:
    """Raises unless at most one is given and it is in its range; gives the ratio to begin with."""
    for name, value in (("ratio", ratio), ("target_kl", target_kl)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
        ):
            raise InvalidOptionError(f"`{name}` must be a finite number above 0, got {value!r}.")
    if ratio is not None and target_kl is not None:
        raise InvalidOptionError(f"`target_kl` must be left out with `ratio`, got {target_kl} and {ratio}: give one.")
    if ratio is not None and not LEAST_RATIO <= ratio <= MOST_RATIO:
        raise InvalidOptionError(f"`ratio` must be from {LEAST_RATIO} to {MOST_RATIO}, got {ratio}.")
    return 10.0 if ratio is None else float(ratio)
