"""What a calibration found: bytes and losses of every layer, the curve of rate and distortion, what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from ..cache import DeltaKVCache
from ..compressor.kv_compressor import KVCompressor
from ..evaluation.fidelity import Fidelity, measure_fidelity
from .layer_fit import LayerFit
from .plan import LayerPlan, plan_layers

# shares of dense for the curve
CURVE = (0.03, 0.045, 0.066, 0.095, 0.125, 0.18, 0.25)


@dataclass(frozen=True)
class LayerFigures:
    """One layer.

    Attributes:
        layer_idx: its number.
        num_bytes: of an average compressed token, references shared out and their numbers included.
        components: that are stored at all.
        uses_references: whether residuals against references are stored.
        predicted_kl: what its errors are expected to cost, nats a token, to second order.
    """

    layer_idx: int
    num_bytes: float
    components: int
    uses_references: bool
    predicted_kl: float


@dataclass(frozen=True)
class Report:
    """Figures of a compressor.

    Attributes:
        layers: of each layer.
        dense_bytes: of a token in a 16-bit cache, layers together.
        curve: `(share of dense, predicted KL)` of tokens coded by themselves.
        fidelity: on held-out text, or None.
    """

    layers: list[LayerFigures]
    dense_bytes: int
    curve: list[tuple[float, float]]
    fidelity: Fidelity | None = None

    @classmethod
    def of(cls, numbers: list[int], fits: list[LayerFit], plans: list[LayerPlan], dense: int, tokens: int) -> Report:
        """Figures of a plan; `tokens` are read by a prediction."""
        figures = [
            LayerFigures(
                layer_idx,
                plan.num_bytes,
                sum(size for part in plan.cuts for _, size in part.groups),
                plan.uses_references,
                tokens / 2 * plan.loss,
            )
            for layer_idx, plan in zip(numbers, plans, strict=True)
        ]
        curve = []
        for share in CURVE:
            planned = plan_layers(fits, None, share * dense)
            curve.append((sum(plan.num_bytes for plan in planned) / dense, tokens / 2 * sum(p.loss for p in planned)))
        return cls(figures, dense, curve)

    @property
    def share(self) -> float:
        """Bytes of compressed tokens over dense ones."""
        return sum(layer.num_bytes for layer in self.layers) / self.dense_bytes

    def measured_row(self) -> dict:
        """What was measured, as the model card shows it."""
        return measured_row(self.fidelity, self.share)

    def as_dict(self) -> dict:
        """For JSON."""
        measured = None if self.fidelity is None else self.fidelity.summary()
        return {
            "compressed_share": self.share,
            "dense_bytes_per_token": self.dense_bytes,
            "measured": measured,
            "layers": [asdict(layer) for layer in self.layers],
            "rate_distortion": [{"share": share, "predicted_kl": kl} for share, kl in self.curve],
        }


def measured_row(figures: Fidelity, share: float) -> dict:
    """A row of the model card; `share` is that of compressed tokens in a 16-bit cache."""
    # by the tokens that were compressed, as it is in a 16-bit cache: in float32 they are half the share
    compressed = (1 - figures.mean("stored_share")) / (1 - figures.mean("compressed_share"))
    return {
        "held-out windows": len(figures.windows),
        "compressed tokens": f"{share:.1%}",
        "whole cache": f"{1 - compressed * (1 - share):.1%}",
        "kl": f"{figures.mean('kl'):.5f} ± {figures.standard_error('kl'):.5f}",
        "top1": f"{figures.mean('top1'):.4f}",
        "delta_nll": f"{figures.nll_change:+.2%}",
    }


def measure(model, compressor: KVCompressor, held_out: torch.Tensor, predicted: int, progress: Callable) -> Fidelity:
    """Fidelity on windows `[n, tokens]`, of which the last `predicted` are predicted."""
    advance = progress("measuring on held-out text", len(held_out))

    def with_progress(windows):
        for window in windows:
            yield window
            advance()

    caches = {"compressor": lambda: DeltaKVCache(model, compressor=compressor)}
    context = held_out.shape[1] - predicted
    return measure_fidelity(model, list(held_out), caches, context=context, progress=with_progress)["compressor"]
