"""How `deltakv inspect --joint` shows plans of blocks that share storage: tables and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean

from rich.markup import escape
from rich.table import Table

from ..rate_distortion import GRID, RateDistortion
from .console import size
from .pictures import as_png

# where .1, .2, ... .9 stand in `GRID`
TENTHS = range(4, len(GRID), 5)


def title(figures: dict) -> str:
    """What was read."""
    batch = f"{figures['rows']} rows of {figures['tokens']:,} tokens, blocks of {figures['options']['block_size']}"
    return f"{figures['model']}, {figures['dtype']}: {batch}"


def layer_table(figures: dict, plans: list[RateDistortion]) -> Table:
    """One line for each layer."""
    table = Table(title=escape(title(figures)), title_justify="left")
    headers = "layer", "blocks", "cosine,\ntypical", "cosine,\nby chance", "error\nallowed", "kept,\npredicted"
    for header in (*headers, "kept,\nachieved", "error\nachieved"):
        table.add_column(header, justify="right", no_wrap=True)
    if any(plan.is_left_alone for plan in plans):
        table.add_column("", no_wrap=True)
    for plan in plans:
        numbers = plan.mean_cosine, plan.chance_cosine, plan.max_relative_error
        cells = [f"{plan.layer_idx}", f"{plan.num_blocks:,}", *(f"{number:.2f}" for number in numbers)]
        cells += [f"{plan.predicted_kept:.1%}", f"{plan.achieved_kept:.1%}", f"{plan.achieved_error:.2f}"]
        table.add_row(*cells, *(["left alone"] if plan.is_left_alone else []))
    return table


def thresholds(plans: list[RateDistortion]) -> list[dict]:
    """Means over layers at errors from .1 to .9; of errors, over layers that have any match there (None: no layer)."""
    kept, poisson = _mean_curve(plan.kept for plan in plans), _mean_curve(plan.kept_poisson for plan in plans)
    rows = []
    for place in TENTHS:
        errors = [plan.errors[place] for plan in plans if plan.errors[place] > 0]
        row = {"max_relative_error": GRID[place], "kept": kept[place], "kept_poisson": poisson[place]}
        rows.append(row | {"error": mean(errors) if errors else None})
    return rows


def _mean_curve(curves: Iterable[Sequence[float]]) -> list[float]:
    return [mean(shares) for shares in zip(*curves, strict=True)]


def threshold_table(rows: list[dict]) -> Table:
    """One line for each error that might be allowed."""
    table = Table(title="Predicted, mean of the layers", title_justify="left")
    for header in ("error\nallowed", "kept, from\nmatches", "kept, from\nchance alone", "error of\nwhat shares"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        kept = f"{row['kept']:.1%}", f"{row['kept_poisson']:.1%}"
        error = "" if row["error"] is None else f"{row['error']:.2f}"
        table.add_row(f"{row['max_relative_error']:.1f}", *kept, error)
    return table


def total_line(total: dict) -> str:
    """The whole cache in words."""
    return (
        f"whole cache: {total['ratio']:.1%} of the full cache's {size(total['dense_bytes'])}; with equal blocks alone "
        f"{total['exact_ratio']:.1%}. Similar blocks share storage in {total['sharing_layers']} of "
        f"{total['cached_layers']} layers; left alone: {total['left_alone_layers']}"
    )


def chart(figures: dict, plans: list[RateDistortion]) -> bytes:
    """Share of the blocks that stay against the error allowed: predicted for each layer, and achieved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for plan in plans:
        label = "a layer, predicted from matches" if plan is plans[0] else None
        axes.plot(GRID, plan.kept, color="#cbd2d9", linewidth=0.8, label=label)
    kept, poisson = _mean_curve(plan.kept for plan in plans), _mean_curve(plan.kept_poisson for plan in plans)
    axes.plot(GRID, kept, color="#102a43", linewidth=1.8, label="mean of the layers")
    label = "mean, predicted from chance alone (Poisson)"
    axes.plot(GRID, poisson, color="#2f7ed8", linestyle="--", linewidth=1.8, label=label)
    for is_left_alone, face, label in ((False, "#ba2525", "achieved"), (True, "white", "left alone")):
        own = [plan for plan in plans if plan.is_left_alone == is_left_alone]
        if own:
            places = [plan.max_relative_error for plan in own], [plan.achieved_kept for plan in own]
            axes.plot(*places, "o", color="#ba2525", markerfacecolor=face, markersize=5, label=label, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("largest relative error allowed")
    axes.set_ylabel("blocks that stay")
    total = figures["total"]
    found = f"whole cache {total['ratio']:.1%} of the full one, {total['exact_ratio']:.1%} if equal blocks alone share"
    axes.set_title(f"{title(figures)}\n{found}", loc="left", fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return as_png(figure, axes)
