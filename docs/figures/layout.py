"""Draws what `DeltaKVCache` holds of 512 tokens of SmolLM2-135M-Instruct: the area of a square is its bytes.

    python docs/figures/layout.py

The bytes are those of a real cache in bfloat16, counted by `memory_report`.
"""

from __future__ import annotations

import torch
from matplotlib.patches import Patch, Rectangle
from style import RAW, REFERENCE, RESIDUAL, new_figure, write

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.texts import BUNDLED_TEXT, read_text

TOKENS, COLUMNS = 512, 64


@torch.no_grad()
def main() -> None:
    model, tokenizer = load_demo_model(torch.bfloat16, "cpu")
    ids = tokenizer(read_text(BUNDLED_TEXT), return_tensors="pt").input_ids[:, :TOKENS]
    cache = DeltaKVCache(model)
    model(ids, past_key_values=cache, logits_to_keep=1)
    report, options = cache.memory_report(), cache.options
    sinks, stop = options.num_sink_tokens, options.num_sink_tokens + report.compressed_tokens
    places = range(sinks, stop)
    references = set(places[:: options.reference_stride])
    dense = report.dense_bytes / TOKENS
    parts = {name: report.parts[name] for name in report.parts}
    shares = {
        REFERENCE: parts["references"] / len(references) / dense,
        RESIDUAL: sum(parts[name] for name in ("residual codes", "residual levels", "reference ids"))
        / (len(places) - len(references))
        / dense,
        RAW: 1.0,
    }
    figure = new_figure(9, 1.75)
    axes = figure.add_subplot()
    for token in range(TOKENS):
        color = REFERENCE if token in references else RESIDUAL if token in places else RAW
        side = 0.9 * shares[color] ** 0.5
        row, column = divmod(token, COLUMNS)
        corner = column + (1 - side) / 2, row + (1 - side) / 2
        axes.add_patch(Rectangle(corner, side, side, color=color, linewidth=0))
    axes.set(xlim=(0, COLUMNS), ylim=(TOKENS // COLUMNS, 0), aspect="equal", yticks=[], xticks=[])
    axes.set_ylabel("64 tokens a line", fontsize=8)
    axes.spines[:].set_visible(False)
    labels = {
        RAW: f"sinks and recent window: {sinks} + {TOKENS - stop} tokens as they are",
        REFERENCE: f"references: {len(references)} tokens at {shares[REFERENCE]:.0%}",
        RESIDUAL: f"residuals: {len(places) - len(references)} tokens at {shares[RESIDUAL]:.0%}",
    }
    handles = [Patch(color=color, label=label) for color, label in labels.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    write(figure, "layout")


if __name__ == "__main__":
    main()
