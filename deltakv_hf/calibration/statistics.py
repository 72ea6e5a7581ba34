"""First passes of a calibration: the model reads the text; tokens and sensitivities are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import CompressorError
from .capture import Observer
from .workspace import Workspace


@dataclass(frozen=True)
class Statistics:
    """What the model was seen to do.

    Attributes:
        workspace: tokens of all windows.
        num_windows: how many.
        widths: numbers of a token in K and in V, by layer.
        sensitivity: by layer, `[splits, width / splits, width / splits]` float64, mean of squared gradients of a
            token: KL of a prediction that reads N tokens with errors of covariance S is N / 2 * trace(sensitivity S).
    """

    workspace: Workspace
    num_windows: int
    widths: dict[int, tuple[int, int]]
    sensitivity: dict[int, torch.Tensor]


def collect(
    observer: Observer,
    windows: torch.Tensor,
    workspace: Workspace,
    *,
    predicted: int,
    sensitivity_windows: int,
    draws: int,
    num_sinks: int,
    num_splits: Callable[[int], int],
    seed: int,
    advance: Callable[[], None],
) -> Statistics:
    """Reads `windows` `[n, tokens]` int64 and fills `workspace`; windows that it has already are not read again.

    Args:
        predicted: last tokens of a window, which are predicted rather than stored.
        sensitivity_windows: first windows whose predictions are differentiated.
        draws: answers drawn from each prediction.
        num_sinks: first tokens, which a cache leaves as they are.
        num_splits: function of the key-value heads of a layer.
        advance: called after each window.
    """
    # for all layers before the first window: says at once if they cannot be split so
    splits = {layer_idx: num_splits(heads) for layer_idx, heads in observer.heads.items()}
    device = observer.model.device
    sums, count, done = workspace.read_sensitivity(device)
    for number, ids in enumerate(windows):
        wants_gradients = done <= number < sensitivity_windows
        if not wants_gradients and workspace.has_window(number):
            advance()
            continue
        cache = observer.read(ids[None, :-predicted])
        tokens = {layer_idx: cache.tokens[layer_idx][0, num_sinks:] for layer_idx in observer.forms}
        _check_finite(tokens)
        if wants_gradients:
            generator = torch.Generator(device).manual_seed(seed * 100_003 + number)
            for gradients in observer.gradients(cache, ids[-predicted:], draws, generator):
                _check_finite(gradients)
                for layer_idx, gradient in gradients.items():
                    parts = split_columns(gradient[num_sinks:], observer.widths[layer_idx], splits[layer_idx])
                    # float32 as in the workspace: a run that was broken off ends with the same sums
                    square = parts.transpose(1, 2) @ parts
                    sums[layer_idx] = sums[layer_idx] + square if layer_idx in sums else square
                count += len(ids) - predicted - num_sinks
            workspace.write_sensitivity(sums, count, number + 1)
        workspace.write_window(number, tokens)
        advance()
    sensitivity = {layer_idx: total.double() / count for layer_idx, total in sums.items()}
    return Statistics(workspace, len(windows), observer.widths, sensitivity)


def split_columns(tokens: torch.Tensor, widths: tuple[int, int], splits: int) -> torch.Tensor:
    """`[n, width]` -> `[splits, n, width / splits]`: the same share of the heads of K and of V in each split."""
    parts = [part.unflatten(-1, (splits, -1)).transpose(0, 1) for part in tokens.split(list(widths), dim=-1)]
    return torch.cat(parts, dim=-1)


def _check_finite(tensors: dict[int, torch.Tensor]) -> None:
    for layer_idx, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CompressorError(
                f"`model` must give finite keys, values and gradients, got NaN or infinity in layer {layer_idx}. Load "
                "it in another dtype (bfloat16 or float32 for models trained so), and look at the text."
            )
