"""Whole blocks of tokens of which similar ones share storage, each read as its leader times a factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import dispatch
from ..fusion import GROUP, REQUESTS, TILE, Blocks, assign, content_order, may_share, similarities
from ..hf_compat import upload
from ..layout import Arrangement
from ..rate_distortion import SAMPLE, RateDistortion, predict
from .blocks import BlockCoder, BlockStore

# fewer blocks of a group say nothing about what similarity is worth: they wait for more
LEAST_BLOCKS = 16
# a cosine that nothing reaches
NEVER = 2.0


@dataclass(frozen=True)
class FusedStore(BlockStore):
    """A pool of leaders, and what is read for each slot of a row.

    Attributes:
        blocks: `[leaders, block_size, width]`.
        row_groups: `[batch]` int64.
        leader: `[slots]` int32, where in `blocks` a slot's leader stands.
        scale: `[slots, 2]` float32, factor of its keys and of its values; 1 of a leader itself.
        homes: `[leaders, columns]` int64, see `fusion`.
        mean: `[groups, width]` float32 that directions start from, 0 until a group has enough blocks.
        least: `[groups]` float64, cosine that is close enough to share; NaN until then.
    """

    row_groups: torch.Tensor
    leader: torch.Tensor
    scale: torch.Tensor
    homes: torch.Tensor
    mean: torch.Tensor
    least: torch.Tensor

    def arranged(self, arrangement: Arrangement) -> FusedStore:
        """After slots were given up and rows chosen anew; leaders that nobody reads go."""
        device, leader, scale = self.blocks.device, self.leader, self.scale
        rows = upload(arrangement.block_table, device), upload(arrangement.row_groups, device)
        if arrangement.kept is None:
            return replace(self, block_table=rows[0], row_groups=rows[1])
        kept = upload(arrangement.kept, device)
        used, leader = leader[kept].unique(return_inverse=True)
        used, blocks, homes = used.long(), self.blocks, self.homes
        if len(used) < len(blocks):
            blocks, homes = blocks.index_select(0, used), homes.index_select(0, used)
        else:
            leader = self.leader[kept]
        return FusedStore(blocks, *rows, leader.int(), scale[kept], homes, self.mean, self.least)


class FusingCoder(BlockCoder):
    """Stores tokens in blocks that share storage within a bounded error.

    Args:
        block_size: tokens of a block.
        width, key_width, dtype: of a token, and of its keys.
        layer_idx: number of the decoder layer.
        scope: which blocks may share, one of `fusion.SCOPES`.
        max_relative_error, target_ratio: see `JointEncodingConfig`.
        num_groups: of rows.
        num_columns: of a home.
    """

    def __init__(
        self,
        block_size: int,
        width: int,
        key_width: int,
        dtype: torch.dtype,
        layer_idx: int,
        scope: str,
        max_relative_error: float,
        target_ratio: float | None,
        num_groups: int,
        num_columns: int = REQUESTS + 1,
    ):
        super().__init__(block_size, width, dtype)
        self.key_width, self.layer_idx, self.scope = key_width, layer_idx, scope
        self.max_relative_error, self.target_ratio = max_relative_error, target_ratio
        self.num_groups, self.num_columns = num_groups, num_columns

    def empty(self, batch_size: int, device: torch.device, num_tokens: int = 0) -> FusedStore:
        """A store of rows of `num_tokens` tokens that have nothing in common."""
        held = super().empty(batch_size, device, num_tokens)
        row_groups = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return self._of(held, held.blocks.shape[0], row_groups)

    def of_blocks(self, num_blocks: int, block_table: torch.Tensor, num_leaders: int = 0) -> FusedStore:
        """A store without data, on the meta device."""
        held = super().of_blocks(num_leaders, block_table)
        row_groups = torch.zeros(len(block_table), dtype=torch.int64, device="meta")
        return self._of(held, num_blocks, row_groups)

    def _of(self, held: BlockStore, num_slots: int, row_groups: torch.Tensor) -> FusedStore:
        device, num_leaders = held.blocks.device, held.blocks.shape[0]
        return FusedStore(
            held.blocks,
            held.block_table,
            row_groups,
            torch.arange(num_slots, dtype=torch.int32, device=device),
            torch.ones(num_slots, 2, device=device),
            torch.zeros(num_leaders, self.num_columns, dtype=torch.int64, device=device),
            torch.zeros(self.num_groups, self.width, device=device),
            torch.full((self.num_groups,), torch.nan, dtype=torch.float64, device=device),
        )

    def append(self, store: FusedStore, *group, **new) -> FusedStore:
        """See `BlockCoder.append`; each new block is its own leader until `fused`."""
        appended = super().append(store, *group, **new)
        count = appended.blocks.shape[0] - store.blocks.shape[0]
        places = torch.arange(store.blocks.shape[0], appended.blocks.shape[0], device=store.leader.device)
        leader = torch.cat([store.leader, places.int()])
        return replace(appended, leader=leader, scale=torch.cat([store.scale, store.scale.new_ones(count, 2)]))

    def tokens_of(self, store: FusedStore, slots: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
        """See `BlockCoder.tokens_of`."""
        mean = store.mean[store.row_groups[rows]][:, None]
        return self.read(store.blocks[store.leader[slots]], store.scale[slots], mean)

    def read(self, blocks: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Leaders `[..., block_size, width]` times factors `[..., 2]` from mean `[..., width]`, float32.

        Times 1 they are what is stored, bit for bit.
        """
        tokens = blocks.float()
        share = torch.repeat_interleave(
            scale, torch.tensor([self.key_width, self.width - self.key_width], device=scale.device), dim=-1
        )
        return tokens * share.unsqueeze(-2) + (mean * (1 - share)).unsqueeze(-2)

    def fused(
        self, store: FusedStore, num_old: int, homes: torch.Tensor, plans: dict[int, RateDistortion]
    ) -> tuple[FusedStore, dict[int, RateDistortion]]:
        """Gives up new blocks that are close enough to another one.

        Args:
            store: with new blocks behind `num_old` leaders.
            homes: `[new, columns]` int64 on the CPU.
            plans: of groups, as made so far.

        Returns:
            The smaller store; and `plans` with those of groups that have had enough blocks for the first time.
        """
        device, num_blocks = store.blocks.device, store.blocks.shape[0]
        held = store.homes if num_old else upload(homes[:0], device)
        store = replace(store, homes=torch.cat([held, upload(homes, device)]))
        leader_of, scale = torch.arange(num_blocks, device=device), torch.ones(num_blocks, 2, device=device)
        order = [leader_of[:num_old].clone()]
        for group in sorted(set(homes[:, GROUP].tolist())):
            places = (store.homes[:, GROUP] == group).nonzero().flatten()
            some = store.blocks if len(places) == num_blocks else store.blocks[places]
            places = places[content_order(some, store.homes[places])]
            old, new = (places[places < num_old], places[places >= num_old]) if num_old else (places[:0], places)
            order.append(new)
            is_planned = group in plans or not store.least[group].isnan()
            if self.scope == "none" or (not is_planned and len(places) < LEAST_BLOCKS):
                continue
            if not is_planned:
                old, new = places[:0], places
            if len(new) == 0:
                continue
            tiles = new.split(TILE)
            if is_planned:
                blocks = Blocks(store.blocks, store.homes, store.mean[group], self.key_width)
            else:
                store, blocks, plan = self._planned(store, group, places, tiles)
            leaders = assign(blocks, old.sort().values, tiles, self.scope, store.least[group])
            at = (leaders != new).nonzero().flatten()
            members, leaders = new[at], leaders[at]
            scales, errors = dispatch.compare_blocks(store.blocks, members, leaders, blocks.mean, self.key_width)
            errors = errors.amax(1).double()
            stays = (errors * errors <= 1 - store.least[group].square()).nonzero().flatten()
            if not is_planned:
                plan = _achieved(plan, errors[stays], len(places))
                plans = plans | {group: plan}
                if plan.is_left_alone:
                    store.least[group], stays = NEVER, stays[:0]
            members = members[stays]
            leader_of[members], scale[members] = leaders[stays], scales[stays]
        order = torch.cat(order)
        order = order[leader_of[order] == order]
        place_of = torch.empty_like(leader_of)
        place_of[order] = torch.arange(len(order), device=device)
        leader = store.leader.long()
        # an old member's own factor stays
        is_new = leader_of[leader] != leader
        return replace(
            store,
            blocks=store.blocks[order],
            homes=store.homes[order],
            leader=place_of[leader_of[leader]].int(),
            scale=torch.where(is_new[:, None], scale[leader], store.scale),
        ), plans

    def _planned(
        self, store: FusedStore, group: int, places: torch.Tensor, tiles: Sequence[torch.Tensor]
    ) -> tuple[FusedStore, Blocks, RateDistortion]:
        """The mean of a group and how close is close enough, from a sample of `places`, in the order of contents."""
        mean, least = store.mean.clone(), store.least.clone()
        # in the order of contents, which a sum depends on
        sums = store.blocks.sum(1, dtype=torch.float32)[places].sum(0)
        # what is not a number must not be read in every block
        mean[group] = torch.nan_to_num(sums / (len(places) * self.block_size), 0.0, 0.0, 0.0)
        blocks = Blocks(store.blocks, store.homes, mean[group], self.key_width)
        sample = places[:: -(-len(places) // SAMPLE)]
        own, homes, cosines = blocks.directions(sample), store.homes[sample], []
        for some in tiles:
            part = similarities(own, blocks.directions(some))
            is_out = ~may_share(homes, store.homes[some], self.scope) | (sample[:, None] == some)
            cosines.append(part.masked_fill(is_out, -torch.inf))
        aim = self.max_relative_error, self.target_ratio
        plan = predict(torch.cat(cosines, dim=1).nan_to_num(-torch.inf, neginf=-torch.inf), self.layer_idx, group, *aim)
        least[group] = (1 - plan.max_relative_error**2) ** 0.5
        return replace(store, mean=mean, least=least), blocks, plan


def _achieved(plan: RateDistortion, errors: torch.Tensor, num_blocks: int) -> RateDistortion:
    """What has come of a plan; a layer is to be left alone if half its matches are what chance gives too."""
    if len(errors) == 0:
        return plan
    median, mean = torch.stack([errors.median(), errors.mean()]).tolist()
    if max(0.0, 1 - median**2) ** 0.5 <= plan.chance_cosine:
        return replace(plan, is_left_alone=True)
    return replace(plan, achieved_kept=1 - len(errors) / num_blocks, achieved_error=mean)
