"""What the compressors of all kinds have in common: tokens of one layer become records of a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch

from .. import dispatch
from ..hf_compat import upload
from ..references import Lattice
from .store import TokenStore

Pieces = Iterator[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]


class Coder(ABC):
    """Codes tokens of one layer, `[K; V]` with all heads joined and keys un-rotated.

    Nothing here ever changes: copies of a cache share it.

    Attributes:
        width: numbers of a token.
        lattice: which tokens are references; what stands between two of them is read as one.
        encode_tile: tokens coded at once: bounds the float32 copies of a long prefill.
    """

    width: int
    lattice: Lattice
    encode_tile: int = 2048

    def __deepcopy__(self, memo: dict) -> Coder:
        return self

    @abstractmethod
    def tensors(self) -> list[torch.Tensor]:
        """What the coder itself holds."""

    @abstractmethod
    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> TokenStore:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""

    @abstractmethod
    def bytes_per_token(self) -> float:
        """Stored bytes of a compressed token."""

    def prepare(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        interleaved: bool = False,
    ) -> torch.Tensor:
        """Tokens as they are coded, `[rows, n, numbers]` float32: here all heads joined and keys un-rotated.

        Args:
            keys, values, angles, interleaved: as of `dispatch.unrotate`.
        """
        return dispatch.unrotate(keys, values, angles, interleaved)

    @abstractmethod
    def append(self, store: TokenStore, rows: list[int] | None, start: int, stop: int, read) -> TokenStore:
        """Codes compressed tokens `start .. stop - 1` of `rows` and returns the longer store.

        Args:
            rows: row numbers, or None for all; each holds exactly `start` compressed tokens.
            read: function `(a, b) -> x` of tokens `a .. b - 1` of these rows, as `prepare` gives them.
        """

    @abstractmethod
    def cut(self, store: TokenStore, count: int) -> TokenStore:
        """A store of the first `count` compressed tokens of every row; what stays keeps its bytes."""

    @abstractmethod
    def references(self, store: TokenStore):
        """What all pieces of a read share; handed to `decode`."""

    @abstractmethod
    def decode(
        self, store: TokenStore, references, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads compressed tokens `start .. stop - 1` of every row, in pieces.

        Args:
            references: what `self.references(store)` gave.
            scratch: `[2, at least the numbers of the tokens]` float32 to work in; it holds a piece until the next.

        Returns:
            what `TokenStore.read_in_pieces` yields, float32.
        """


