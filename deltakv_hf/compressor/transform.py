"""The calibrated compressor: residuals in a basis fitted to the model, a byte for each group of components.

A token is `x = [K; V]`, all heads joined, keys un-rotated; `z = (x - mean) * weights @ inverse` are its components, in
the order of what an error in them costs the model's predictions, and `x = z @ basis / weights + mean`. Tokens on the
lattice are references: their components are coded by themselves. Any other token is
`z = prediction * z_reference + residual`, `z_reference` being its nearest reference as decoded. References and
residuals share one basis, so a reader adds components and projects up once.

A layer where references do not pay has stride 1: every token is coded by itself, and no residuals are stored.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from .. import dispatch
from ..references import Lattice
from .codebook import Codebook
from .coder import Pieces, ResidualCoder
from .store import TokenStore
from .vectors import TokenVectors, token_vectors


@dataclass(frozen=True)
class TransformStore(TokenStore):
    """Coded tokens of one layer.

    Attributes:
        reference_codes: `[batch, num_references, bytes]` uint8.
        residual_codes: `[batch, num_residuals, bytes]` uint8.
        reference_idx: `[batch, num_residuals, 1]` int16 holding unsigned 16-bit numbers of the row's references.
    """

    reference_codes: torch.Tensor
    residual_codes: torch.Tensor
    reference_idx: torch.Tensor


@dataclass(frozen=True)
class Transform:
    """What calibration has found for one layer. Components are the leading ones: no later one is coded.

    Attributes:
        reference_stride: one token in so many is a reference; 1 if all tokens are coded by themselves.
        mean, weights: `[width]` float32.
        inverse: `[width, components]` float16.
        basis: `[components, width]` float16.
        prediction: `[components]` float32, the share of a reference's component that predicts a token's.
        reference_codebook, residual_codebook: of components of references and of residuals.
    """

    reference_stride: int
    mean: torch.Tensor
    weights: torch.Tensor
    inverse: torch.Tensor
    basis: torch.Tensor
    prediction: torch.Tensor
    reference_codebook: Codebook
    residual_codebook: Codebook

    def to(self, device: torch.device) -> Transform:
        """The same on `device`."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)[1:]})

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        own = [self.mean, self.weights, self.inverse, self.basis, self.prediction]
        made = [self.__dict__.get(name) for name in ("reference_vectors", "residual_vectors")]
        made += [vectors for pair in self.__dict__.get("_leading", {}).values() for vectors in pair]
        own += [part for vectors in made if vectors is not None for part in vectors.tensors()]
        return own + self.reference_codebook.tensors() + self.residual_codebook.tensors()

    @cached_property
    def reference_vectors(self) -> TokenVectors:
        """Of references; made when first read by way of them, and held from then on."""
        return token_vectors(self.reference_codebook)

    @cached_property
    def residual_vectors(self) -> TokenVectors:
        """Of residuals and what predicts them."""
        return token_vectors(self.residual_codebook, self.reference_codebook, self.prediction)

    def leading_vectors(self, num_bytes: int) -> tuple[TokenVectors, TokenVectors | None]:
        """Of the components in a token's first bytes: of references, and of residuals (None if there are none)."""
        held = self.__dict__.setdefault("_leading", {})
        if num_bytes not in held:
            residual = self.residual_codebook
            book = residual if residual.tables else self.reference_codebook
            num_components = book.components_in(num_bytes)
            reference = self.reference_codebook.leading(num_components)
            both = (residual.leading(num_components), reference, self.prediction)
            held[num_bytes] = token_vectors(reference), token_vectors(*both) if residual.tables else None
        return held[num_bytes]

    def analyse(self, tokens: torch.Tensor) -> torch.Tensor:
        """Components of tokens: `[batch, n, width]` float32 -> `[batch, n, components]` float32."""
        return dispatch.analyse(tokens, self.mean, self.weights, self.inverse)

    def decoder(self) -> torch.Tensor:
        """What `project` multiplies by, `[components, width]` float32: made for each read, not held."""
        return self.basis / self.weights


