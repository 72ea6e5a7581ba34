"""Which blocks share storage: every block is a leader, or a member of one leader within a bounded error.

A member's keys and its values, as directions from the mean, must both be close enough to its leader's, of which no
leader is a member in turn: the bound holds for every block against what is stored. Leaders are chosen among blocks in
an order of what they hold, so the order of rows in a batch decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from . import dispatch

# new blocks compared with each other at once, and leaders with these
TILE = 2048
# tiles whose directions are kept
RECENT = 2
# blocks whose numbers are multiplied at once
WIDE = 1024
SCOPES = ("all", "batch", "intra", "same_index", "none")
# columns of a home: group, number of the block in its row, what the row was fed up to it; then who held it when stored.
# The number is less than 0 (`~number`) of a block whose first tokens were read from one that a crop has cut: with an
# error of their own, it shares with none
GROUP, INDEX, HISTORY, REQUESTS = range(4)
# requests in a column
REQUEST_BITS = 62


@dataclass(frozen=True)
class Blocks:
    """Blocks to compare.

    Attributes:
        tokens: `[n, block_size, width]` floating, keys of all heads and then values.
        homes: `[n, columns]` int64.
        mean: `[width]` float32.
        key_width: columns of keys.
    """

    tokens: torch.Tensor
    homes: torch.Tensor
    mean: torch.Tensor
    key_width: int
    _recent: list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def directions(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as directions, to be multiplied: on a GPU in the dtype of the blocks.

        The last ones are kept for who asks for the same tensor of places again.
        """
        for known, directions in self._recent:
            if known is places:
                return directions
        dtype = self.tokens.dtype if self.tokens.is_cuda else torch.float32
        directions = dispatch.block_directions(self.tokens, places, self.mean, self.key_width, dtype)
        self._recent[:] = [*self._recent[1 - RECENT :], (places, directions)]
        return directions


def content_order(tokens: torch.Tensor, homes: torch.Tensor) -> torch.Tensor:
    """Places `[n]` of blocks in an order of what they hold; of equal ones, of what their rows were fed."""
    if tokens.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=tokens.device)
    numbers = tokens.flatten(1)
    bits = numbers.view(torch.int32 if numbers.shape[1] * numbers.itemsize % 4 == 0 else torch.int16)
    factors = _factors(bits.shape[1], tokens.device)
    keys = [(part * factors).sum(1) for part in bits.split(WIDE)]
    order = homes[:, HISTORY].argsort(stable=True)
    return order[torch.cat(keys)[order].argsort(stable=True)]


@lru_cache(maxsize=4)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (count,), generator=generator).int().to(device)


def may_share(own: torch.Tensor, others: torch.Tensor, scope: str) -> torch.Tensor:
    """Whether blocks with these homes may share storage, bool `[own, others]`."""
    groups = [torch.where(homes[:, INDEX] < 0, none, homes[:, GROUP]) for homes, none in ((own, -1), (others, -2))]
    allowed, own, others = groups[0][:, None] == groups[1], own[:, None], others[None]
    if scope == "all":
        return allowed
    requests, other_requests = own[..., REQUESTS:], others[..., REQUESTS:]
    if scope == "intra":
        return allowed & ((requests & other_requests) != 0).any(-1)
    # of one request only, the same
    is_one = ((requests & (requests - 1)) == 0).all(-1) & ((requests != 0).sum(-1) == 1)
    allowed = allowed & ~(is_one & (requests == other_requests).all(-1))
    return allowed & (own[..., INDEX] == others[..., INDEX]) if scope == "same_index" else allowed


def similarities(own: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cosines `[own, others]` float32, the smaller of keys and values."""
    keys, values = ((a @ b.mT).float() for a, b in zip(own, others, strict=True))
    return torch.minimum(keys, values)


def assign(
    blocks: Blocks, leaders: torch.Tensor, tiles: Sequence[torch.Tensor], scope: str, least: torch.Tensor
) -> torch.Tensor:
    """The leader of each new block, itself if it is one: places in `blocks`.

    Args:
        leaders: places of the leaders there are, in the order of `content_order` of the time when they were stored.
        tiles: places of new blocks in the order of `content_order`.
        least: cosine that is close enough, a number on the device.
    """
    found = []
    for some in tiles:
        own, homes = blocks.directions(some), blocks.homes[some]
        best, place = torch.full(some.shape, -torch.inf, device=some.device), some
        for others in leaders.split(TILE) if len(leaders) else ():
            cosines = similarities(own, blocks.directions(others))
            cosines.masked_fill_(~may_share(homes, blocks.homes[others], scope), -torch.inf)
            value, at = cosines.max(1)
            best, place = torch.where(value > best, value, best), torch.where(value > best, others[at], place)
        is_open = ~(best >= least)
        cosines = similarities(own, own)
        # a product need not be as symmetric as what it stands for
        cosines = torch.minimum(cosines, cosines.mT)
        allowed = may_share(homes, homes, scope) & is_open & is_open[:, None]
        cosines = cosines.masked_fill_(~allowed, -torch.inf).fill_diagonal_(-torch.inf)
        heads = is_open & first_independent(cosines >= least)
        value, at = cosines.masked_fill_(~heads, -torch.inf).max(1)
        place = torch.where(is_open, torch.where(heads, some, some[at]), place)
        leaders = torch.cat([leaders, some[heads]])
        found.append(place)
    return torch.cat(found)


def first_independent(adjacent: torch.Tensor) -> torch.Tensor:
    """Of a symmetric bool `[n, n]`: who is chosen if all come in turn and one that is adjacent to a chosen one is not.

    In rounds: whoever has no earlier neighbour left is chosen, and its neighbours are out. In an order that has nothing
    to do with neighbours few rounds are needed.
    """
    chosen = torch.zeros(len(adjacent), dtype=torch.bool, device=adjacent.device)
    left, earlier = ~chosen, adjacent.tril(-1)
    while left.any():
        ready = left & ~(earlier & left).any(1)
        chosen |= ready
        left = left & ~ready & ~(adjacent & ready).any(1)
    return chosen
