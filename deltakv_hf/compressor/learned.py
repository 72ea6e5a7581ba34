"""The learned compressor of the DeltaKV paper (arXiv 2602.08005, section 3.2): residuals in a trained latent space.

A token is `x = [K; V]`, all heads joined, keys un-rotated. Tokens on the lattice are references and are kept as they
are, in bfloat16. Any other token is `f_up(z) + r`, where `r` is the mean of its `top_k` nearest earlier references and
`z = f_down(x) - f_down(r)` is what is stored: in bfloat16, or quantised to 4 or 2 bits.

Where the paper's code differs: references are read back as they were kept rather than from a latent of their own, and
the sinks, which are raw anyway, are not references as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .. import dispatch
from ..references import Lattice
from .coder import Pieces, ResidualCoder
from .store import TokenStore


@dataclass(frozen=True)
class LearnedStore(TokenStore):
    """Coded tokens of one layer.

    Attributes:
        reference_tokens: `[batch, num_references, width]` bfloat16.
        latents: `[batch, num_residuals, latent_width]` bfloat16, or packed codes uint8.
        latent_levels: `[batch, num_residuals, groups, 2]` float16 scale and minimum; no groups in bfloat16.
        reference_idx: `[batch, num_residuals, top_k]` int16 holding unsigned 16-bit numbers of the row's references.
    """

    reference_tokens: torch.Tensor
    latents: torch.Tensor
    latent_levels: torch.Tensor
    reference_idx: torch.Tensor


@dataclass(frozen=True)
class Network:
    """One of the two networks of a layer.

    Attributes:
        kind: "linear", "mlp_gelu" or "mlp_swiglu".
        weights: by the names of `kernels/reference/feed_forward.py`, in any floating dtype.
    """

    kind: str
    weights: Mapping[str, torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_width]` -> `[..., out_width]` in the dtype of `x`."""
        return dispatch.feed_forward(x, self.weights, self.kind)

    @property
    def in_width(self) -> int:
        """Numbers that go in."""
        return self.weights[f"{dispatch.LINEAR_MAPS[self.kind][0]}weight"].shape[1]

    @property
    def out_width(self) -> int:
        """Numbers that come out."""
        return self.weights[f"{dispatch.LINEAR_MAPS[self.kind][-1]}weight"].shape[0]

    @property
    def hidden_width(self) -> int:
        """Numbers between the two linear maps; of a single one, those that come out."""
        weight = self.weights[f"{dispatch.LINEAR_MAPS[self.kind][-1]}weight"]
        return weight.shape[0] if self.kind == "linear" else weight.shape[1]

    def to(self, device: torch.device) -> Network:
        """The same on `device`."""
        return Network(self.kind, {name: weight.to(device) for name, weight in self.weights.items()})


@dataclass(frozen=True)
class Learned:
    """What training has found for one layer.

    Attributes:
        down, up: `f_down` from `width` to the latent space and `f_up` back.
        lattice: which tokens are references.
        top_k: references whose mean predicts a token.
        latent_nbits: 0 keeps latents in bfloat16; 2, 4 or 8 bits pack them.
        latent_group_size: numbers of a latent that share a scale and a minimum.
    """

    down: Network
    up: Network
    lattice: Lattice
    top_k: int
    latent_nbits: int
    latent_group_size: int

    def to(self, device: torch.device) -> Learned:
        """The same on `device`."""
        return replace(self, down=self.down.to(device), up=self.up.to(device))

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        return [*self.down.weights.values(), *self.up.weights.values()]

    def delta(self, tokens: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Latents of `tokens` that `predicted` stands for, `[..., width]` each -> `[..., latent_width]`."""
        return self.down(tokens) - self.down(predicted)


class LearnedCompressor(ResidualCoder):
    """Codes tokens of one layer with a `Learned` on the layer's device."""

    def __init__(self, learned: Learned):
        self.learned = learned
        self.width = learned.down.in_width
        self.lattice, self.top_k = learned.lattice, learned.top_k

    def tensors(self) -> list[torch.Tensor]:
        """What the compressor itself holds."""
        return self.learned.tensors()

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> LearnedStore:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""
        learned = self.learned
        num_references = self.lattice.count(num_tokens)
        num_residuals, width, groups = num_tokens - num_references, learned.down.out_width, 0
        if learned.latent_nbits:
            groups, width = width // learned.latent_group_size, width * learned.latent_nbits // 8
        dtype = torch.uint8 if learned.latent_nbits else torch.bfloat16

        def records(number: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(batch_size, number, *shape, dtype=dtype, device=device)

        return LearnedStore(
            reference_tokens=records(num_references, self.width, dtype=torch.bfloat16),
            latents=records(num_residuals, width, dtype=dtype),
            latent_levels=records(num_residuals, groups, 2, dtype=torch.float16),
            reference_idx=records(num_residuals, learned.top_k, dtype=torch.int16),
        )

    def code_references(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        """References are kept as they are."""
        return (tokens.bfloat16(),)

    def read_references(self, tokens: torch.Tensor) -> torch.Tensor:
        """What was kept."""
        return tokens.float()

    def code_residuals(
        self, tokens: torch.Tensor, places: torch.Tensor, references: torch.Tensor, idx: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and levels."""
        learned, tokens, predicted = self.learned, tokens.index_select(1, places), dispatch.predict(references, idx)
        # in double precision: rounded to single, the result does not depend on the order that a shape brings with it
        latents = learned.delta(precise(tokens), precise(predicted)).float()
        if learned.latent_nbits:
            return dispatch.quantize(latents, learned.latent_nbits, learned.latent_group_size)
        return latents.bfloat16(), latents.new_empty(*latents.shape[:-1], 0, 2, dtype=torch.float16)

    def references(self, store: LearnedStore) -> torch.Tensor:
        """All references, `[batch, num_references, width]` float32."""
        return self.read_references(store.reference_tokens)

    def decode(
        self, store: LearnedStore, references: torch.Tensor, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads compressed tokens `start .. stop - 1` of every row, in pieces; see `Coder.decode`."""
        learned = self.learned
        own = references[:, self.lattice.count(start) : self.lattice.count(stop)]
        free = None if scratch is None else scratch[0]

        def others(latents: torch.Tensor, levels: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
            if learned.latent_nbits:
                latents = dispatch.dequantize(latents, levels, learned.latent_nbits)
            return dispatch.predict(references, idx, free).add_(learned.up(latents.float()))

        return store.read_in_pieces(self.lattice, start, stop, own, others)


def precise(x: torch.Tensor) -> torch.Tensor:
    """`x` in double precision. MPS has none: there the same token may get another code in rare ties."""
    return x if x.device.type == "mps" else x.double()
