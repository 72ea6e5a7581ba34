"""Pictures of quality against bytes: ours filled, peers hollow, the front that nothing else is in front of drawn."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..evaluation.candidates import OURS, PAPER, PEER
from .pictures import as_png

COLORS = {OURS: "#1b6ca8", PEER: "#ba2525", PAPER: "#8a5a00"}
NAMES = {OURS: "deltakv-hf", PEER: "caches of others", PAPER: "the paper's form"}
# where a label may stand: points from its mark, nearest first
PLACES = [
    (distance * x, distance * y)
    for distance in (7, 14, 22, 32, 44, 58)
    for x, y in ((1, 0), (0.7, 0.8), (0.7, -0.8), (-1, 0), (0, 1.1), (0, -1.1), (-0.7, 0.8), (-0.7, -0.8))
]
# a name stays readable on a line
HALO = [withStroke(linewidth=2.5, foreground="white")]
# per cent; a smaller change of loss stands on a linear axis
LEAST_CHANGE = 0.1
TICKS = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0]


@dataclass(frozen=True)
class Mark:
    """A cache in a picture: its bytes over dense, its quality, and the interval of that if there is one."""

    label: str
    role: str
    share: float
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, ylabel: of the axes.
        marks: of all caches.
        higher_is_better: of the values.
        scale: of the values: "linear", "log", or "symlog" for what may be below nothing.
        full: the full cache's value, or None where that is 0 on a logarithmic axis.
    """

    title: str
    ylabel: str
    marks: list[Mark]
    higher_is_better: bool = False
    scale: str = "linear"
    full: float | None = None


def front(marks: list[Mark], higher_is_better: bool) -> list[Mark]:
    """Marks that no other one beats in bytes and quality together, by bytes."""
    sign = -1 if higher_is_better else 1
    kept = []
    for mark in sorted(marks, key=lambda mark: (mark.share, sign * mark.value)):
        if not kept or sign * mark.value < sign * kept[-1].value:
            kept.append(mark)
    return kept


def draw_panels(panels: list[Panel]) -> bytes:
    """A PNG of panels side by side."""
    figure = Figure(figsize=(6.4 * len(panels) + 0.6, 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, panel)
    roles = [role for role in COLORS if any(mark.role == role for panel in panels for mark in panel.marks)]
    handles = [_handle(all_axes[0], role) for role in roles]
    figure.legend(handles, [NAMES[role] for role in roles], loc="outside lower center", ncols=3, frameon=False)
    # labels go where there is room, which is known when all else has its place
    figure.draw_without_rendering()
    for axes, panel in zip(all_axes, panels, strict=True):
        place_labels(axes, panel.marks)
        axes.spines[["top", "right"]].set_visible(False)
    return as_png(figure, all_axes[-1])


def _handle(axes, role: str):
    return axes.plot([], [], linestyle="none", **_style(role))[0]


def _style(role: str) -> dict:
    color = COLORS[role]
    return {"marker": "o", "markersize": 7, "color": color, "markerfacecolor": "white" if role == PEER else color}


def _draw(axes, panel: Panel) -> None:
    for mark in panel.marks:
        if mark.interval is not None:
            axes.plot([mark.share] * 2, mark.interval, color=COLORS[mark.role], alpha=0.35, linewidth=1.5, zorder=1)
        axes.plot(mark.share, mark.value, linestyle="none", zorder=3, **_style(mark.role))
    best = front(panel.marks, panel.higher_is_better)
    axes.step([m.share for m in best], [m.value for m in best], where="post", color="#9aa5b1", linewidth=1, zorder=0)
    axes.set_xscale("log")
    shares = [mark.share for mark in panel.marks]
    axes.set_xlim(min(shares) / 1.35, max(shares) * 1.45)
    axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bytes of the whole cache, share of dense in 16 bits")
    if panel.scale != "linear":
        axes.set_yscale(panel.scale, **({"linthresh": LEAST_CHANGE} if panel.scale == "symlog" else {}))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if panel.full is not None:
        axes.axhline(panel.full, color="#627d98", linestyle=":", linewidth=1.2, label="full cache")
        axes.annotate(
            "full cache", (0, panel.full), xycoords=("axes fraction", "data"), xytext=(3, 3),
            textcoords="offset points", fontsize=8, color="#627d98",
        )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)


def place_labels(axes, marks: list[Mark]) -> list:
    """Writes the name of every mark where it covers no mark and no other name; returns the texts."""
    spots = [axes.transData.transform((mark.share, mark.value)) for mark in marks]
    taken, texts = [], []
    for mark, _ in sorted(zip(marks, spots, strict=True), key=lambda pair: -pair[1][1]):
        best, text = None, None
        for x, y in PLACES:
            text = axes.annotate(
                mark.label,
                (mark.share, mark.value),
                xytext=(x, y),
                textcoords="offset points",
                fontsize=8,
                color=COLORS[mark.role],
                path_effects=HALO,
                ha="left" if x > 0 else "right" if x < 0 else "center",
                va="center",
                annotation_clip=False,
                zorder=4,
            )
            box = text.get_window_extent().expanded(1.02, 1.05)
            if _is_free(box, taken, spots, axes.bbox):
                best = box
                break
            text.remove()
        if best is None:
            # nowhere near: a name that covers another is worth more than none
            x, y = PLACES[0]
            text = axes.annotate(mark.label, (mark.share, mark.value), xytext=(x, y), textcoords="offset points")
            best = text.get_window_extent()
        elif max(abs(x), abs(y)) > 20:
            line = axes.annotate(
                "", (mark.share, mark.value), xytext=(x, y), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": COLORS[mark.role], "linewidth": 0.6, "shrinkB": 4},
            )  # fmt: skip
            line.set_in_layout(False)
        text.set_in_layout(False)
        taken.append(best)
        texts.append(text)
    return texts


def _is_free(box, taken: list, spots: list, frame) -> bool:
    inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 * 1.02 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    covers = any(box.x0 - 5 < x < box.x1 + 5 and box.y0 - 5 < y < box.y1 + 5 for x, y in spots)
    return inside and not covers and not any(box.overlaps(other) for other in taken)