class RecordCoder(Coder):
    """Codes tokens as records that stand one by one, so that a row's may stand anywhere.

    Attributes:
        unit: tokens of a record.
    """

    unit: int = 1

    @abstractmethod
    def records(self, count: int) -> tuple[int, int]:
        """How many records, with references and with residuals, hold the first `count` tokens of a row."""

    @abstractmethod
    def context(self, start: int) -> tuple[int, int]:
        """How many of a row's first records `code` looks at to code tokens from `start` on."""

    @abstractmethod
    def code(self, held: TokenStore, start: int, stop: int, read) -> TokenStore:
        """Codes compressed tokens `start .. stop - 1` of some rows.

        Args:
            held: what these rows hold, at least its first `context(start)` records.
            read: as of `append`.

        Returns:
            Records from that on in which token `start` stands.
        """

    def begin(self, start: int) -> tuple[int, int]:
        """Which records of a row, with references and with residuals, `code` gives first."""
        return self.records(start // self.unit * self.unit)

    def append(self, store: TokenStore, rows: list[int] | None, start: int, stop: int, read) -> TokenStore:
        """See `Coder.append`."""
        held = store
        if rows is not None:
            # a list as an index would make the host wait for the device
            picked = upload(torch.tensor(rows), getattr(store, store.names()[0]).device)
            held = store.first(*self.context(start)).map(lambda part: part.index_select(0, picked))
        return store.write(self.code(held, start, stop, read), rows, *self.begin(start))

    def cut(self, store: TokenStore, count: int) -> TokenStore:
        """A store of the first `count` compressed tokens of every row; what stays keeps its bytes."""
        return store.first(*self.records(count)).map(torch.clone)


class ResidualCoder(RecordCoder):
    """Codes tokens on the lattice by themselves, any other as what it differs from the mean of its nearest references,
    as those read back.

    Attributes:
        top_k: references whose mean predicts a token.
    """

    top_k: int

    @abstractmethod
    def code_references(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Fields of the store that stand with references, of prepared tokens `[batch, n, numbers]`."""

    @abstractmethod
    def read_references(self, *fields: torch.Tensor) -> torch.Tensor:
        """The inverse, float32: what residuals are taken against."""

    @abstractmethod
    def code_residuals(
        self, tokens: torch.Tensor, places: torch.Tensor, references: torch.Tensor, idx: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Fields that stand with residuals but for `reference_idx`.

        Args:
            tokens: as prepared, `[batch, n, numbers]`.
            places: `[m]` int64, which of them are no references.
            references: as decoded, `[batch, num_references, numbers]`.
            idx: `[batch, m, top_k]` int16, their references.
        """

    def bytes_per_token(self) -> float:
        """Stored bytes of a compressed token, references shared out over the tokens of a stride (growth left out)."""
        store, stride = self.empty(1, torch.device("meta")), self.lattice.stride
        sizes = {name: getattr(store, name).shape[2:].numel() * getattr(store, name).itemsize for name in store.names()}
        own = sum(sizes[name] for name in store.reference_names())
        return (own + (stride - 1) * (sum(sizes.values()) - own)) / stride

    def records(self, count: int) -> tuple[int, int]:
        """See `RecordCoder.records`."""
        num_references = self.lattice.count(count)
        return num_references, count - num_references

    def context(self, start: int) -> tuple[int, int]:
        """See `RecordCoder.context`: references, if there are others to be coded against them."""
        return 0 if self.lattice.is_everywhere else self.lattice.count(start), 0

    def code(self, held: TokenStore, start: int, stop: int, read) -> TokenStore:
        """See `RecordCoder.code`."""
        lattice, names, references, parts = self.lattice, held.reference_names(), None, []
        if not lattice.is_everywhere:
            num_references = lattice.count(start)
            references = self.read_references(*(getattr(held, name)[:, :num_references] for name in names))
        for first in range(start, stop, self.encode_tile):
            last = min(first + self.encode_tile, stop)
            tokens = read(first, last)
            if references is None:
                # none is read back
                coded = dict(zip(names, self.code_references(tokens), strict=True))
                parts.append(replace(self.empty(tokens.shape[0], tokens.device), **coded))
                continue
            span = lattice.span(first, last, references.device)
            coded = self.code_references(tokens.index_select(1, span.reference_offsets))
            references = torch.cat([references, self.read_references(*coded)], dim=1)
            visible, places = span.num_visible.expand(tokens.shape[0], -1), span.residual_offsets
            idx = dispatch.nearest_references(tokens, references, visible, self.top_k, places).to(torch.int16)
            residual = self.code_residuals(tokens, places, references, idx)
            parts.append(type(held)(*coded, *residual, idx))
        return type(held).join(parts)


class TokenCoder(RecordCoder):
    """Codes every token by itself: a subclass has a `width` and says in `code_tokens` and `read_tokens` how.

    What a token becomes must depend on that token alone, however many are coded at once: sums go in float64, since
    float32 rounds otherwise in another shape. `examples/own_compressor.py` is one in full.
    """

    lattice = Lattice(1)

    @abstractmethod
    def code_tokens(self, tokens: torch.Tensor) -> TokenStore:
        """A store of tokens `[batch, n, width]` float32, every field `[batch, n, ...]`."""

    @abstractmethod
    def read_tokens(self, store: TokenStore) -> torch.Tensor:
        """The inverse, `[batch, n, width]` float32."""

    def tensors(self) -> list[torch.Tensor]:
        """What the coder itself holds: nothing."""
        return []

    @cached_property
    def _record(self) -> TokenStore:
        """What a token becomes, without data."""
        like = next(iter(self.tensors()), torch.empty(0))
        coded = self.code_tokens(torch.zeros(1, 1, self.width, device=like.device))
        return coded.map(lambda part: part.to("meta"))

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> TokenStore:
        """A store with room for `num_tokens` tokens (on the meta device: what shapes and dtypes it must have)."""
        return self._record.map(
            lambda part: torch.empty(batch_size, num_tokens, *part.shape[2:], dtype=part.dtype, device=device)
        )

    def bytes_per_token(self) -> float:
        """Stored bytes of a token."""
        return sum(part.nbytes for part in vars(self._record).values())

    def records(self, count: int) -> tuple[int, int]:
        """See `RecordCoder.records`."""
        return count, count

    def context(self, start: int) -> tuple[int, int]:
        """See `RecordCoder.context`: nothing."""
        return 0, 0

    def code(self, held: TokenStore, start: int, stop: int, read) -> TokenStore:
        """See `RecordCoder.code`."""
        tiles = range(start, stop, self.encode_tile)
        return type(held).join([self.code_tokens(read(first, min(first + self.encode_tile, stop))) for first in tiles])

    def references(self, store: TokenStore) -> None:
        """Nothing: no token needs another one."""

    def decode(
        self, store: TokenStore, references: None, start: int, stop: int, scratch: torch.Tensor | None = None
    ) -> Pieces:
        """Reads compressed tokens `start .. stop - 1` of every row, in one piece; see `Coder.decode`."""
        yield self.read_tokens(store.map(lambda part: part[:, start:stop])), lambda x: x
