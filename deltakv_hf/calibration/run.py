"""One calibration: the stages between text and tensors, timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch

from ..compressor.base_model import describe_model
from ..compressor.kv_compressor import KVCompressor
from ..compressor.transform_tensors import transform_tensors
from ..hf_compat import host_version
from ..saving.fingerprint import describe_weights
from .capture import Observer
from .layer_fit import LayerFit
from .plan import LayerPlan, plan_layers, plan_references
from .report import Report, measure
from .settings import CalibrationSettings
from .statistics import Statistics, collect
from .workspace import Workspace

# told that a stage of so many steps begins; gives what is called after each step
Progress = Callable[[str, int], Callable[[], None]]
# settings that do not change what is read
AFTER_READING = ("reference_stride", "keep_statistics")


class Run:
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
            "kind": "transform",
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
        compressor.report = Report.of(list(layers), fits, plans, dense, self.settings.stored)
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
class Clock:
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


def workspace_key(model, settings: CalibrationSettings, windows: torch.Tensor) -> dict:
    """What decides what is read: a fine-tune of the same name and shape is another model."""
    return {
        "settings": {name: value for name, value in asdict(settings).items() if name not in AFTER_READING},
        "model": describe_model(model),
        "weights": describe_weights(model),
        "ids": windows.flatten().tolist(),
    }