def project(
    components: torch.Tensor, mean: torch.Tensor, decoder: torch.Tensor, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Inverse of `Transform.analyse`: `components @ decoder + mean`, into 1-D float32 `scratch` if given."""
    flat, shape = components.flatten(0, -2), (*components.shape[:-1], mean.shape[0])
    if scratch is None:
        return torch.addmm(mean, flat, decoder).view(shape)
    out = scratch[: flat.shape[0] * shape[-1]].view(-1, shape[-1])
    return torch.addmm(mean, flat, decoder, out=out).view(shape)


class TransformCompressor(ResidualCoder):
    """Codes tokens of one layer with a `Transform` on the layer's device."""

    def __init__(self, transform: Transform):
        self.transform = transform
        self.width = transform.mean.shape[0]
        self.lattice, self.top_k = Lattice(transform.reference_stride), 1
        if transform.mean.device.type == "cuda":
            # fewer do not keep all processors busy
            self.encode_tile = 16384

    @property
    def code_bytes(self) -> int:
        """Bytes of a token that is not a reference, the number of its reference left out."""
        transform = self.transform
        book = transform.reference_codebook if self.lattice.is_everywhere else transform.residual_codebook
        return book.num_bytes

    def tensors(self) -> list[torch.Tensor]:
        """What the compressor itself holds."""
        return self.transform.tensors()

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> TransformStore:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""
        num_references = self.lattice.count(num_tokens)
        num_residuals = num_tokens - num_references
        sizes = self.transform.reference_codebook.num_bytes, self.transform.residual_codebook.num_bytes
        return TransformStore(
            torch.empty(batch_size, num_references, sizes[0], dtype=torch.uint8, device=device),
            torch.empty(batch_size, num_residuals, sizes[1], dtype=torch.uint8, device=device),
            torch.empty(batch_size, num_residuals, 1, dtype=torch.int16, device=device),
        )

    def prepare(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        interleaved: bool = False,
    ) -> torch.Tensor:
        """Components."""
        transform = self.transform
        states = keys, values, angles, interleaved
        return dispatch.analyse_states(*states, transform.mean, transform.weights, transform.inverse)

    def code_references(self, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        """Codes."""
        return (self.transform.reference_codebook.encode(tokens),)

    def read_references(self, codes: torch.Tensor) -> torch.Tensor:
        """Components as decoded."""
        return self.transform.reference_codebook.decode(codes)

    def code_residuals(
        self, tokens: torch.Tensor, places: torch.Tensor, references: torch.Tensor, idx: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """Codes."""
        left = dispatch.residuals(tokens, places, references, idx, self.transform.prediction)
        return (self.transform.residual_codebook.encode(left),)

    def references(self, store: TransformStore) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What all pieces of a read share.

        Returns:
            components of all references times `prediction`, `[batch, num_references, components]`, None at stride 1;
            and the decoder.
        """
        decoder = self.transform.decoder()
        if self.lattice.is_everywhere:
            return None, decoder
        references = self.read_references(store.reference_codes)
        return references.mul_(self.transform.prediction), decoder

    def components(
        self,
        store: TransformStore,
        references: tuple[torch.Tensor | None, torch.Tensor],
        start: int,
        stop: int,
        scratch: torch.Tensor | None = None,
    ) -> Pieces:
        """Reads components of compressed tokens `start .. stop - 1` of every row, in pieces.

        Args:
            references: what `self.references(store)` gave.
            scratch: `[2, at least the numbers of the tokens]` float32 to work in; the second holds a piece until the
                next, the first is free again.

        Returns:
            what `TokenStore.read_in_pieces` yields, of components instead of numbers, float32.
        """
        transform, predicted = self.transform, references[0]
        free, work = (None, None) if scratch is None else scratch
        codes = store.reference_codes[:, self.lattice.count(start) : self.lattice.count(stop)]
        own = transform.reference_codebook.decode(codes, work)

        def others(residual_codes: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
            components = transform.residual_codebook.decode(residual_codes, work)
            return components.add_(dispatch.predict(predicted, idx, free))

        return store.read_in_pieces(self.lattice, start, stop, own, others)

    def decode(
        self,
        store: TransformStore,
        references: tuple[torch.Tensor | None, torch.Tensor],
        start: int,
        stop: int,
        scratch: torch.Tensor | None = None,
    ) -> Pieces:
        """Reads compressed tokens `start .. stop - 1` of every row, in pieces; see `Coder.decode`."""
        out = None if scratch is None else scratch[0]
        for components, pick in self.components(store, references, start, stop, scratch):
            yield project(components, self.transform.mean, references[1], out), pick
