"""Where the tokens of a cache of fixed size stand, on the device: what all its layers read in a decode step.

Every tensor here keeps its address, so a recorded graph reads what was written since. A step moves `columns` and
`place` on; all else is written between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .block_table import BlockTable, slots_of
from .dispatch import INT4_GROUP
from .hf_compat import upload
from .ledger import TokenLedger
from .references import Lattice


@dataclass(frozen=True)
class StaticKind:
    """Compressed tokens that are references, or those that are not, of layers with one lattice.

    Attributes:
        offsets: `[n]` int64, which compressed tokens they are; None: all, in order.
        lengths: `[batch]` int32, how many there are.
        columns: `[batch, n]` int32, where they stand.
        slot_map: `[batch, n]` int32, their places in a layer's pool.
    """

    offsets: torch.Tensor | None
    lengths: torch.Tensor
    columns: torch.Tensor
    slot_map: torch.Tensor


class StaticPlan:
    """The tensors of a cache.

    Args:
        batch_size: rows.
        capacity: compressed tokens that a row has room for, whole strides of every lattice.
        num_raw: tokens that its raw part has room for.
        num_sink_tokens: of the cache.
        strides: of the layers' lattices.
        block_size: compressed tokens of a block of the pools.

    Attributes:
        counts: `[2]` int64, columns seen, and rows' padding among those of steps.
        place: `[1]` int64, where in the raw part the next token goes.
        raw_bias: `[batch, num_raw]` float32, 0 at raw tokens, -inf elsewhere.
        compressed: `[batch]` int32.
        token_columns: `[batch, capacity]` int32, column of each compressed token.
        kinds: by stride, references and the others (None where all are references).
        blocks: `[batch, blocks]` int32, which blocks of the pools a row's tokens stand in.
        int4_blocks: `[batch, blocks of 32]` int32, the same of four-bit tokens.
        is_ready: whether the tensors say what the ledger says, so that a step may run.
        chosen: `[batch, n]` int32, what a layer of the running step has chosen for those behind it.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        num_raw: int,
        num_sink_tokens: int,
        strides: set[int],
        block_size: int,
        device: torch.device,
    ):
        self.batch_size, self.capacity, self.num_raw, self.device = batch_size, capacity, num_raw, device
        self.num_sink_tokens = num_sink_tokens
        self.counts, self.one = (torch.tensor(numbers, device=device) for numbers in ([0, 0], [1, 0]))
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.raw_bias = torch.zeros(batch_size, num_raw, device=device)
        self.compressed = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._even_columns = torch.arange(capacity, dtype=torch.int32, device=device).add_(num_sink_tokens)
        self.token_columns = self._even_columns.repeat(batch_size, 1)
        self.block_size = block_size
        self.blocks = torch.zeros(batch_size, capacity // block_size, dtype=torch.int32, device=device)
        self.int4_blocks = slots_of(self.blocks, block_size // INT4_GROUP)
        self.kinds = {stride: self._new_kinds(stride) for stride in strides}
        self.is_ready, self.chosen, self._new = False, None, None
        for tensor in (self.counts, self.one, self.place, self.raw_bias):
            keep_address(tensor)

    def __deepcopy__(self, memo: dict) -> None:
        # a copy of the cache makes its own
        return None

    @property
    def columns(self) -> torch.Tensor:
        """`[1]` int64, columns seen."""
        return self.counts[:1]

    def _new_kinds(self, stride: int) -> tuple[StaticKind, StaticKind | None]:
        if stride == 1:
            return StaticKind(None, self.compressed, self.token_columns, slots_of(self.blocks, self.block_size)), None
        span = Lattice(stride).span(0, self.capacity, self.device)
        kinds = []
        for offsets in (span.reference_offsets, span.residual_offsets):
            columns = self.token_columns[:, : len(offsets)].clone()
            kinds.append(StaticKind(offsets, torch.zeros_like(self.compressed), columns, torch.zeros_like(columns)))
        return tuple(kinds)

    def tensors(self) -> list[torch.Tensor]:
        """What is held."""
        own = [
            self.counts,
            self.one,
            self.place,
            self.raw_bias,
            self.compressed,
            self.token_columns,
            self._even_columns,
            self.blocks,
            self.int4_blocks,
        ]
        kinds = [kind for pair in self.kinds.values() for kind in pair if kind is not None]
        return own + [part for kind in kinds for part in vars(kind).values() if part is not None]

    def write(self, ledger: TokenLedger, table: BlockTable, num_sinks: int) -> None:
        """Takes over what the settled `ledger` says of a raw part that begins with room for `num_sinks` sinks.

        Args:
            table: the blocks of each row.
        """
        behind = num_sinks + ledger.tail_width
        num_pending = ledger.columns - ledger.merged
        bias = torch.full((self.batch_size, self.num_raw), -torch.inf)
        for row, compressed in enumerate(ledger.compressed):
            bias[row, : num_sinks if compressed else 0] = 0
            bias[row, num_sinks : num_sinks + ledger.tail_lengths[row]] = 0
            pending = slice(num_pending)
            if ledger.row_columns is not None:
                columns = ledger.row_columns[row]
                pending = columns[columns >= ledger.merged] - ledger.merged
            bias[row, behind:][pending] = 0
        self.raw_bias.copy_(upload(bias, self.device))
        self.counts.copy_(upload(torch.tensor([ledger.columns, 0]), self.device))
        self.place.fill_(behind + num_pending)
        self.compressed.copy_(upload(torch.tensor(ledger.compressed, dtype=torch.int32), self.device))
        self._write_columns(ledger)
        self._write_slots(table)
        for stride, (references, others) in self.kinds.items():
            if others is not None:
                torch.div(self.compressed + stride - 1, stride, rounding_mode="floor", out=references.lengths)
                torch.sub(self.compressed, references.lengths, out=others.lengths)
                for kind in (references, others):
                    kind.columns.copy_(self.token_columns.index_select(1, kind.offsets))

    def _write_columns(self, ledger: TokenLedger) -> None:
        if ledger.row_columns is None:
            # the batch before may have been padded
            self.token_columns.copy_(self._even_columns)
            return
        sinks, most = self.num_sink_tokens, max(ledger.compressed)
        columns = torch.zeros(self.batch_size, most, dtype=torch.int32)
        for row, count in enumerate(ledger.compressed):
            columns[row, :count] = ledger.row_columns[row][sinks : sinks + count]
        self.token_columns[:, :most].copy_(upload(columns, self.device))

    def _write_slots(self, table: BlockTable) -> None:
        numbers = table.numbers(self.device)
        self.blocks[:, : numbers.shape[1]].copy_(numbers)
        self.int4_blocks.copy_(slots_of(self.blocks, self.block_size // INT4_GROUP))
        for stride, kinds in self.kinds.items():
            num_references = self.block_size // stride
            sizes = num_references, self.block_size - num_references
            for kind, records in zip(kinds, sizes, strict=True):
                if kind is not None:
                    kind.slot_map.copy_(slots_of(self.blocks, records))

    def note(self, mask: torch.Tensor | None) -> None:
        """In a step: the token that comes is there, unless `mask` `[batch, 1, 1, 1]` bool says that it is padding."""
        new, self._new = torch.zeros_like(self.raw_bias[:, :1]), self.one
        if mask is not None:
            is_padding = ~mask[:, 0, 0, -1:].expand(self.batch_size, -1)
            new = new.masked_fill(is_padding, -torch.inf)
            self._new = torch.cat([self.one[:1], is_padding.sum().view(1)])
        self.raw_bias.index_copy_(1, self.place, new)

    def move_on(self) -> None:
        """In a step: all layers have the token."""
        self.counts.add_(self._new)
        self.place.add_(1)
        self.chosen = self._new = None


def keep_address(tensor: torch.Tensor) -> None:
    """Says that a recorded graph may read `tensor` where it is; another cache's is recorded anew, not compiled."""
    torch._dynamo.mark_static_address(tensor, guard=False)
