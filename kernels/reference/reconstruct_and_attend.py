"""Attention to tokens straight from their codes: the specification."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .attend import Attended, weigh
from .score import paired, score


class Vectors(NamedTuple):
    """What bytes stand for; component `c` of a token is `table[first_entry[c] + code[byte_idx[c]] * vector_size[c]]`.

    Components of one vector stand side by side, in the table too. First come vectors of 16 components, then of 8, 4, 2
    and 1, each at a multiple of its size in the table: a kernel picks a vector at once. Where `vector_size` is 0 there
    is no byte, and the component is 0.

    Attributes:
        table: `[entries]` float32 or float16, which is also what products are taken in (sums are float32).
        byte_idx, first_entry, vector_size: `[components]` int32.
        counts: components in vectors of 16, 8, 4 and 2, multiples of 8; the others are by themselves.
    """

    table: torch.Tensor
    byte_idx: torch.Tensor
    first_entry: torch.Tensor
    vector_size: torch.Tensor
    counts: tuple[int, int, int, int]


class References(NamedTuple):
    """What is added to a token's components: those of its reference, out of the same table but in vectors of any size.

    Attributes:
        codes: `[batch, num_references, bytes]` uint8.
        reference_idx: `[batch, num_slots]` int16 holding unsigned 16-bit numbers of the row's references.
        byte_idx, first_entry, vector_size: `[components]` int32, as in `Vectors`.
        slot_map: `[batch, references of a row]` int32, where in `codes` they stand; None: in order.
    """

    codes: torch.Tensor
    reference_idx: torch.Tensor
    byte_idx: torch.Tensor
    first_entry: torch.Tensor
    vector_size: torch.Tensor
    slot_map: torch.Tensor | None = None


class KeyMap(NamedTuple):
    """Keys of a token's components are `components @ matrix * scale + mean`, before they are rotated.

    Attributes:
        matrix: `[components, heads * head_dim]` in the dtype of the table; numbers of a head that RoPE turns together
            stand side by side, those that it does not turn behind them.
        scale, mean: `[heads * head_dim]` float32.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor


class ValueMap(NamedTuple):
    """Values of a token's components are `components @ matrix * scale + mean`.

    Attributes:
        matrix: `[heads, components, value_dim]` in the dtype of the table.
        scale, mean: `[heads, 1, value_dim]` float32.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor


class Rotation(NamedTuple):
    """How RoPE turns keys.

    Attributes:
        cos, sin: `[batch or 1, num_positions, pairs]` floating, of the first `pairs` pairs of each head.
        interleaved: whether a pair of a query are neighbours; else the second number stands `pairs` behind the first.
        positions: `[batch, n]` int32, where the angles of each token stand; None: as the token itself in `codes`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    positions: torch.Tensor | None = None


def reconstruct_and_attend(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    value_map: ValueMap,
    references: References | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """What queries see in tokens, each a row of bytes that stand for components.

    Values are linear in components, which are therefore mixed instead of them.

    Args:
        query: `[batch, heads, queries, head_dim]`, any floating dtype, to be multiplied by `scale`.
        codes: `[batch, num_slots, bytes]` uint8; rows may be one and the same memory, a pool.
        references: what each token's components are added to; None: nothing.
        rotation: None: keys are not rotated.
        mask: added to the scores, `[batch or 1, heads or 1, queries or 1, n]` float32, or None.
        slots: `[batch, n]` int32, the tokens to read; None: all, in their order.
        slot_map: `[batch, tokens of a row]` int32, where in `codes` (and with `references` in `reference_idx`) each
            token stands; None: in order.
        lengths: `[batch]` int32, how many of the n tokens of each row there are; None: all.
        before: what the same queries saw in other tokens, to be merged with.
        dtype: of the output.

    Returns:
        of values, `[batch, heads, queries, value_dim]`.
    """
    where = slots, slot_map, lengths
    scores, components = score_codes(query, codes, vectors, key_map, references, rotation, *where, scale)
    seen = weigh(scores, components, mask)
    output = seen.output @ value_map.matrix.float() * value_map.scale + value_map.mean
    # a query that sees nothing has no mean either
    seen = Attended(torch.where(seen.log_total.isneginf(), 0.0, output), seen.log_total)
    seen = seen if before is None else seen.merge(before)
    return Attended(seen.output.to(dtype), seen.log_total)


def score_codes(
    query, codes, vectors, key_map, references, rotation, slots, slot_map, lengths, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[batch, heads, queries, n]`, -inf behind a row's length, and components `[batch, n, components]`."""
    batch, device, query, angles = len(query), codes.device, query.float() * scale, None
    rows = torch.arange(batch, device=device)[:, None]
    if rotation is not None:
        query = paired(query, rotation.cos.shape[-1], rotation.interleaved)
        places = slots if rotation.positions is None else rotation.positions
        angles = tuple(part.float().expand(batch, -1, -1) for part in rotation[:2])
        angles = angles if places is None else tuple(part[rows, places] for part in angles)
    picked = slice(None) if slots is None else (rows, slots)
    if slot_map is not None:
        picked = rows, slot_map[picked]
    components = _read(codes[picked], vectors.table, *vectors[1:4])
    if references is not None:
        idx = references.reference_idx[picked].int() & 0xFFFF
        idx = idx if references.slot_map is None else references.slot_map[rows, idx]
        components += _read(references.codes[rows, idx], vectors.table, *references[2:5])
    scores = score(query, components, key_map.mean, key_map.matrix.float() * key_map.scale, angles)
    if lengths is not None:
        is_behind = torch.arange(components.shape[1], device=device) >= lengths[:, None]
        scores = scores.masked_fill(is_behind[:, None, None], -torch.inf)
    return scores, components


def _read(codes, table, byte_idx, first_entry, vector_size) -> torch.Tensor:
    """Components `[batch, n, components]` float32 of codes `[batch, n, bytes]`."""
    if codes.shape[-1] == 0:
        return torch.zeros(*codes.shape[:2], len(byte_idx), device=codes.device)
    components = table.float()[first_entry + codes[..., byte_idx].int() * vector_size]
    return components.masked_fill_(vector_size == 0, 0)
