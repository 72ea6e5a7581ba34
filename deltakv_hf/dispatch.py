"""The only place that imports kernels: one function per op, backend chosen here."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from .errors import InvalidOptionError
from .kernels import reference
from .kernels.reference import (
    LINEAR_MAPS,
    Attended,
    attend,
    dequantize,
    feed_forward,
    grid_limit,
    predict,
    quantize,
    reconstruct,
    vector_dequantize,
    weigh,
)

__all__ = [
    "LINEAR_MAPS",
    "Attended",
    "attend",
    "dequantize",
    "feed_forward",
    "grid_limit",
    "nearest_references",
    "predict",
    "quantize",
    "reconstruct",
    "score",
    "vector_dequantize",
    "vector_quantize",
    "weigh",
]

BACKENDS = ("reference", "triton")


def nearest_references(
    tokens: torch.Tensor,
    references: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/nearest_references.py`; every backend gives the same references."""
    return _op("nearest_references", backend, tokens.device)(tokens, references, num_visible, top_k)


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/vector_quantize.py`; every backend gives the same bytes."""
    return _op("vector_quantize", backend, x.device)(x, starts, tables, steps)


def score(
    query: torch.Tensor,
    components: torch.Tensor,
    key_mean: torch.Tensor,
    key_map: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/score.py`; backends differ in the order of sums."""
    return _op("score", backend, query.device)(query, components, key_mean, key_map, angles, scratch)


def _op(name: str, backend: str | None, device: torch.device):
    """The function of an op; None takes the reference, until a kernel has been measured on a GPU.

    Raises:
        InvalidOptionError: there is no such backend, or it cannot run here.
    """
    if backend not in (None, *BACKENDS):
        raise InvalidOptionError(f"`backend` must be {' or '.join(BACKENDS)}, got {backend!r}.")
    if backend != "triton":
        return getattr(reference, name)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidOptionError(
            f"`backend` must run on the device of the tensors, got 'triton' and {device.type}: move them to an NVIDIA "
            "GPU, or leave `backend` out."
        )
    try:
        return getattr(import_module(f".kernels.triton_ops.{name}", __package__), name)
    except ImportError as error:
        raise InvalidOptionError(
            f"`backend` must be installed, got 'triton': {error}. Install triton 3.4 or newer, or leave `backend` out."
        ) from error
