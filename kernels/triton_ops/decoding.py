"""Decodes a chunk of tokens after the other, for ops that read codes.

Heads share components, so a chunk of tokens is decoded once for all of them, and stays in the L2 cache of a GPU while
it is read.
"""

from itertools import accumulate

import torch
import triton

from ..reference.reconstruct_and_attend import References, Vectors
from .attend_kernels import decode_kernel

# bytes of the chunk of components; with scores and partial sums a read takes less than 64 MB
CHUNK_BYTES = 2**25
# tokens and components of a chunk are multiples of it, and it is one of the tiles'
WHOLE = 128
DECODE_TILE = {"BLOCK_TOKENS": 16, "BLOCK_COMPONENTS": 64, "num_warps": 2}


class Decoder:
    """Components of some tokens.

    Attributes:
        num_tokens, num_components: of all chunks, and of a token.
        width: components of a token in a chunk, zeros behind the last one.
        dtype, device, batch: of components.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        vectors: Vectors,
        references: References | None,
        slots: torch.Tensor | None,
        slot_map: torch.Tensor | None,
    ):
        table, *indices = vectors[:4]
        self.dtype, self.device, self.batch = table.dtype, table.device, len(codes)
        self.num_tokens = next(part for part in (slots, slot_map, codes) if part is not None).shape[1]
        self.num_components = len(indices[0])
        self.width = max(1, triton.cdiv(self.num_components, WHOLE)) * WHOLE
        # vectors of one size in blocks of their own; the last are by themselves, and fill the width up with zeros
        ends = list(accumulate(vectors.counts))
        self._blocks = sum(
            triton.cdiv(stop - start, DECODE_TILE["BLOCK_COMPONENTS"])
            for start, stop in zip([0, *ends], [*ends, self.width], strict=True)
        )
        maps, parts, strides = [slot_map, None], [None] * 5, [0] * 3
        if references is not None:
            *parts, maps[1] = references
            strides = (*references.codes.stride()[:2], references.reference_idx.stride(0))
        map_strides = [0 if part is None else part.stride(0) for part in maps]
        self._inputs = codes, slots, slot_map, table, *indices, *parts[:2], maps[1], *parts[2:]
        self._strides = *codes.stride()[:2], map_strides[0], *strides, map_strides[1], *ends
        self._kind = {
            "HAS_SLOTS": slots is not None,
            "HAS_MAP": slot_map is not None,
            "HAS_REFERENCES": references is not None,
        }

    def room(self, programs: int, tile: int) -> int:
        """Tokens of a chunk: what fits, in programs that keep all processors of the card busy to the end.

        Args:
            programs: that share a tile of tokens.
            tile: tokens of a program.
        """
        tokens = max(WHOLE, CHUNK_BYTES // (self.batch * self.width * self.dtype.itemsize) // WHOLE * WHOLE)
        if self.device.type == "cuda":
            processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            wave = max(WHOLE, processors // programs * tile // WHOLE * WHOLE)
            tokens = max(1, tokens // wave) * wave if wave <= tokens else tokens
        return min(tokens, triton.cdiv(self.num_tokens, WHOLE) * WHOLE)

    def chunks(self, room: int) -> list[tuple[int, int]]:
        """First token and number of tokens of each."""
        firsts = range(0, self.num_tokens, room)
        return [(first, min(room, self.num_tokens - first)) for first in firsts]

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def __call__(self, first: int, count: int, components: torch.Tensor) -> None:
        """Fills in tokens `first .. first + count - 1`, and zeros up to a whole number of tiles.

        Args:
            components: `[batch, room, width]`.
        """
        tokens = triton.cdiv(count, WHOLE) * WHOLE
        decode_kernel[(tokens // DECODE_TILE["BLOCK_TOKENS"], self._blocks, self.batch)](
            *(*self._inputs, components, first, self.num_tokens, self.num_components, self.width, components.shape[1]),
            *self._strides,
            **self._kind,
            **DECODE_TILE,
        )
