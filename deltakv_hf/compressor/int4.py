"""Keys and values in four bits a number, in blocks of 32 tokens, keys as the model rotated them: filter layers.

The layout is that of KIVI, see `kernels/reference/int4_decode.py`. Attention reads it as it is, so a layer that is read
whole in every step is read fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import dispatch
from ..errors import UnsupportedModelError
from ..references import Lattice
from .coder import Pieces, RecordCoder
from .store import TokenStore

GROUP = dispatch.INT4_GROUP


@dataclass(frozen=True)
class Int4Store(TokenStore):
    """Blocks of 32 tokens; what stands behind a row's last token in its last block is unused.

    Attributes:
        key_codes: `[batch, heads, blocks, 32, head_dim / 2]` uint8.
        key_levels: `[batch, heads, blocks, head_dim, 2]` float16.
        value_codes: `[batch, heads, blocks, value_dim, 16]` uint8.
        value_levels: `[batch, heads, blocks, 32, value_dim / 32, 2]` float16.
    """

    axis: ClassVar[int] = 2

    key_codes: torch.Tensor
    key_levels: torch.Tensor
    value_codes: torch.Tensor
    value_levels: torch.Tensor

    def blocks(self, span: slice = slice(None)) -> list[torch.Tensor]:
        """What `int4_decode` takes: codes and levels, the tokens of blocks joined."""
        keys, key_levels, values, value_levels = (part[:, :, span] for part in vars(self).values())
        return [keys.flatten(2, 3), key_levels, values, value_levels.flatten(2, 3)]


class Int4Compressor(RecordCoder):
    """Codes every token by itself, 32 at a time.

    Tokens are stored in whole blocks. If a crop leaves a part of one, its tokens are read and coded again with those
    that come to stand beside them.

    Args:
        heads, key_dim, value_dim: of the layer's keys and values.

    Raises:
        UnsupportedModelError: heads cannot be cut into groups of 32 numbers.
    """

    def __init__(self, heads: int, key_dim: int, value_dim: int):
        if key_dim % GROUP or value_dim % GROUP:
            raise UnsupportedModelError(
                f"filter layers want heads of a multiple of {GROUP} numbers, got {key_dim} for keys and {value_dim} "
                'for values. Use `selection="coarse_to_fine"`.'
            )
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.width, self.lattice, self.unit = heads * (key_dim + value_dim), Lattice(1), GROUP

    def tensors(self) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> Int4Store:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""
        own = batch_size, self.heads, -(-num_tokens // GROUP)
        return Int4Store(
            torch.empty(*own, GROUP, self.key_dim // 2, dtype=torch.uint8, device=device),
            torch.empty(*own, self.key_dim, 2, dtype=torch.float16, device=device),
            torch.empty(*own, self.value_dim, GROUP // 2, dtype=torch.uint8, device=device),
            torch.empty(*own, GROUP, self.value_dim // GROUP, 2, dtype=torch.float16, device=device),
        )

    def bytes_per_token(self) -> float:
        """Stored bytes of a token."""
        block = self.empty(1, torch.device("meta"), GROUP)
        return sum(part.numel() * part.itemsize for part in vars(block).values()) / GROUP

    def records(self, count: int) -> tuple[int, int]:
        """See `RecordCoder.records`: blocks."""
        return 0, -(-count // GROUP)

    def context(self, start: int) -> tuple[int, int]:
        """See `RecordCoder.context`: a block that a crop has left in part."""
        return self.records(start if start % GROUP else 0)

    def code(self, held: Int4Store, start: int, stop: int, read) -> Int4Store:
        """See `RecordCoder.code`; `stop` is a multiple of 32."""
        first, parts, tile = start // GROUP, [], max(1, self.encode_tile // GROUP) * GROUP
        for begin in range(first * GROUP, stop, tile):
            keys, values = self._split(read(max(begin, start), min(begin + tile, stop)))
            if begin < start:
                left = dispatch.int4_dense(*held.blocks(slice(first, first + 1)))
                keys, values = (
                    torch.cat([old[:, :, : start - begin], new], dim=2)
                    for old, new in zip(left, (keys, values), strict=True)
                )
            parts.append(self._encode(keys, values))
        return Int4Store.join(parts)

    def references(self, store: Int4Store) -> None:
        """Nothing."""

    def decode(
        self, store: Int4Store, references: None, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads tokens `start .. stop - 1` of every row, in one piece; see `Coder.decode`."""
        first = start // GROUP
        states = dispatch.int4_dense(*store.blocks(slice(first, -(-stop // GROUP))))
        span = slice(start - first * GROUP, stop - first * GROUP)
        yield torch.cat([part[:, :, span].transpose(1, 2).flatten(2) for part in states], dim=-1), lambda x: x

    def _split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """`[rows, n, width]` -> keys and values `[rows, heads, n, dim]`."""
        parts = tokens.split([self.heads * self.key_dim, self.heads * self.value_dim], dim=-1)
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]

    def _encode(self, keys: torch.Tensor, values: torch.Tensor) -> Int4Store:
        key_codes, key_levels, value_codes, value_levels = dispatch.int4_encode(keys, values)
        key_codes, value_levels = (part.unflatten(2, (-1, GROUP)) for part in (key_codes, value_levels))
        return Int4Store(key_codes, key_levels, value_codes, value_levels)
