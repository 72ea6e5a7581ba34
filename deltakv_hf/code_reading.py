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
    """

    is_reference: bool
    codes: torch.Tensor
    coded: TokenVectors
    references: dispatch.References | None
    offsets: torch.Tensor | None


@dataclass(frozen=True)
class CodeReader:
    """The compressed tokens of one layer.

    Attributes:
        state, layout, form, tables, num_sink_tokens, device: as of `StateReader`.
        compressor: what coded them.
        backend: of the ops; None: what is fastest.
    """

    state: LayerState
    layout: Layout
    compressor: TransformCompressor
    form: RopeForm | None
    tables: RopeTables | None
    num_sink_tokens: int
    device: torch.device
    backend: str | None

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, slots: torch.Tensor | None = None
    ) -> dispatch.Attended:
        """What `[batch, heads, queries, head_dim]` float32 see.

        Args:
            mask: of all compressed tokens, as `mask_of_slots` makes it, or None.
            slots: `[batch, n]` int64, the compressed tokens to read, each once; None: all.
        """
        transform, seen = self.compressor.transform, None
        residual = None if self.compressor.lattice.is_everywhere else transform.residual_vectors
        for kind in self._kinds(transform.reference_vectors, residual):
            part = self._attend_kind(kind, query, mask, slots)
            seen = part if seen is None else seen.merge(part)
        return seen

    def score(self, query: torch.Tensor, mask: torch.Tensor | None, num_bytes: int) -> torch.Tensor:
        """Scores `[batch, heads, queries, compressed]` float32 by the first bytes of each token."""
        kinds = list(self._kinds(*self.compressor.transform.leading_vectors(num_bytes)))
        found = [self._score_kind(kind, query) for kind in kinds]
        scores = found[0]
        if kinds[0].offsets is not None:
            scores = query.new_empty(*query.shape[:3], self.layout.compressed)
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
        span = lattice.span(0, count, self.device)
        yield Kind(True, reference_codes, reference, None, span.reference_offsets)
        if count > num_references:
            codes = store.residual_codes[:, : count - num_references]
            references = dispatch.References(reference_codes, store.reference_idx[..., 0], *residual.added)
            yield Kind(False, codes, residual, references, span.residual_offsets)

    def _attend_kind(self, kind: Kind, query, mask, slots) -> dispatch.Attended:
        heads, transform, coded, lengths = query.shape[1], self.compressor.transform, kind.coded, None
        if slots is None:
            tokens, numbers = kind.offsets, None
        else:
            tokens, numbers, lengths = self._listed(kind, slots)
        mask, scale = _picked(mask, tokens), coded.largest / transform.weights
        query, key_map, angles, positions = self._prepared(query, coded, scale, tokens)
        seen = dispatch.reconstruct_and_attend(
            *(query, kind.codes, coded.vectors, key_map, kind.references, angles, mask, numbers, positions, lengths),
            self.backend,
        )
        key_width = heads * query.shape[3]
        value_map = transform.basis[coded.order, key_width:] * scale[key_width:]
        value_map = value_map.unflatten(-1, (heads, -1)).transpose(0, 1)
        mean = transform.mean[key_width:].unflatten(-1, (heads, 1, -1))
        return dispatch.Attended(seen.maximum, seen.total, seen.mixed @ value_map + seen.total * mean)

    def _score_kind(self, kind: Kind, query: torch.Tensor) -> torch.Tensor:
        scale = kind.coded.largest / self.compressor.transform.weights
        query, key_map, angles, positions = self._prepared(query, kind.coded, scale, kind.offsets)
        return dispatch.score_leading(
            *(query, kind.codes, kind.coded.vectors, key_map, kind.references, angles, None, positions, None),
            self.backend,
        )

    def _listed(self, kind: Kind, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Those of `slots` that are of a kind first: which tokens they are, their numbers, and how many they are."""
        stride = self.compressor.lattice.stride
        if kind.offsets is None:
            return slots, slots.int(), None
        is_kind = (slots % stride == 0) == kind.is_reference
        tokens = slots.gather(1, (~is_kind).byte().argsort(dim=1, stable=True))
        numbers = tokens // stride if kind.is_reference else tokens - tokens // stride - 1
        # behind the length stand the others, which are not read
        numbers = numbers.clamp(0, kind.codes.shape[1] - 1)
        return tokens, numbers.int(), is_kind.sum(1).int()

    def _prepared(self, query: torch.Tensor, coded: TokenVectors, scale: torch.Tensor, tokens: torch.Tensor | None):
        """The query and the key map in the order of pairs, tables of angles and where in them tokens stand."""
        heads, head_dim, transform = *query.shape[1::2], self.compressor.transform
        key_width, angles, positions = heads * head_dim, None, None
        basis = transform.basis[:, :key_width][coded.order]
        keys = basis, scale[:key_width], transform.mean[:key_width]
        if self.form is not None:
            pairs = self.tables.cos.shape[-1]
            query = self.form.paired(query, pairs)
            keys = (self.form.paired(part.unflatten(-1, (heads, -1)), pairs).flatten(-2) for part in keys)
            angles, positions = self._angles(tokens)
        return query, dispatch.KeyMap(*keys), angles, positions

    def _angles(self, tokens: torch.Tensor | None) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Tables of angles, and where in them compressed tokens (None: all) stand."""
        batch, view, count = self.state.tail_keys.shape[0], self.layout.view(self.device), self.layout.compressed
        span, tables = slice(self.num_sink_tokens, self.num_sink_tokens + count), (self.tables.cos, self.tables.sin)
        if view is None:
            positions = None if tokens is None else tokens.int().expand(batch, -1).contiguous()
            return tuple(table[:, span] for table in tables), positions
        columns = view.columns[:, span]
        if tokens is not None:
            columns = columns.gather(1, tokens) if tokens.ndim == 2 else columns.index_select(1, tokens)
        return tables, columns.int().contiguous()


def _picked(mask: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Of a mask of all compressed tokens that of some, `[n]` or `[batch, n]`."""
    if mask is None or tokens is None:
        return mask
    if tokens.ndim == 1:
        return mask.index_select(-1, tokens)
    idx = tokens[:, None, None].expand(-1, *mask.shape[1:3], -1)
    return mask.expand(len(tokens), -1, -1, -1).gather(-1, idx)
