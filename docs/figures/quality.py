"""Draws quality against bytes from what stands in docs/benchmarks and in docs/figures/memory.json.

    python docs/figures/quality.py

KL to the full cache in float32, 18 held-out windows, 3,072 tokens stored and 1,024 predicted; bytes of the whole cache
in bfloat16 at the same context.
"""

from __future__ import annotations

import json

import numpy as np
from style import FOLDER, GREY, RAW, REFERENCE, RESIDUAL, new_figure, tidy, write

BENCHMARKS = FOLDER.parent / "benchmarks"
PROTOCOL = "protocol: 18 windows, context 3072"


def read(name: str) -> dict:
    """One file of measurements."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def main() -> None:
    shares = json.loads((FOLDER / "memory.json").read_text(encoding="utf-8"))["share_by_options"]
    kl = {str(row["options"]): row["kl"] for row in read("h200-fidelity-fp32")["results"]}
    rows = [row for row in read("h200-compressors")["results"] if row["reference_stride"] == 8]
    calibrated = sorted((row["whole_cache_share"], row["text"]["kl"]) for row in rows)
    # a trained one stores the same bytes beside the same raw tokens
    compressed, whole = zip(*sorted((row["compressed_share"], row["whole_cache_share"]) for row in rows), strict=True)
    trained = [
        (np.interp(row["share_of_16_bit_cache"], compressed, whole), row[PROTOCOL]["after"]["kl"])
        for row in read("h200-training")["results"]
        if row["share_of_16_bit_cache"] <= max(compressed)
    ]
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    plain = [(shares[options], kl[options]) for options in shares]
    for points, color, label, line in (
        (plain, RAW, "no compressor: options of `DeltaKVCache(model)`", ""),
        (calibrated, GREY, "compressor, calibrated", "-"),
        (sorted(trained), RESIDUAL, "compressor, trained through the model", "-"),
    ):
        x, y = zip(*points, strict=True)
        axes.plot([100 * share for share in x], y, color=color, marker="o", markersize=4, linestyle=line, label=label)
    axes.plot(100 * shares["{}"], kl["{}"], marker="o", markersize=8, color=REFERENCE, zorder=0)
    for options, name in (("{}", "as it comes"), ("{'nbits': 8}", "nbits=8"), ("{'nbits': 2}", "nbits=2")):
        place = {"xytext": (7, 4), "textcoords": "offset points", "fontsize": 8, "color": RAW}
        axes.annotate(name, (100 * shares[options], kl[options]), **place)
    axes.set(xlabel="whole cache, % of the full cache's bytes (16 bits)", ylabel="KL to the full cache, nats")
    axes.set(yscale="log", xlim=(0, 70))
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    write(figure, "quality")


if __name__ == "__main__":
    main()
