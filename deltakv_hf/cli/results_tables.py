"""Tables of the results page, Markdown, each made of stored rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..evaluation.candidates import OURS, REFERENCE
from ..evaluation.intervals import bootstrap_difference
from ..evaluation.standings import (
    COMPRESSED,
    FEWEST_PAIRS,
    QUALITIES,
    STORED,
    Claim,
    Duel,
    duels_at_equal_bytes,
    good,
    share,
    unmatched,
)

BUNDLED = "smollm2-135m-instruct-"


def short(label: str) -> str:
    """A compressor that comes with the package by its ratio alone, and a joint cache by what codes its blocks."""
    return label.replace(BUNDLED, "").replace("cache=joint, residual=", "joint ")


def number(value: float, form: str) -> str:
    """The number without a zero before its point."""
    return format(value, form).replace("0.", ".", 1) if abs(value) < 1 else format(value, form)


def percent(value: float, digits: int = 1, sign: str = "") -> str:
    """A share; with "+" for a sign, a change."""
    return f"{value:{sign}.{digits}%}".replace("%", " %")


def table(headers: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [f"| {' | '.join(headers)} |", f"| --- |{' ---: |' * (len(headers) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def name(row: dict) -> str:
    """A row's cache; ours in bold."""
    label = short(row["cache"])
    return f"**{label}**" if row["role"] == OURS else label


def by_bytes(rows: list[dict]) -> list[dict]:
    """The full cache first, then from the most bytes to the fewest."""
    return sorted(good(rows), key=lambda row: (row["role"] != REFERENCE, -share(row)))


def shares(row: dict) -> list[str]:
    """Of the whole cache, and of compressed tokens alone where these are known."""
    return [percent(row[STORED]), percent(row[COMPRESSED]) if COMPRESSED in row else ""]


SHARES = ["whole cache", "compressed tokens"]


def fidelity_table(rows: list[dict]) -> str:
    """KL, same top token, NLL; one line for each cache."""
    lines = []
    for row in by_bytes(rows):
        f, windows = row["figures"], row["figures"]["per_window"]
        change = percent(f["nll_change"], 3, "+")
        if len(windows) >= FEWEST_PAIRS:
            ends = bootstrap_difference([w["full_nll"] for w in windows], [w["nll"] for w in windows])
            change += " ({} to {})".format(*(percent(end / f["full_nll"], 2, "+") for end in ends))
        lines.append(
            [
                name(row),
                *shares(row),
                f"{number(f['kl'], '.5f')} ± {number(f['kl_se'], '.5f')}",
                percent(f["top1"], 2),
                change,
            ]
        )
    return table(["cache", *SHARES, "KL, nats", "same top token", "change of NLL (95 %)"], lines)


def split_table(rows: list[dict], groups: Callable[[dict], dict[str, list[dict]]]) -> str:
    """Three figures of each cache in each group: KL, same top token, change of NLL; not of one that has no groups."""
    split = [(row, found) for row in by_bytes(rows) if (found := groups(row["figures"]))]
    heads = list(split[0][1]) if split else []
    lines = [[name(row), percent(row[STORED]), *(_three(found[head]) for head in heads)] for row, found in split]
    return table(["cache", SHARES[0], *heads], lines)


def _three(parts: list[dict]) -> str:
    kl, top1, nll, full = (sum(part[key] for part in parts) / len(parts) for key in ("kl", "top1", "nll", "full_nll"))
    return f"{number(kl, '.4f')}<br>{percent(top1)}<br>{number(100 * (nll / full - 1), '+.2f')} %"


def by_domain(figures: dict) -> dict[str, list[dict]]:
    """Windows by the name of their text."""
    return _grouped((window["text"], window) for window in figures["per_window"])


def by_distance(figures: dict) -> dict[str, list[dict]]:
    """Bins of all windows by how far behind the context."""
    bins = (part for window in figures["per_window"] for part in window["by_distance"])
    return _grouped((f"{part['first']}–{part['last']}", part) for part in bins)


def _grouped(pairs: Iterable[tuple[str, dict]]) -> dict[str, list[dict]]:
    groups = {}
    for key, part in pairs:
        groups.setdefault(key, []).append(part)
    return groups


