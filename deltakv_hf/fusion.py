"""Which blocks share storage: every block is a leader, or a member of one leader within a bounded error.

A member's keys and its values, as directions from the mean, must both be close enough to its leader's, of which no
leader is a member in turn: the bound holds for every block against what is stored. Leaders are chosen among blocks in
an order of what they hold, so the order of rows in a batch decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# new blocks compared with each other at once, and leaders with these
TILE = 2048
# blocks whose numbers are widened at once
WIDE = 256
SCOPES = ("all", "batch", "intra", "same_index", "none")
# columns of a home: group, number of the block in its row, what the row was fed up to it; then who held it when stored
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

    def pick(self, places: torch.Tensor) -> Blocks:
        """Some of them."""
        return Blocks(self.tokens[places], self.homes[places], self.mean, self.key_width)

    def centred(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[len(places), numbers]` float32 less the mean."""
        apart = self.tokens[places].float() - self.mean
        return apart[..., : self.key_width].flatten(1), apart[..., self.key_width :].flatten(1)

    def directions(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at length 1, to be multiplied: on a GPU in the dtype of the blocks."""
        dtype = self.tokens.dtype if self.tokens.is_cuda else torch.float32
        parts = [[F.normalize(part).to(dtype) for part in self.centred(some)] for some in places.split(WIDE)]
        return tuple(torch.cat(kind) for kind in zip(*parts, strict=True))


def content_order(tokens: torch.Tensor, homes: torch.Tensor) -> torch.Tensor:
    """Places `[n]` of blocks in an order of what they hold; of equal ones, of what their rows were fed."""
    if tokens.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=tokens.device)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (tokens[0].numel(),), generator=generator).to(tokens.device)
    whole = {4: torch.int32, 2: torch.int16, 8: torch.int64}[tokens.itemsize]
    keys = [(part.flatten(1).view(whole).long() * factors).sum(1) for part in tokens.split(WIDE)]
    order = homes[:, HISTORY].argsort(stable=True)
    return order[torch.cat(keys)[order].argsort(stable=True)]


def may_share(own: torch.Tensor, others: torch.Tensor, scope: str) -> torch.Tensor:
    """Whether blocks with these homes may share storage, bool `[own, others]`."""
    own, others = own[:, None], others[None]
    allowed = own[..., GROUP] == others[..., GROUP]
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


def assign(blocks: Blocks, leaders: torch.Tensor, new: torch.Tensor, scope: str, least: torch.Tensor) -> torch.Tensor:
    """The leader of each new block, itself if it is one: `[len(new)]` places in `blocks`.

    Args:
        leaders: places of the leaders there are, in the order of `content_order` of the time when they were stored.
        new: places of new blocks in the order of `content_order`.
        least: cosine that is close enough, a number on the device.
    """
    found = []
    for some in new.split(TILE) if len(new) else ():
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
    return torch.cat(found) if found else new


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


def factors(
    blocks: Blocks, members: torch.Tensor, leaders: torch.Tensor, read: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What members' leaders are multiplied by, and the errors that remain.

    Args:
        members, leaders: places `[n]`.
        read: function `(tokens, scale, mean)` that reads blocks, as a cache does.

    Returns:
        `[n, 2]` float32 of keys and values; and `[n, 2]` float64 errors relative to the distance from the mean.
    """
    scales, errors = [], []
    if len(members) == 0:
        return blocks.mean.new_empty(0, 2), blocks.mean.new_empty(0, 2).double()
    for some, others in zip(members.split(WIDE), leaders.split(WIDE), strict=True):
        own, theirs = blocks.centred(some), blocks.centred(others)
        squares = [(part * part).sum(1) for part in theirs]
        scale = [(a * b).sum(1) / square for a, b, square in zip(own, theirs, squares, strict=True)]
        scales.append(torch.stack(scale, dim=1))
        missing = read(blocks.tokens[others], scales[-1], blocks.mean) - blocks.tokens[some].float()
        split = missing[..., : blocks.key_width].flatten(1), missing[..., blocks.key_width :].flatten(1)
        norms = ((gone.double().norm(dim=1), part.double().norm(dim=1)) for gone, part in zip(split, own, strict=True))
        errors.append(torch.stack([gone / part for gone, part in norms], dim=1))
    return torch.cat(scales), torch.cat(errors)
