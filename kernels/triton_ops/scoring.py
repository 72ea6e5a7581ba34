"""Decodes and scores a chunk of tokens after the other, for `reconstruct_and_attend` and `score_leading`.

Heads share components, so a chunk of tokens is decoded once for all of them, and stays in the L2 cache of a GPU while
keys of a tile are projected, rotated and multiplied by queries in registers.
"""

from itertools import accumulate

import torch
import triton

from ..reference.reconstruct_and_attend import KeyMap, References, Vectors
from .attend_kernels import decode_kernel, score_kernel
from .capability import capability

# bytes of the chunk of components; with scores and partial sums a read takes less than 64 MB
CHUNK_BYTES = 2**25
# tokens and components of a chunk are multiples of it, and it is one of the tiles'
WHOLE = 128
DECODE_TILE = {"BLOCK_TOKENS": 16, "BLOCK_COMPONENTS": 64, "num_warps": 2}
# programs that do not keep a GPU busy, and into how many parts the components of a short list are cut at most
FEW, MOST_PARTS = 256, 4
# queries of a head that are multiplied at once; tensor cores take no fewer than 16
FEWEST_ROWS, MOST_QUERIES = 16, 32


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


class Scorer:
    """What is read of some tokens, prepared once for all chunks.

    Attributes:
        num_tokens, num_components: of all chunks, and of a token.
        width: components of a token in a chunk, zeros behind the last one.
        room: tokens that a chunk has room for.
        parts: of components, scored apart where there are few tokens: scores are the sum of the parts'.
        rows: queries of a row, over all heads.
    """

    def __init__(
        self,
        query: torch.Tensor,
        codes: torch.Tensor,
        vectors: Vectors,
        key_map: KeyMap,
        references: References | None,
        angles: tuple[torch.Tensor, torch.Tensor] | None,
        mask: torch.Tensor | None,
        slots: torch.Tensor | None,
        positions: torch.Tensor | None,
        lengths: torch.Tensor | None,
    ):
        batch, heads, num_queries, head_dim = query.shape
        table, *indices = vectors[:4]
        self.dtype, self.device, self.batch, self.rows = table.dtype, table.device, batch, heads * num_queries
        self.num_tokens = codes.shape[1] if slots is None else slots.shape[1]
        self.num_components = len(indices[0])
        self.width = max(1, triton.cdiv(self.num_components, WHOLE)) * WHOLE
        positions = slots if positions is None else positions
        query, matrix, pairs, angle_stride = query.to(table.dtype).contiguous(), _side_by_side(key_map.matrix), 0, 0
        # nothing is read of what is missing
        cos = sin = query
        if angles is not None:
            cos, sin = (_side_by_side(part) for part in angles)
            pairs, angle_stride = cos.shape[-1], cos.stride(0) if len(cos) > 1 else 0
        mask_strides = [0] * 4
        if mask is not None:
            mask_strides = mask.expand(batch, heads, num_queries, self.num_tokens).stride()
        half = max(16, triton.next_power_of_2(head_dim // 2))
        self._tile = score_tile(half, table.dtype, capability(self.device))
        self._heads_up = triton.cdiv(heads, self._tile["HEADS"])
        asked = min(heads, self._tile["HEADS"]) * num_queries
        self._tile["QUERIES"] = min(MOST_QUERIES, max(FEWEST_ROWS, triton.next_power_of_2(asked)))
        self.room, self.parts = self._chunk(), self._parts()
        part_size = triton.cdiv(self.num_components, self.parts * self._tile["BLOCK_COMPONENTS"])

        # vectors of one size in blocks of their own; the last are by themselves, and fill the width up with zeros
        ends = list(accumulate(vectors.counts))
        self._decode_blocks = sum(
            triton.cdiv(stop - start, DECODE_TILE["BLOCK_COMPONENTS"])
            for start, stop in zip([0, *ends], [*ends, self.width], strict=True)
        )
        reference_parts, reference_strides = [None] * 5, [0] * 3
        if references is not None:
            reference_parts = references
            reference_strides = *references.codes.stride()[:2], references.reference_idx.stride(0)
        self._decode_inputs = codes, slots, table, *indices, *reference_parts
        self._decode_sizes = self.width, self.room, *codes.stride()[:2], *reference_strides, *ends
        self._decode_kind = {"HAS_SLOTS": slots is not None, "HAS_REFERENCES": references is not None}
        self._query = query
        self._score_inputs = matrix, *key_map[1:], cos, sin, positions, mask, lengths
        self._score_sizes = heads, num_queries, head_dim // 2, pairs, matrix.stride(0), angle_stride, *mask_strides
        self._score_rooms = part_size, self.width, self.room
        self._score_kind = {
            "HAS_MASK": mask is not None,
            "HAS_POSITIONS": positions is not None,
            "HAS_LENGTHS": lengths is not None,
            "HALF": half,
        }

    def chunks(self) -> list[tuple[int, int]]:
        """First token and number of tokens of each."""
        firsts = range(0, self.num_tokens, self.room)
        return [(first, min(self.room, self.num_tokens - first)) for first in firsts]

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def new_components(self) -> torch.Tensor:
        """Of a chunk."""
        return self.new(self.batch, self.room, self.width, dtype=self.dtype)

    def __call__(self, first: int, count: int, components: torch.Tensor, scores: torch.Tensor) -> None:
        """Fills in what belongs to tokens `first .. first + count - 1`, and to a whole number of tiles.

        Args:
            components: of `new_components`.
            scores: `[parts, batch, rows, tokens]` float32, as powers of two, from the first of these tokens on.
        """
        sizes, tokens = (first, self.num_tokens, self.num_components), triton.cdiv(count, WHOLE) * WHOLE
        decode_kernel[(tokens // DECODE_TILE["BLOCK_TOKENS"], self._decode_blocks, self.batch)](
            *self._decode_inputs, components, *sizes, *self._decode_sizes, **self._decode_kind, **DECODE_TILE
        )
        score_kernel[(self._heads_up * self.parts, tokens // self._tile["BLOCK_TOKENS"], self.batch)](
            *(self._query, components, *self._score_inputs, scores),
            *(*sizes, *self._score_rooms, scores.stride(2), *self._score_sizes),
            **self._score_kind,
            **self._tile,
        )

    def _parts(self) -> int:
        programs = triton.cdiv(self.num_tokens, self._tile["BLOCK_TOKENS"]) * self._heads_up * self.batch
        parts = 1
        while 2 * parts * programs <= FEW and parts < MOST_PARTS:
            parts *= 2
        return parts

    def _chunk(self) -> int:
        """Tokens of a chunk: what fits, in programs that keep all processors of the card busy to the end."""
        tokens = max(WHOLE, CHUNK_BYTES // (self.batch * self.width * self.dtype.itemsize) // WHOLE * WHOLE)
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            wave = max(WHOLE, processors // self._heads_up * self._tile["BLOCK_TOKENS"] // WHOLE * WHOLE)
            tokens = max(1, tokens // wave) * wave if wave <= tokens else tokens
        return min(tokens, triton.cdiv(self.num_tokens, WHOLE) * WHOLE)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Rows whose numbers are neighbours, and that are neighbours themselves."""
    return x if x.stride(-1) == 1 and (x.ndim < 3 or x.stride(-2) == x.shape[-1]) else x.contiguous()