def generation_table(rows: list[dict]) -> str:
    """What each cache wrote, read by the full cache."""
    lines = []
    for row in by_bytes(rows):
        f, prompts = row["figures"], row["figures"]["per_prompt"]
        change = number(f["nll"] - f["full_nll"], "+.3f")
        if len(prompts) >= FEWEST_PAIRS:
            ends = bootstrap_difference([p["full_nll"] for p in prompts], [p["nll"] for p in prompts])
            change += " ({} to {})".format(*(number(end, "+.3f") for end in ends))
        lines.append(
            [
                name(row),
                *shares(row),
                number(f["nll"], ".3f"),
                "" if row["role"] == REFERENCE else change,
                f"{f['agreement']:.0f}",
                percent(f["repetition"]),
            ]
        )
    heads = ["NLL of its text", "minus that of the full cache's text (95 %)", "tokens that agree", "repeated"]
    return table(["cache", *SHARES, *heads], lines)


def task_table(rows: list[dict]) -> str:
    """EM of all tasks at one length, below it the change of the answers' NLL."""
    tasks = list(dict.fromkeys(row["figures"]["task"] for row in good(rows)))
    caches = {}
    for row in by_bytes(rows):
        caches.setdefault(row["cache"], []).append(row)
    lines = []
    for held in caches.values():
        cells = {row["figures"]["task"]: _task_cell(row) for row in held}
        lines.append([name(held[0]), *shares(held[0]), *(cells.get(task, "") for task in tasks)])
    return table(["cache", *SHARES, *tasks], lines)


def _task_cell(row: dict) -> str:
    f = row["figures"]
    if row["role"] == REFERENCE:
        return f"{number(f['em'], '.2f')}<br>{number(f['nll'], '.3f')}"
    low, high = f["em_change_interval"]
    star = "" if low <= 0 <= high else "\\*"
    change, error = number(f["nll_change"], "+.3f"), number(f["nll_change_se"], ".3f")
    return f"{number(f['em'], '.2f')}{star}<br>{change} ± {error}"


def claim_table(found: list[Claim]) -> str:
    """One line for each peer: what was claimed, how every figure went, and whether it holds."""
    heads = [quality.name for quality in QUALITIES]
    lines = []
    for claim in found:
        counts = []
        for head in heads:
            level = claim.count("level", head) + claim.count("too few", head)
            # not broken in a narrow column
            counts.append(f"{claim.count('ours', head)}\u00a0·\u00a0{level}\u00a0·\u00a0{claim.count('peer', head)}")
        ours = ", ".join(dict.fromkeys(short(d.ours["cache"]) for d in claim.duels))
        verdict = claim.verdict if claim.duels else "no cache of ours is so small"
        lines.append([f"{claim.peer}, ours at ≤ {percent(claim.limit)}", ours, *counts, f"**{verdict}**"])
    return table(["against", "ours", *heads, "claim"], lines)


def duel_table(rows: list[dict]) -> str:
    """Every peer against ours of no more bytes: how often who is ahead."""
    lines, made = [], {}
    for one in duels_at_equal_bytes(rows):
        made.setdefault(one.peer["cache"], []).append(one)
    for peer, duels in made.items():
        least, most = (percent(pick(share(d.peer) for d in duels)) for pick in (min, max))
        ours = ", ".join(dict.fromkeys(short(d.ours["cache"]) for d in duels))
        counts = [str(sum(d.verdict == v for d in duels)) for v in ("ours", "level", "too few", "peer")]
        counts[-1] = counts[-1] if counts[-1] == "0" else f"**{counts[-1]}**"
        lines.append([peer, f"{least} to {most}", ours, *counts])
    return table(["peer", "its bytes", "ours", "ours ahead", "level", "too few to tell", "peer ahead"], lines)


def ahead(rows: list[dict]) -> list[str]:
    """A sentence for each figure in which a peer beats ours of no more bytes beyond the interval; or that none does."""
    duels = duels_at_equal_bytes(rows)
    found = [_sentence(d) for d in duels if d.verdict == "peer"]
    told = sum(d.verdict != "too few" for d in duels)
    if not told:
        return [f"No figure has the {FEWEST_PAIRS} pairs that tell who is ahead"]
    return found or [f"No peer beats ours at equal bytes beyond its interval, in {told} figures with enough pairs"]


def _sentence(d: Duel) -> str:
    low, high = (number(value, "+.4f") for value in d.interval)
    return (
        f"**{d.peer['cache']} ({percent(share(d.peer))}) beats {short(d.ours['cache'])} ({percent(share(d.ours))}) in "
        f"{d.quality.name} of {d.measurement}: {number(d.change, '+.4f')} ({low} to {high}), {d.pairs} pairs**"
    )


def smaller(rows: list[dict]) -> list[str]:
    """A sentence for each peer that takes fewer bytes than all of ours somewhere: nothing of ours is compared there."""
    found = {}
    for row in unmatched(rows):
        found.setdefault(row["cache"], []).append(row["measurement"])
    return [f"{peer} takes fewer bytes than any of ours in {', '.join(names)}" for peer, names in found.items()]
