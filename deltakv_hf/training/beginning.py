"""Where a learned compressor begins: at the principal components of residuals, plain or in a calibrated metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import dispatch
from ..calibration.capture import Observer, evaluating
from ..compressor.base_model import describe_model
from ..compressor.kv_compressor import KVCompressor
from ..compressor.transform_tensors import spread
from ..config import check_integer
from ..errors import InvalidOptionError
from ..references import Lattice
from .modules import mean_of

# slopes of the gates that make a SwiGLU linear, and where the sum of gates must be 1 beside the data
SLOPES = torch.linspace(-5.0, 5.0, 12, dtype=torch.float64)
AROUND_ONE = torch.linspace(0.5, 1.5, 65, dtype=torch.float64)
RIDGE = 1e-3


@dataclass(frozen=True)
class Form:
    """What a learned compressor is like (arXiv 2602.08005, section 3.2).

    Args:
        latent_width: numbers of a latent.
        down: "linear" or "mlp_swiglu"; what comes back up is linear.
        hidden_width: numbers inside of a SwiGLU (None: three times as many as a token has, the paper's).
        reference_stride: every so many compressed tokens one is a reference.
        top_k: references whose mean predicts a token.
        latent_nbits: 0 stores latents in bfloat16; 2, 4 or 8 pack them, 32 to a scale and a minimum.
    """

    latent_width: int
    down: str = "mlp_swiglu"
    hidden_width: int | None = None
    reference_stride: int = 10
    top_k: int = 4
    latent_nbits: int = 0

    def __post_init__(self) -> None:
        check_integer("latent_width", self.latent_width, low=1)
        check_integer("reference_stride", self.reference_stride, low=2)
        check_integer("top_k", self.top_k, low=1, high=16)
        if self.down not in ("linear", "mlp_swiglu"):
            raise InvalidOptionError(f"`down` must be linear or mlp_swiglu, got {self.down!r}.")
        if self.hidden_width is not None:
            check_integer("hidden_width", self.hidden_width, low=len(SLOPES) * self.latent_width)

    def hidden(self, width: int) -> int:
        """How wide a layer's SwiGLU is inside.

        Args:
            width: numbers of a token of the layer, K and V.

        Returns:
            `hidden_width`, or by default three times `width`, but enough for the latent.
        """
        least = len(SLOPES) * self.latent_width
        return max(3 * width, least) if self.hidden_width is None else self.hidden_width

    def record(self, widths: list[int]) -> dict:
        """Describes a layer of this form.

        Args:
            widths: numbers of a token in K and in V.

        Returns:
            The layer's entry in `config.json`.
        """
        whole = self.latent_width % 32 == 0
        return {
            "widths": widths,
            "reference_stride": self.reference_stride,
            "reference_growth": 0.0,
            "top_k": self.top_k,
            "latent_nbits": self.latent_nbits,
            "latent_group_size": 32 if whole else self.latent_width,
        }


def begin_learned(
    model, windows: torch.Tensor, calibrated: KVCompressor | None, form: Form, num_sink_tokens: int = 4
) -> KVCompressor:
    """A learned compressor that computes the principal components of residuals of `windows`.

    Args:
        model: that `calibrated` was made for.
        windows: ids `[n, tokens]` int64.
        calibrated: whose components say what an error in a token costs; None: errors of all numbers cost the same.

    Raises:
        InvalidOptionError: `calibrated` is of another kind, or a layer's tokens are narrower than the latent.
    """
    if calibrated is not None and calibrated.config["kind"] != "transform":
        raise InvalidOptionError(
            f"`compressor` must be a calibrated one for a learned one to begin at, got the kind "
            f"{calibrated.config['kind']!r}: leave `latent_width` out to train it as it is."
        )
    tensors, records = {}, {}
    generator = torch.Generator().manual_seed(0)
    with evaluating(model):
        observer = Observer(model)
        sums = {layer_idx: _Sums(sum(widths)) for layer_idx, widths in observer.widths.items()}
        for ids in windows:
            for layer_idx, tokens in observer.read(ids[None]).tokens.items():
                sums[layer_idx].add(tokens[:, num_sink_tokens:], form)
    for layer_idx, widths in observer.widths.items():
        if sum(widths) < form.latent_width:
            raise InvalidOptionError(
                f"`latent_width` must be at most the {sum(widths)} numbers of a token of layer {layer_idx}, got "
                f"{form.latent_width}."
            )
        networks = sums[layer_idx].networks(form, *_metric(calibrated, layer_idx, sum(widths)), generator)
        tensors |= {f"layers.{layer_idx}.{name}": weight.float() for name, weight in networks.items()}
        records[layer_idx] = form.record(list(widths))
    known = {"model": describe_model(model)} if calibrated is None else calibrated.config
    config = {name: known[name] for name in ("model", "calibration", "license") if name in known}
    return KVCompressor(
        {"kind": "learned", "layers": [records.get(i) for i in range(max(records) + 1)], **config},
        tensors,
        "a new compressor",
    )


def _metric(calibrated: KVCompressor | None, layer_idx: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of a layer, float64 `[width, width]`: of tokens to numbers in which all errors cost the same, and back."""
    if calibrated is None:
        return torch.eye(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    tensors, record = calibrated.tensors, calibrated.config["layers"][layer_idx]
    basis = spread(tensors[f"layers.{layer_idx}.basis"].double(), record["widths"][0])
    back = basis / tensors[f"layers.{layer_idx}.weights"].double()
    return torch.linalg.inv(back), back


class _Sums:
    """Second moments of a layer's tokens and residuals."""

    def __init__(self, width: int):
        self.count, self.tokens = 0, torch.zeros(width, dtype=torch.float64)
        self.squares, self.residuals = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self.samples: list[torch.Tensor] = []

    def add(self, tokens: torch.Tensor, form: Form) -> None:
        """Counts tokens `[1, n, width]` behind the sinks."""
        span = Lattice(form.reference_stride).span(0, tokens.shape[1], tokens.device)
        kept, others = (tokens.index_select(1, offsets) for offsets in (span.reference_offsets, span.residual_offsets))
        kept = kept.bfloat16().float()
        idx = dispatch.nearest_references(others, kept, span.num_visible.expand(1, -1), form.top_k)
        residuals, wide = (others - mean_of(kept, idx))[0].double(), tokens[0].double()
        self.count += len(wide)
        self.tokens += wide.sum(0).cpu()
        self.squares += (wide.T @ wide).cpu()
        self.residuals += (residuals.T @ residuals).cpu()
        self.samples.append(wide[:: max(1, len(wide) // 256)].cpu())

    def networks(
        self, form: Form, there: torch.Tensor, back: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Weights `down.*` and `up.*`."""
        energies, axes = torch.linalg.eigh(there.T @ self.residuals @ there / self.count)
        axes = axes[:, -form.latent_width :].flip(1)
        # latents of about 1
        scale = energies[-form.latent_width :].flip(0).clamp_min(1e-30).sqrt()
        down, up = (there @ axes) / scale, (axes.T @ back).T * scale
        if form.down == "linear":
            return {"down.weight": down.T, "up.weight": up}
        return {**self._swiglu(down, form, generator), "up.weight": up}

    def _swiglu(self, down: torch.Tensor, form: Form, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A SwiGLU without biases that computes `x @ down`, as nearly as can be.

        In a direction `m` in which all tokens are about 1, gates of several slopes add up to 1, whatever the rest of a
        token is; each multiplies what the linear map says.
        """
        mean = self.tokens / self.count
        squares = self.squares / self.count
        ridge = RIDGE * squares.diagonal().clamp_min(1e-12)
        direction = torch.linalg.solve(squares + torch.diag(ridge), mean)
        at = torch.cat([torch.cat(self.samples) @ direction, AROUND_ONE])
        gates = torch.nn.functional.silu(at[:, None] * SLOPES)
        steady = 1e-5 * len(at) * torch.eye(len(SLOPES), dtype=torch.float64)
        shares = torch.linalg.solve(gates.T @ gates + steady, gates.T @ torch.ones(len(at), dtype=torch.float64))
        width, used = len(mean), len(SLOPES) * form.latent_width
        hidden = form.hidden(width)
        # what is not used begins with random gates that count for nothing
        gate, linear = (torch.randn(hidden, width, generator=generator, dtype=torch.float64) for _ in range(2))
        deviation = (squares.diagonal() - mean.square()).clamp_min(1e-12).sqrt() * width**0.5
        gate, linear = gate / deviation, linear / deviation
        centred = down.T - (down.T @ mean)[:, None] * direction
        gate[:used] = (SLOPES[:, None] * direction).repeat(form.latent_width, 1)
        linear[:used] = centred.repeat_interleave(len(SLOPES), dim=0)
        out = torch.zeros(form.latent_width, hidden, dtype=torch.float64)
        out[:, :used] = torch.block_diag(*[shares[None]] * form.latent_width)
        return {"down.w12.weight": torch.cat([gate, linear]), "down.w3.weight": out}
