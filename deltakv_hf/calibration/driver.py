"""`calibrate`: from a model and texts to a `KVCompressor`."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..attach import unwrap
from ..compressor.base_model import describe_model
from ..compressor.kv_compressor import KIND, KVCompressor
from ..compressor.transform_tensors import transform_tensors
from ..config import check_integer
from ..errors import CacheStateError, InvalidOptionError
from ..hf_compat import host_version
from ..saving.fingerprint import describe_weights
from ..support import check_length, longrope_switch
from .capture import Observer, evaluating
from .layer_fit import LayerFit
from .plan import LayerPlan, plan_layers, plan_references
from .report import Report, measure
from .settings import CalibrationSettings
from .statistics import Statistics, collect
from .texts import MOST_HELD_OUT, token_windows
from .workspace import Workspace

# told that a stage of so many steps begins; gives what is called after each step
Progress = Callable[[str, int], Callable[[], None]]
# ratios tried for a KL, unless all are too large
TRIES = 4
# settings that do not change what is read
AFTER_READING = ("num_tokens", "reference_stride", "keep_statistics")
LEAST_RATIO, MOST_RATIO = 1.5, 200
# of so many windows of given ids, one is held out
FEWEST_IDS = 5


def calibrate(
    model: PreTrainedModel,
    texts,
    *,
    ratio: float | None = None,
    target_kl: float | None = None,
    tokenizer=None,
    workspace: str | os.PathLike | None = None,
    measured_windows: int | None = None,
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
    if any(part.is_inference() for part in (*model.parameters(), *model.buffers())):
        raise InvalidOptionError(
            "`model` must be differentiable, got one that was loaded under `torch.inference_mode()`, which rules that "
            "out for ever. Load it outside; calibration itself may be called inside."
        )
    if isinstance(texts, torch.Tensor):
        settings = replace(settings, window=_check_ids(model, texts).shape[1])
    _check_positions(model, settings)
    with torch.inference_mode(False):
        windows, held_out = _windows(model, texts, tokenizer, settings, measured_windows)
    if target_kl is not None and not len(held_out):
        raise _nothing_held_out(len(windows), measured_windows)
    clock = _Clock()
    place = nullcontext(workspace) if workspace else tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with place as folder, evaluating(model):
        run = _Run(model, settings, windows, Workspace(folder, _key(model, settings, windows)), clock, progress)
        if target_kl is None:
            compressor = run.compressor(ratio)
            if len(held_out):
                compressor = run.measured(compressor, held_out)
        else:
            compressor = _search(run, held_out, target_kl)
    calibration = compressor.config["calibration"]
    calibration["goal"] = {"ratio": ratio} if target_kl is None else {"target_kl": target_kl}
    if isinstance(texts, Mapping):
        calibration["text"] = [{"source": str(name), "license": "not stated"} for name in texts]
    return compressor


def _search(run: _Run, held_out: torch.Tensor, target_kl: float) -> KVCompressor:
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


class _Run:
    """One calibration: what was read is used for every ratio."""

    def __init__(
        self, model, settings: CalibrationSettings, windows: torch.Tensor, workspace: Workspace, clock, progress
    ):
        self.model, self.settings, self.windows = model, settings, windows
        self.clock, self.progress = clock, progress
        self.device = model.device
        self.statistics = self._collect(workspace)
        self.layers = self._fit_layers()

    def _collect(self, workspace: Workspace) -> Statistics:
        observer, settings = Observer(self.model), self.settings
        with self.clock("reading"):
            return collect(
                observer,
                self.windows,
                workspace,
                predicted=settings.predicted,
                sensitivity_windows=min(settings.sensitivity_windows, len(self.windows)),
                draws=settings.draws,
                num_sinks=settings.num_sink_tokens,
                num_splits=settings.num_splits,
                seed=settings.seed,
                advance=self.progress("reading text", len(self.windows)),
            )

    def _fit_layers(self) -> dict[int, LayerFit]:
        layers, statistics = {}, self.statistics
        advance = self.progress("finding components", len(statistics.widths))
        with self.clock("components"):
            for layer_idx, widths in statistics.widths.items():
                layers[layer_idx] = LayerFit(
                    _Tokens(statistics, layer_idx, self.device),
                    statistics.sensitivity[layer_idx],
                    widths,
                    self.settings.reference_stride,
                    self.settings.seed,
                )
                advance()
        return layers

    def compressor(self, ratio: float) -> KVCompressor:
        """Fits codebooks for one ratio."""
        layers, fits = self.layers, list(self.layers.values())
        dense = sum(2 * sum(widths) for widths in self.statistics.widths.values())
        budget = dense / ratio
        references = None
        if self.settings.reference_stride > 1:
            references = plan_references(fits, budget)
            advance = self.progress("coding references", len(fits))
            with self.clock("references"):
                for layer, cuts in zip(fits, references, strict=True):
                    layer.code_references(cuts)
                    advance()
        with self.clock("allocation"):
            plans = plan_layers(fits, references, budget)
        advance = self.progress("fitting codebooks", len(fits))
        tensors, records = {}, {}
        with self.clock("codebooks"):
            for (layer_idx, layer), plan in zip(layers.items(), plans, strict=True):
                new, records[layer_idx] = self._layer(layer_idx, layer, plan)
                tensors |= new
                advance()
        config = {
            "kind": KIND,
            "model": describe_model(self.model),
            "share": sum(plan.num_bytes for plan in plans) / dense,
            "layers": [records.get(i) for i in range(max(records) + 1)],
            "calibration": {
                "settings": asdict(self.settings),
                "windows": list(self.windows.shape),
                "seconds": self.clock.seconds,
                "versions": {"torch": torch.__version__, "transformers": host_version()},
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
        }
        compressor = KVCompressor(config, tensors)
        # an error of every stored token of a window's context, each read by every prediction
        tokens = self.windows.shape[1] - self.settings.predicted
        compressor.report = Report.of(list(layers), fits, plans, dense, tokens)
        return compressor

    def _layer(self, layer_idx: int, layer: LayerFit, plan: LayerPlan) -> tuple[dict, dict]:
        if plan.uses_references:
            books = {"reference": layer.reference_book, "residual": layer.fit_residual(plan.cuts)}
        else:
            books = {"reference": layer.fit_own(plan.cuts), "residual": layer.no_codebook()}
        tensors, starts = transform_tensors(layer_idx, *layer.stored_basis(), layer.prediction, books)
        if self.settings.keep_statistics:
            tensors |= layer.second_moments(f"layers.{layer_idx}")
        stride = layer.stride if plan.uses_references else 1
        return tensors, {"widths": list(self.statistics.widths[layer_idx]), "reference_stride": stride, **starts}

    def measured(self, compressor: KVCompressor, held_out: torch.Tensor) -> KVCompressor:
        """The compressor with what it does to predictions on held-out text."""
        with self.clock("measuring"):
            fidelity = measure(self.model, compressor, held_out, self.settings.predicted, self.progress)
        compressor.report = replace(compressor.report, fidelity=fidelity)
        compressor.config["measured"] = [compressor.report.measured_row()]
        compressor.config["calibration"]["seconds"] = self.clock.seconds
        return compressor


@dataclass(frozen=True)
class _Tokens:
    """Reads a layer's tokens, window by window."""

    statistics: Statistics
    layer_idx: int
    device: torch.device

    @property
    def num_windows(self) -> int:
        return self.statistics.num_windows

    def __call__(self):
        for number in range(self.num_windows):
            yield self.statistics.workspace.read_window(number, self.layer_idx, self.device)


