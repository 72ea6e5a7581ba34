"""One layer of a `JointEncodedCache`: a pool of blocks, which of them each row holds, and the newest tokens raw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .compressor import TokenStore
from .compressor.coded_blocks import CodedBlockCoder
from .compressor.fused_blocks import FusedStore
from .errors import CacheStateError
from .layer import DeltaKVLayer
from .layout import Crop, Flush, FlushGroup, Layout
from .rate_distortion import RateDistortion
from .reading import StateReader
from .state import LayerState


class JointLayer(DeltaKVLayer):
    """A cache layer for full attention whose ledger is a `JointLedger`.

    Attributes:
        plans: by group, what was predicted for the blocks that it had first, and what has come of it.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.plans: dict[int, RateDistortion] = {}

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.plans = {}

    def _join(self, keys, values, group: FlushGroup, rows, start: int, stop: int) -> torch.Tensor:
        if self.form is not None or isinstance(self.compressor, CodedBlockCoder):
            return super()._join(keys, values, group, rows, start, stop)
        # as they are: what has more bits than float32 keeps them
        return torch.cat([part.transpose(1, 2).flatten(2) for part in (keys, values)], dim=-1)

    def _reader(self, state: LayerState, layout: Layout) -> StateReader:
        reader = super()._reader(state, layout)
        if not isinstance(self.compressor, CodedBlockCoder):
            return reader
        # a compressor's own ways of reading want its own store
        state = replace(state, store=self.compressor.gathered(state.store))
        return replace(reader, state=state, compressor=self.compressor.inner)

    def _coded(self, store, group: FlushGroup, read):
        return self.compressor.append(store, group.rows, group.start, group.stop, read, group.new_blocks)

    def _flushed(self, state: LayerState, flush: Flush) -> LayerState:
        before, state = state.store, super()._flushed(state, flush)
        store, homes = state.store, flush.arrangement.homes
        if homes is not None and len(homes):
            store, self.plans = self.compressor.fused(store, len(before.blocks), homes, self.plans)
        return replace(state, store=store.arranged(flush.arrangement))

    def select(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Chooses rows: raw tensors by `change`, blocks as the ledger has arranged them."""
        if self.is_initialized:
            raw = {name: change(part) for name, part in self.state.raw().items()}
            self.state = replace(self.state, **raw, store=self.state.store.arranged(self.ledger.arrangement))

    def crop_to(self, crop: Crop) -> None:
        """Forgets the newest columns; blocks that no row holds any more are given up."""
        self._handed = None
        if self.is_initialized:
            arrangement = self.ledger.arrangement
            self.state = self.state.crop(crop, lambda store, counts: store.arranged(arrangement))

    def expected_store(self, store: TokenStore) -> TokenStore:
        """See `DeltaKVLayer.expected_store`."""
        table = self.ledger.block_table()
        if not torch.equal(store.block_table, table):
            raise CacheStateError(
                f"layer {self.layer_idx} of the saved cache must hold the blocks that its ids say, got others: it was "
                "written by another version. Save the cache again."
            )
        if not isinstance(store, FusedStore):
            return self.compressor.of_blocks(self.ledger.num_blocks, table)
        if any(self.ledger.compressed) and not torch.equal(store.row_groups, self.ledger.row_groups()):
            raise CacheStateError(
                f"layer {self.layer_idx} of the saved cache must hold the groups of its rows, got others: it was "
                "written by another version. Save the cache again."
            )
        num_leaders = store.blocks.shape[0]
        if set(store.leader.tolist()) != set(range(num_leaders)):
            raise CacheStateError(
                f"layer {self.layer_idx} of the saved cache must hold the leaders that its slots say, got others: it "
                "was written by another version. Save the cache again."
            )
        return self.compressor.of_blocks(self.ledger.num_blocks, table, num_leaders)
