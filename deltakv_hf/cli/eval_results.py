"""`deltakv eval results`: the page of tables, pictures and verdicts, made of stored rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.candidates import REFERENCE
from ..evaluation.peers import PEERS
from ..evaluation.standings import FEWEST_PAIRS, claims, good, share
from ..evaluation.suite import read_folder
from ..evaluation.tasks import TASKS
from ..files import write_atomically
from . import results_tables as tables
from .arguments import check_output
from .console import console
from .pareto import Mark, Panel, draw_panels
from .results_tables import short


@dataclass(frozen=True)
class Page:
    """What is written.

    Attributes:
        text: Markdown.
        pictures: functions that draw, by file name.
    """

    text: str
    pictures: dict[str, Callable[[], bytes]]


def run_results(folder: Path, out: Path) -> None:
    """Reads the rows, writes the page and the pictures beside it."""
    check_output("--out", out)
    rows = read_folder(folder)
    page = results_page(rows, folder, out)
    place = out.with_suffix("")
    for name, draw in page.pictures.items():
        write_atomically(place / name, draw())
    write_atomically(out, page.text.encode())
    console.print(f"{out}, {len(page.pictures)} pictures in {place}", markup=False, soft_wrap=True)


def results_page(rows: list[dict], folder: Path, out: Path) -> Page:
    """The page of `rows`, which came from `folder` and go to `out`."""
    measured = {}
    for row in rows:
        measured.setdefault(row["measurement"], []).append(row)
    measured = {name: held for name, held in sorted(measured.items(), key=_order) if good(held)}
    pictures = _pictures(measured)
    parts = [
        "# Who is best, measured",
        f"Made by `deltakv eval results {_typed(folder)} --out {_typed(out)}` from the JSON in there alone: "
        "change that, not this.",
        *_verdicts(rows),
        *_fidelity(measured, pictures, out),
        *_generation(measured),
        *_tasks(measured, pictures, out),
        *_how(rows),
    ]
    return Page("\n\n".join(parts) + "\n", pictures)


def _typed(path: Path) -> str:
    """As it is noted: of places on this machine the names alone."""
    return path.name if path.is_absolute() else path.as_posix()


def _order(item: tuple[str, list[dict]]) -> tuple:
    name, rows = item
    settings = rows[0]["settings"]
    if settings["kind"] == "task":
        return 2, settings["context"], list(TASKS).index(settings["task"])
    return ("fidelity", "generation").index(settings["kind"]), name


def _verdicts(rows: list[dict]) -> list[str]:
    parts = ["## In short"]
    found = claims(rows)
    if found:
        parts += [
            "Of each claim: a cache of ours whose compressed tokens take at most so much of a dense 16-bit cache is "
            "better than the peer. Ours is the largest within the limit, whatever its figures. Counts: ours ahead · "
            "level · peer ahead, over all measurements; ahead is what the 95 % interval of the paired difference "
            f"(bootstrap, {FEWEST_PAIRS} pairs or more) leaves no doubt of. A claim holds if the peer is ahead in "
            "nothing and ours in KL.",
            tables.claim_table(found),
            "### At equal bytes of the whole cache",
            "Every peer beside the largest cache of ours that takes no more bytes than it, in every figure of every "
            "measurement:",
            tables.duel_table(rows),
        ]
        lines = [*tables.ahead(rows), *tables.smaller(rows)]
        parts.append("\n".join(f"* {line}." for line in lines))
    return parts


def _fidelity(measured: dict, pictures: dict, out: Path) -> list[str]:
    parts = []
    for name, rows in measured.items():
        if rows[0]["settings"]["kind"] != "fidelity":
            continue
        s = good(rows)[0]["settings"]
        chunk = s["predict_chunk"]
        fed = f" in calls of {chunk}, which compresses them on their way" if chunk else " at once"
        domains = tables.by_domain(good(rows)[0]["figures"])
        windows = sum(map(len, domains.values()))
        parts += [
            f"## {'A long generation' if chunk else 'Predictions on text'}: {name}",
            f"{s['context']:,} tokens stored, the next {s['predict']:,} fed{fed}, windows: {windows}.",
            tables.fidelity_table(rows),
            *_shown(name, pictures, out),
        ]
        if len(domains) > 1:
            parts += ["By text: KL, same top token, change of NLL.", tables.split_table(rows, tables.by_domain)]
        parts += [
            "By tokens behind the context: KL, same top token, change of NLL.",
            tables.split_table(rows, tables.by_distance),
        ]
    return parts


def _generation(measured: dict) -> list[str]:
    parts = []
    for name, rows in measured.items():
        s = rows[0]["settings"]
        if s["kind"] != "generation":
            continue
        drawn = f"tokens drawn, the same draws for all (seed {s['seed']})"
        how = "the most likely token each time" if s["seed"] is None else drawn
        parts += [
            f"## Free generation: {name}",
            f"Every cache writes {s['new_tokens']:,} tokens behind {s['prompts']} prompts of {s['context']:,}, {how}, "
            "and the full cache reads them. Its own text is what the first line has. Tokens that agree: before the "
            "first that is not the full cache's; repeated: runs of four tokens that came before in the text. A text "
            "that repeats itself is a likely one: read both.",
            tables.generation_table(rows),
        ]
    return parts


def _tasks(measured: dict, pictures: dict, out: Path) -> list[str]:
    lengths = {}
    for rows in measured.values():
        if rows[0]["settings"]["kind"] == "task":
            lengths.setdefault(rows[0]["settings"]["context"], []).extend(rows)
    parts = ["## Tasks"] if lengths else []
    for length, rows in sorted(lengths.items()):
        counts = {r["figures"]["task"]: r["figures"]["items"] for r in good(rows)}
        items = ", ".join(f"{task} {count}" for task, count in counts.items())
        parts += [
            f"### Contexts of {length:,} tokens",
            "Share of right answers, a star where the 95 % interval of its paired change leaves out 0; below it the "
            f"change of the answers' NLL, ± its standard error (full cache: their NLL). Items: {items}.",
            tables.task_table(rows),
        ]
    shown = [name.removesuffix(".png") for name in pictures if name.startswith("task-")]
    return [*parts, *(part for name in shown for part in _shown(name, pictures, out))]


def _shown(name: str, pictures: dict, out: Path) -> list[str]:
    file = f"{name}.png"
    return [f"![{name}: quality against bytes]({out.stem}/{file})"] if file in pictures else []


def _how(rows: list[dict]) -> list[str]:
    fine = good(rows)
    kept = {}
    for row in fine:
        environment = row["environment"]
        line = ", ".join(f"{name} {value}" for name, value in environment.items())
        kept.setdefault((row["settings"]["model"], line), []).append(row["command"])
    lines = []
    for (model, line), commands in kept.items():
        lines.append(f"* {model}, {line}")
        lines += [f"    * `{command}`" for command in dict.fromkeys(commands)]
    texts = {name: checksum for row in fine for name, checksum in row["settings"]["texts"].items()}
    named = ", ".join(f"{name} ({checksum})" for name, checksum in texts.items())
    about = {row["cache"]: row["about"] for row in fine if row["about"] != row["cache"]}
    failed = [row for row in rows if "error" in row]
    absent = [peer for peer in PEERS if peer not in {row["cache"] for row in rows}]
    parts = [
        "## How it was measured",
        "Predictions are compared in the dtype below; bytes are those of a bfloat16 copy of the model whose cache read "
        "as many tokens: everything that a cache holds, sinks, windows, scales and tables included, over a dense one. "
        "docs/evaluation.md says how each measurement goes.",
        "\n".join(lines),
        f"Texts (sha256, beginning): {named}.",
    ]
    if about:
        parts.append("\n".join(f"* {label}: {what}" for label, what in about.items()))
    notes = [f"* {r['measurement']} of {short(r['cache'])} failed: `{' '.join(r['error'].split())}`" for r in failed]
    notes += [f"* {peer} was not measured." for peer in absent]
    return [*parts, "\n".join(notes)] if notes else parts


def _pictures(measured: dict) -> dict[str, Callable[[], bytes]]:
    pictures, tasks = {}, {}
    for name, rows in measured.items():
        kind = rows[0]["settings"]["kind"]
        if kind == "fidelity" and len(good(rows)) > 1:
            pictures[f"{name}.png"] = lambda rows=rows, name=name: draw_panels(_fidelity_panels(name, good(rows)))
        elif kind == "task":
            tasks.setdefault(rows[0]["settings"]["task"], []).append(good(rows))
    for task, held in tasks.items():
        pictures[f"task-{task}.png"] = lambda held=held: draw_panels([_task_panel(rows) for rows in held])
    return pictures


def _fidelity_panels(name: str, rows: list[dict]) -> list[Panel]:
    kl, nll = [], []
    for row in rows:
        f, at = row["figures"], (short(row["cache"]), row["role"], share(row))
        mean, error = f["kl"], f["kl_se"]
        # a mean and its error on a logarithmic axis: what is below nothing has no place
        kl.append(Mark(*at, mean, (max(mean - error, mean / 3), mean + error)))
        nll.append(Mark(*at, 100 * f["nll_change"]))
    return [
        Panel(f"{name}: KL to the full cache", "KL, nats a token", kl, scale="log"),
        Panel(f"{name}: loss on the true tokens", "change of NLL, %", nll, scale="symlog", full=0.0),
    ]


def _task_panel(rows: list[dict]) -> Panel:
    f = rows[0]["figures"]
    marks = [
        Mark(short(row["cache"]), row["role"], share(row), row["figures"]["em"], tuple(row["figures"]["em_interval"]))
        for row in rows
        if row["role"] != REFERENCE
    ]
    full = next((row["figures"]["em"] for row in rows if row["role"] == REFERENCE), None)
    return Panel(f"{f['task']}, {f['length']:,} tokens", "right answers", marks, higher_is_better=True, full=full)
