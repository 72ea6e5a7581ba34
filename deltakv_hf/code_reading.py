"""Reads tokens of a calibrated compressor straight from their codes: attends to all or some, scores their beginnings.

A layer may hold two kinds of tokens, references and residuals, which stand in stores of their own and are read one
after the other. A layer without residuals has references only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import dispatch
from .compressor import TransformCompressor
from .compressor.vectors import TokenVectors
from .layout import Layout
from .maps import make_maps
from .rope import RopeForm, RopeTables
from .state import LayerState


@dataclass(frozen=True)
class Kind:
    """Tokens of one kind.

    Attributes:
        is_reference: whether they are references.
        codes: `[batch, n, bytes]` uint8.
        coded: how their bytes stand for components.
        references: what is added to these.
        offsets: `[n]` int64, which compressed tokens they are; None: all, in order.
        lengths: `[batch]` int32, how many of the n each row has; None: all.
        slot_map: `[batch, n]` int32, where in `codes` they stand; None: in order.
    """

    is_reference: bool
    codes: torch.Tensor
    coded: TokenVectors
    references: dispatch.References | None
    offsets: torch.Tensor | None
    lengths: torch.Tensor | None = None
    slot_map: torch.Tensor | None = None

    @property
    def room(self) -> int:
        """How many tokens of a row there is room for."""
        return (self.codes if self.slot_map is None else self.slot_map).shape[1]


@dataclass(frozen=True)
class CodeReader:
    """The compressed tokens of one layer.

    Attributes:
        state, layout, form, tables, num_sink_tokens, device: as of `StateReader`.
        compressor: what coded them.
        scale: of scores.
        backend: of the ops; None: what is fastest.
    """

    state: LayerState
    layout: Layout
    compressor: TransformCompressor
    form: RopeForm | None
    tables: RopeTables | None
    num_sink_tokens: int
    device: torch.device
    scale: float
    backend: str | None

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        raw: dispatch.Attended,
        slots: torch.Tensor | None = None,
    ) -> dispatch.Attended:
        """What `[batch, heads, queries, head_dim]` see, output in the dtype of the query.

        Args:
            mask: of all compressed tokens, as `mask_of_slots` makes it, or None.
            raw: what they see in tokens that are not compressed.
            slots: `[batch, n]` int32, the compressed tokens to read, each once; None: all.
        """
        transform, seen = self.compressor.transform, raw
        residual = None if self.compressor.lattice.is_everywhere else transform.residual_vectors
        kinds = list(self._kinds(transform.reference_vectors, residual))
        for kind in kinds:
            dtype = query.dtype if kind is kinds[-1] else torch.float32
            seen = self._attend_kind(kind, query, mask, seen, slots, dtype)
        return seen

    def score(self, query: torch.Tensor, mask: torch.Tensor | None, num_bytes: int) -> torch.Tensor:
        """Scores `[batch, heads, queries, compressed]` float32 by the first bytes of each token."""
        kinds = list(self._kinds(*self.compressor.transform.leading_vectors(num_bytes)))
        found = [self._score_kind(kind, query) for kind in kinds]
        scores = found[0]
        if kinds[0].offsets is not None:
            scores = scores.new_empty(*query.shape[:3], self.layout.compressed)
            for kind, part in zip(kinds, found, strict=True):
                scores[..., kind.offsets] = part
        return scores if mask is None else scores.add_(mask)

    def _kinds(self, reference: TokenVectors, residual: TokenVectors | None) -> Iterator[Kind]:
        """References, read by `reference`, and residuals, if there are any, read by `residual`."""
        store, lattice, count = self.state.store, self.compressor.lattice, self.layout.compressed
        num_references = lattice.count(count)
        reference_codes = store.reference_codes[:, :num_references]
        if lattice.is_everywhere:
            yield Kind(True, reference_codes, reference, None, None)
            return
        reference_offsets, residual_offsets = self._offsets()
        yield Kind(True, reference_codes, reference, None, reference_offsets)
        if count > num_references:
            # the store of a batch that has lost its longest row is wider
            codes, idx = (part[:, : count - num_references] for part in (store.residual_codes, store.reference_idx))
            references = dispatch.References(reference_codes, idx[..., 0], *residual.added)
            yield Kind(False, codes, residual, references, residual_offsets)

    def _offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which compressed tokens are references, and which are not."""
        span = self.compressor.lattice.span(0, self.layout.compressed, self.device)
        return span.reference_offsets, span.residual_offsets

    def _attend_kind(self, kind: Kind, query, mask, before, slots, dtype) -> dispatch.Attended:
        if slots is None:
            tokens, numbers, lengths = kind.offsets, None, kind.lengths
        else:
            tokens, numbers, lengths = self._listed(kind, slots)
        return dispatch.reconstruct_and_attend(
            *(query, kind.codes, kind.coded.vectors, *self._maps(kind.coded, *query.shape[1::2]), kind.references),
            *(self._rotation(tokens), _picked(mask, tokens), numbers, kind.slot_map, lengths),
            *(before, self.scale, dtype, self.backend),
        )

    def _score_kind(self, kind: Kind, query: torch.Tensor) -> torch.Tensor:
        key_map, _ = self._maps(kind.coded, *query.shape[1::2])
        return dispatch.score_leading(
            *(query, kind.codes, kind.coded.vectors, key_map, kind.references, self._rotation(kind.offsets)),
            slot_map=kind.slot_map,
            lengths=kind.lengths,
            scale=self.scale,
            backend=self.backend,
        )

    def _maps(self, coded: TokenVectors, heads: int, head_dim: int) -> tuple[dispatch.KeyMap, dispatch.ValueMap]:
        """Of `coded`; where kernels read, they are made once and held."""
        pairs = 0 if self.form is None else self.tables.cos.shape[-1]
        rotation, held = (self.form, pairs), coded.maps
        if rotation in held:
            return held[rotation]
        made = make_maps(self.compressor.transform, coded, heads, head_dim, *rotation)
        if self.backend is None:
            held[rotation] = made
        return made

    def _listed(self, kind: Kind, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Those of `slots` that are of a kind first: which tokens they are, their numbers, and how many they are."""
        if kind.offsets is None:
            return slots, slots, None
        return self._sorted_out(kind, slots)

    def _sorted_out(self, kind: Kind, slots: torch.Tensor, are_tokens: torch.Tensor | bool = True):
        stride = self.compressor.lattice.stride
        is_kind = ((slots % stride == 0) == kind.is_reference) & are_tokens
        tokens = slots.gather(1, (~is_kind).byte().argsort(dim=1, stable=True))
        numbers = tokens // stride if kind.is_reference else tokens - tokens // stride - 1
        # behind the length stand the others, which are not read
        return tokens, numbers.clamp(0, kind.room - 1), is_kind.sum(1).int()

    def _rotation(self, tokens: torch.Tensor | None) -> dispatch.Rotation | None:
        """Tables of angles, and where in them compressed tokens, `[n]`, `[batch, n]` or None for all, stand."""
        if self.form is None:
            return None
        view, count, interleaved = self.layout.view(self.device), self.layout.compressed, self.form.is_interleaved
        span, tables = slice(self.num_sink_tokens, self.num_sink_tokens + count), (self.tables.cos, self.tables.sin)
        if view is None:
            batch = self.state.tail_keys.shape[0]
            positions = None if tokens is None else tokens.int().expand(batch, -1).contiguous()
            return dispatch.Rotation(*(table[:, span] for table in tables), interleaved, positions)
        columns = view.columns[:, span]
        if tokens is not None:
            columns = columns.gather(1, tokens.long()) if tokens.ndim == 2 else columns.index_select(1, tokens)
        return dispatch.Rotation(*tables, interleaved, columns.int().contiguous())


def _picked(mask: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Of a mask of all compressed tokens that of some, `[n]` or `[batch, n]`."""
    if mask is None or tokens is None:
        return mask
    if tokens.ndim == 1:
        return mask.index_select(-1, tokens)
    idx = tokens.long()[:, None, None].expand(-1, *mask.shape[1:3], -1)
    return mask.expand(len(tokens), -1, -1, -1).gather(-1, idx)
