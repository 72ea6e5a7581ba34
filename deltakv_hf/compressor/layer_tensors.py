"""Tensors of one layer of a compressor folder, taken by name and checked."""

from __future__ import annotations

import torch

from ..errors import CompressorError


class LayerTensors:
    """Takes tensors of one layer by name and checks what they must be."""

    def __init__(self, tensors: dict[str, torch.Tensor], name: str, source: str):
        self.tensors, self.name, self.source = tensors, name, source

    def wrong(self, rule: str, got: object) -> CompressorError:
        """The error of a layer that must have what `rule` says."""
        return CompressorError(
            f"`{self.name}` of {self.source} must have {rule}, got {got}. Its files were changed, or do not belong "
            "together: download it again or make it again."
        )

    def take(self, name: str, dtypes, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor of one of `dtypes` and of `shape`, None standing for any size."""
        tensor = self.tensors.get(f"{self.name}.{name}")
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        fits = tensor is not None and tensor.dtype in dtypes and tensor.ndim == len(shape)
        if not fits or any(want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
            found = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise self.wrong(f"`{name}` of {dtypes[0]} {shape}", found)
        return tensor
