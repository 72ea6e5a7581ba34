"""Scores tokens of a chunk, for `reconstruct_and_attend`: keys are projected, rotated and multiplied in registers."""

import torch
import triton

from ..reference.reconstruct_and_attend import KeyMap, Rotation
from .attend_kernels import score_kernel
from .capability import capability
from .decoding import WHOLE, Decoder

# programs that do not keep a GPU busy, and into how many parts the components of a short list are cut at most
FEW, MOST_PARTS = 200, 2
# queries of a head that are multiplied at once; tensor cores take no fewer than 16
FEWEST_ROWS, MOST_QUERIES = 16, 32


def half_of(head_dim: int) -> int:
    """Half a head's numbers as tiles hold them, a power of two."""
    return max(16, triton.next_power_of_2(head_dim // 2))


def score_tile(half: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Heads of a program, tokens and components of a tile, warps, and how many tiles are loaded ahead.

    Args:
        half: half a head's numbers, a power of two.
        capability: of the card: 75 for a T4, 90 for an H100.
    """
    if dtype == torch.float32 or capability < 80:
        tokens, columns, components, warps, stages = 32, 128, 32, 4, 2
    elif capability == 90 and half <= 64:
        # two programs a processor: one multiplies while the other rotates
        tokens, columns, components, warps, stages = 128, 128, 64, 4, 3
    elif capability in (80, 90, 100):
        tokens, columns, components, warps, stages = 128, 256, 64, 8, 3
    else:
        tokens, columns, components, warps, stages = 128, 128, 32, 8, 3
    tile = {"HEADS": max(1, columns // (2 * half)), "BLOCK_TOKENS": tokens, "BLOCK_COMPONENTS": components}
    return tile | {"num_warps": warps, "num_stages": stages}


def rotation_inputs(rotation: Rotation | None, slots: torch.Tensor | None, query: torch.Tensor) -> tuple:
    """Of a kernel: cosine, sine, positions, pairs, stride of a row of angles, and whether pairs are interleaved."""
    if rotation is None:
        # nothing is read of angles that are missing
        return query, query, None, 0, 0, False
    cos, sin = (side_by_side(part) for part in rotation[:2])
    positions = slots if rotation.positions is None else rotation.positions
    return cos, sin, positions, cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0, rotation.interleaved


class Scorer:
    """What scores are made of, prepared once for all chunks.

    Attributes:
        room: tokens that a chunk has room for.
        parts: of components, scored apart where there are few tokens: scores are the sum of the parts'.
        rows: queries of a row, over all heads.
    """

    def __init__(
        self,
        query: torch.Tensor,
        decoder: Decoder,
        key_map: KeyMap,
        rotation: Rotation | None,
        mask: torch.Tensor | None,
        slots: torch.Tensor | None,
        lengths: torch.Tensor | None,
        scale: float,
    ):
        batch, heads, num_queries, head_dim = query.shape
        self._query, self._decoder, self.rows = query.contiguous(), decoder, heads * num_queries
        matrix, half, mask_strides = side_by_side(key_map.matrix), half_of(head_dim), [0] * 4
        cos, sin, positions, pairs, angle_stride, interleaved = rotation_inputs(rotation, slots, self._query)
        if mask is not None:
            mask_strides = mask.expand(batch, heads, num_queries, decoder.num_tokens).stride()
        self._tile = score_tile(half, decoder.dtype, capability(decoder.device))
        self._heads_up = triton.cdiv(heads, self._tile["HEADS"])
        asked = min(heads, self._tile["HEADS"]) * num_queries
        self._tile["QUERIES"] = min(MOST_QUERIES, max(FEWEST_ROWS, triton.next_power_of_2(asked)))
        self.room, self.parts = decoder.room(self._heads_up, self._tile["BLOCK_TOKENS"]), self._parts()
        part_size = triton.cdiv(decoder.num_components, self.parts * self._tile["BLOCK_COMPONENTS"])
        self._inputs = matrix, *key_map[1:], cos, sin, positions, mask, lengths
        self._sizes = heads, num_queries, head_dim // 2, pairs, matrix.stride(0), angle_stride, *mask_strides
        self._scale, self._rooms = scale, (part_size, decoder.width, self.room)
        self._kind = {
            "HAS_MASK": mask is not None,
            "HAS_POSITIONS": positions is not None,
            "HAS_LENGTHS": lengths is not None,
            "INTERLEAVED": interleaved,
            "HALF": half,
        }

    def __call__(self, first: int, count: int, components: torch.Tensor, scores: torch.Tensor) -> None:
        """Fills in what belongs to tokens `first .. first + count - 1`, and to a whole number of tiles.

        Args:
            components: of these tokens.
            scores: `[parts, batch, rows, room]` float32, as powers of two.
        """
        tokens, decoder = triton.cdiv(count, WHOLE) * WHOLE, self._decoder
        score_kernel[(self._heads_up * self.parts, tokens // self._tile["BLOCK_TOKENS"], decoder.batch)](
            *(self._query, components, *self._inputs, scores),
            *(self._scale, first, decoder.num_tokens, decoder.num_components, *self._rooms, self.room, *self._sizes),
            **self._kind,
            **self._tile,
        )

    def _parts(self) -> int:
        decoder = self._decoder
        programs = triton.cdiv(decoder.num_tokens, self._tile["BLOCK_TOKENS"]) * self._heads_up * decoder.batch
        parts = 1
        while 2 * parts * programs <= FEW and parts < MOST_PARTS:
            parts *= 2
        return parts


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Rows whose numbers are neighbours, and that are neighbours themselves."""
    return x if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(-2) == x.shape[-1]) else x.contiguous()
