"""Who is ahead of whom, worked out from stored rows: caches compared on the same windows, items and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .candidates import OURS, PEER
from .intervals import bootstrap_difference

STORED, COMPRESSED = "stored_share_16bit", "compressed_share_16bit"
# below so many pairs a bootstrap interval is too narrow to tell anything
FEWEST_PAIRS = 8


@dataclass(frozen=True)
class Quality:
    """A figure that caches are compared by.

    Attributes:
        name: of the figure.
        kind: of the measurements that have it.
        higher_is_better: its direction.
        read: the figure of each window, item or prompt, by what is the same for all caches.
    """

    name: str
    kind: str
    higher_is_better: bool
    read: Callable[[dict], dict[tuple, float]]


def _windows(name: str) -> Callable[[dict], dict[tuple, float]]:
    return lambda figures: {(w["text"], w["window"]): w[name] for w in figures["per_window"]}


def _items(name: str) -> Callable[[dict], dict[tuple, float]]:
    return lambda figures: {(item["seed"], item["item"]): float(item[name]) for item in figures["per_item"]}


def _prompts(name: str) -> Callable[[dict], dict[tuple, float]]:
    return lambda figures: {(number,): one[name] for number, one in enumerate(figures["per_prompt"])}


QUALITIES = (
    Quality("KL", "fidelity", False, _windows("kl")),
    Quality("NLL", "fidelity", False, _windows("nll")),
    Quality("EM", "task", True, _items("correct")),
    Quality("answer NLL", "task", False, _items("nll")),
    Quality("NLL of what it wrote", "generation", False, _prompts("nll")),
)


@dataclass(frozen=True)
class Duel:
    """A peer against a cache of ours in one figure of one measurement.

    Attributes:
        measurement, quality: what is compared.
        peer, ours: the rows.
        change: mean of the peer's figure minus that of ours.
        interval: its 95 % interval, of pairs drawn again.
        pairs: windows, items or prompts.
        verdict: "peer" or "ours" is ahead beyond the interval, "level", or "too few" pairs.
    """

    measurement: str
    quality: Quality
    peer: dict
    ours: dict
    change: float
    interval: tuple[float, float]
    pairs: int
    verdict: str


def duel(quality: Quality, ours: dict, peer: dict) -> Duel:
    """Compares two rows of the same measurement."""
    own, other = (quality.read(row["figures"]) for row in (ours, peer))
    shared = sorted(own.keys() & other.keys())
    before, after = [own[key] for key in shared], [other[key] for key in shared]
    low, high = bootstrap_difference(before, after)
    change = sum(after) / len(after) - sum(before) / len(before)
    if len(shared) < FEWEST_PAIRS:
        verdict = "too few"
    elif low <= 0 <= high:
        verdict = "level"
    else:
        verdict = "peer" if (low > 0) == quality.higher_is_better else "ours"
    return Duel(ours["measurement"], quality, peer, ours, change, (low, high), len(shared), verdict)


def good(rows: Iterable[dict]) -> list[dict]:
    """Rows of what could be measured."""
    return [row for row in rows if "error" not in row]


def share(row: dict, region: str = STORED) -> float:
    """Bytes over those of a dense 16-bit cache; of a cache that tells no compressed tokens apart, of all of it."""
    return row.get(region, row[STORED])


def largest_within(rows: list[dict], limit: float, region: str = STORED) -> dict | None:
    """The row that takes the most bytes up to `limit`: chosen by its bytes alone, whatever its figures are."""
    within = [row for row in rows if share(row, region) <= limit]
    return max(within, key=lambda row: share(row, region), default=None)


def duels_at_equal_bytes(rows: list[dict]) -> list[Duel]:
    """Every peer in every figure against the cache of ours that takes the most bytes, but no more than the peer.

    Where the peer is smaller than all of ours there is no duel.
    """
    found, rows = [], good(rows)
    for peer in (row for row in rows if row["role"] == PEER):
        same = [row for row in rows if row["role"] == OURS and row["measurement"] == peer["measurement"]]
        ours = largest_within(same, share(peer))
        if ours is not None:
            found += [duel(q, ours, peer) for q in QUALITIES if q.kind == peer["settings"]["kind"]]
    return found


def unmatched(rows: list[dict]) -> list[dict]:
    """Rows of peers that take fewer bytes than all of ours in the same measurement."""
    met = {(d.peer["cache"], d.measurement) for d in duels_at_equal_bytes(rows)}
    return [r for r in good(rows) if r["role"] == PEER and (r["cache"], r["measurement"]) not in met]


@dataclass(frozen=True)
class Claim:
    """That a cache of ours which takes at most `limit` of dense a compressed token is better than a peer.

    Attributes:
        peer: its name.
        limit: share of a dense 16-bit cache that a compressed token may take.
        duels: with the largest cache of ours within it, in every figure of every measurement.
    """

    peer: str
    limit: float
    duels: list[Duel]

    def count(self, verdict: str, quality: str | None = None) -> int:
        """Duels that ended so, in one figure or in all."""
        return sum(d.verdict == verdict and quality in (None, d.quality.name) for d in self.duels)

    @property
    def verdict(self) -> str:
        """It holds if the peer is ahead in nothing and ours is in KL; with too few pairs there it is open."""
        if self.count("peer"):
            return "does not hold"
        if self.count("ours", "KL"):
            return "holds"
        return "open" if self.count("too few", "KL") or not self.duels else "does not hold"


def limit_of(peer: str) -> float:
    """KIVI with 4 bits in groups of 32 spends the most bytes, and is the best of the peers."""
    return 0.15 if peer == "kivi4" else 0.125


def claims(rows: list[dict]) -> list[Claim]:
    """One for every peer that was measured."""
    rows = good(rows)
    found = {row["cache"]: [] for row in rows if row["role"] == PEER}
    for peer in (row for row in rows if row["role"] == PEER):
        same = [row for row in rows if row["role"] == OURS and row["measurement"] == peer["measurement"]]
        ours = largest_within(same, limit_of(peer["cache"]), COMPRESSED)
        if ours is not None:
            found[peer["cache"]] += [duel(q, ours, peer) for q in QUALITIES if q.kind == peer["settings"]["kind"]]
    return [Claim(peer, limit_of(peer), made) for peer, made in found.items()]
