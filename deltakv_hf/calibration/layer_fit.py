"""One layer's way from tokens to codebooks, in the steps between which bytes are allotted over all layers."""

from __future__ import annotations

import torch

from .. import dispatch
from ..compressor.codebook import Codebook
from ..references import Lattice
from .allocation import Cut, LossTable, measure_losses
from .basis import Basis, fit_basis
from .statistics import split_columns
from .vectors import fit_vectors, to_grid

FIT_SAMPLES = 12_288
FIT_ITERATIONS = 9
# floats in one batch of groups that are fitted together
FIT_BATCH = 2**23


class LayerFit:
    """What is known of a layer; components of splits stand one split after the other.

    Args:
        tokens: function that gives `[n, width]` float32 of each of its `num_windows` windows.
        sensitivity: `[splits, size, size]` float64.
        widths: numbers of a token in K and in V.
        stride: of references; 1 leaves them out.
        seed: of every random choice.

    Attributes:
        bases: of each split.
        own_losses: of tokens coded by themselves, by split.
        residual_losses: of residuals, by split, once references are coded.
        reference_book: codebook of references.
        prediction: `[components]` float32.
    """

    def __init__(self, tokens, sensitivity: torch.Tensor, widths: tuple[int, int], stride: int, seed: int):
        self._tokens, self._widths, self._seed = tokens, widths, seed
        self.sensitivity, self.stride, self.num_splits = sensitivity, stride, len(sensitivity)
        windows = [split_columns(part, widths, self.num_splits) for part in tokens()]
        self.bases: list[Basis] = [
            fit_basis([window[split] for window in windows], sensitivity[split]) for split in range(self.num_splits)
        ]
        samples = [window[:, _places(window.shape[1], len(windows), window.device)] for window in windows]
        self.own_samples = self._analyse(torch.cat(samples, dim=1))
        self.own_losses = self._measure(self.own_samples)
        self.residual_losses: list[LossTable] = []
        self.reference_book: Codebook | None = None
        self.prediction = torch.zeros(sum(widths), device=sensitivity.device)
        self.residual_samples = self.own_samples[:0]

    def _analyse(self, window: torch.Tensor) -> torch.Tensor:
        """`[splits, n, size]` -> components `[n, width]`."""
        return torch.cat([basis.analyse(part) for basis, part in zip(self.bases, window, strict=True)], dim=-1)

    def _measure(self, samples: torch.Tensor) -> list[LossTable]:
        generator = torch.Generator().manual_seed(self._seed)
        return [measure_losses(part, generator) for part in samples.chunk(self.num_splits, dim=1)]

    def fit_own(self, cuts: list[Cut]) -> Codebook:
        """A codebook of tokens coded by themselves."""
        return self._fit(self.own_samples, cuts)

    def fit_residual(self, cuts: list[Cut]) -> Codebook:
        """A codebook of residuals."""
        return self._fit(self.residual_samples, cuts)

    def code_references(self, cuts: list[Cut]) -> None:
        """Fits the references' codebook, codes them, and measures what is left of the other tokens."""
        self.reference_book = book = self.fit_own(cuts)
        lattice, pairs = Lattice(self.stride), []
        for tokens in self._tokens():
            parts = split_columns(tokens, self._widths, self.num_splits)
            span = lattice.span(0, len(tokens), tokens.device)
            keep = _places(len(span.residual_offsets), self._tokens.num_windows, tokens.device)
            references = book.decode(book.encode(self._analyse(parts[:, span.reference_offsets])[None]))
            others = self._analyse(parts[:, span.residual_offsets[keep]])
            idx = dispatch.nearest_references(others[None], references, span.num_visible[None, keep], 1)
            pairs.append((others, dispatch.predict(references, idx)[0]))
        others, nearest = (torch.cat(part) for part in zip(*pairs, strict=True))
        along = (others * nearest).double().sum(0) / nearest.double().square().sum(0).clamp_min(1e-300)
        # as it will be stored
        self.prediction = along.clamp(0, 1).half().float()
        self.residual_samples = others - nearest * self.prediction
        self.residual_losses = self._measure(self.residual_samples)

    def no_codebook(self) -> Codebook:
        """That of a layer without residuals."""
        return Codebook([], [], [], sum(self._widths))

    def stored_basis(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and weights `[width]` in the order of tokens, and the vectors `[splits, size, size]`."""
        keys = self._widths[0] // self.num_splits

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            both = torch.stack(parts)
            return torch.cat([both[:, :keys].flatten(), both[:, keys:].flatten()])

        mean, weights = (joined([getattr(basis, name) for basis in self.bases]) for name in ("mean", "weights"))
        return mean, weights, torch.stack([basis.vectors for basis in self.bases])

    def second_moments(self, name: str) -> dict[str, torch.Tensor]:
        """Covariance of tokens and the sensitivity, `[splits, size, size]` float32, by name."""
        moments = {"covariance": [basis.covariance for basis in self.bases], "sensitivity": list(self.sensitivity)}
        return {f"{name}.statistics.{key}": torch.stack(parts).float().cpu() for key, parts in moments.items()}

    def _fit(self, samples: torch.Tensor, cuts: list[Cut]) -> Codebook:
        starts, tables, steps = [], [], []
        size_of_split = samples.shape[1] // self.num_splits
        generator = torch.Generator().manual_seed(self._seed)
        for split, cut in enumerate(cuts):
            for start, size, count in cut.runs():
                start += split * size_of_split
                groups = samples[:, start : start + size * count].unflatten(1, (count, size)).transpose(0, 1)
                batch = max(1, FIT_BATCH // (256 * groups.shape[1] // 8))
                fitted = [fit_vectors(part.contiguous(), FIT_ITERATIONS, generator) for part in groups.split(batch)]
                table, step = to_grid(torch.cat(fitted))
                starts.append(start)
                tables.append(table)
                steps.append(step)
        return Codebook(starts, tables, steps, samples.shape[1])


def _places(length: int, num_windows: int, device: torch.device) -> torch.Tensor:
    """Places of one window's samples, evenly spread over `length`: its part of `FIT_SAMPLES`, or all."""
    count = min(length, -(-FIT_SAMPLES // num_windows))
    return torch.arange(count, device=device) * length // max(count, 1)