@dataclass
class _Clock:
    """Seconds by stage."""

    stages: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        return {name: round(value, 1) for name, value in self.stages.items()}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - began


def _key(model, settings: CalibrationSettings, windows: torch.Tensor) -> dict:
    """What decides what is read: a fine-tune of the same name and shape is another model."""
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name not in AFTER_READING},
        "model": describe_model(model),
        "weights": describe_weights(model),
        "ids": windows.flatten().tolist(),
    }


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


def _windows(model, texts, tokenizer, settings: CalibrationSettings, measured_windows: int | None):
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
    settings.check_enough(len(windows) * (windows.shape[1] - settings.predicted - settings.num_sink_tokens))
    return windows, held_out


def _nothing_held_out(num_windows: int, measured_windows: int | None) -> InvalidOptionError:
    """Why there is no `target_kl` without held-out text."""
    if measured_windows == 0:
        return InvalidOptionError(
            "`measured_windows` must not be 0 with `target_kl`, which is searched on held-out text: leave it out."
        )
    return InvalidOptionError(
        f"`texts` must hold at least {FEWEST_IDS} windows of ids with `target_kl`, which is searched on a fifth of "
        f"them, got {num_windows}: give more, or set `measured_windows`."
    )


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


def _check_positions(model, settings: CalibrationSettings) -> None:
    """Raises for windows that the model has no positions for, or in which it changes its frequencies."""
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and settings.window > limit:
        raise InvalidOptionError(
            f"`window` must fit the {limit} positions of the model, got {settings.window}: take {limit} or less."
        )
    switch = longrope_switch(text)
    try:
        check_length(switch, 0, settings.stored)
        check_length(switch, settings.stored, settings.predicted)
    except CacheStateError as error:
        raise InvalidOptionError(
            f"`window` must stay below {switch} tokens (`original_max_position_embeddings`), where this longrope model "
            f"changes its frequencies, or go so far beyond that it is read beyond it at once, got {settings.window}: "
            f"take {switch - 1} or less."
        ) from error


def _check_ids(model, ids: torch.Tensor) -> torch.Tensor:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise InvalidOptionError(f"`texts` must be int64 ids [windows, tokens], got {ids.dtype} {tuple(ids.shape)}.")
    known = model.get_input_embeddings().weight.shape[0]
    if ids.numel() and not (0 <= ids.min() and ids.max() < known):
        raise InvalidOptionError(
            f"`texts` must be ids from 0 to {known - 1}, which the model knows, got {ids.min()} to {ids.max()}."
        )
    return ids
