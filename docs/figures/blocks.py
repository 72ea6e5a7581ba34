"""Draws which blocks four requests hold in a `JointEncodedCache` of SmolLM2-135M-Instruct, from its block table.

python docs/figures/blocks.py
"""

from __future__ import annotations

import torch
from matplotlib.patches import Patch, Rectangle
from style import GREY, RESIDUAL, new_figure, write

from deltakv_hf import JointEncodedCache
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.texts import BUNDLED_TEXT, read_text

PROMPT, REQUESTS, OWN = 192, 4, 64


@torch.no_grad()
def main() -> None:
    model, tokenizer = load_demo_model(torch.float32, "cpu")
    ids = tokenizer(read_text(BUNDLED_TEXT), return_tensors="pt").input_ids[0]
    own = [ids[1000 + 500 * row :][:OWN] for row in range(REQUESTS)]
    # the third asks what the first asked
    own[2] = own[0]
    cache = JointEncodedCache(model)
    model(torch.stack([torch.cat([ids[:PROMPT], part]) for part in own]), past_key_values=cache, logits_to_keep=1)
    table = cache.own_layers[0].state.store.block_table.tolist()
    holders = {slot: sum(slot in row for row in table) for row in table for slot in row}
    figure = new_figure(9, 2.2)
    axes = figure.add_subplot()
    for row, slots in enumerate(table):
        for column, slot in enumerate(slots):
            color = RESIDUAL if holders[slot] > 1 else GREY
            first = next(other for other, others in enumerate(table) if slot in others)
            faded = 1.0 if first == row else 0.25
            axes.add_patch(Rectangle((column + 0.04, row + 0.08), 0.92, 0.84, color=color, alpha=faded, linewidth=0))
            style = {"ha": "center", "va": "center", "fontsize": 8, "color": "white" if first == row else "#102a43"}
            axes.text(column + 0.5, row + 0.5, str(slot), **style)
    axes.set(xlim=(0, len(table[0])), ylim=(REQUESTS, 0), xticks=[], yticks=[row + 0.5 for row in range(REQUESTS)])
    axes.set_yticklabels([f"request {row + 1}" for row in range(REQUESTS)], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    held = len(holders), sum(len(row) for row in table)
    handles = [
        Patch(color=RESIDUAL, label="stored once, held by several requests"),
        Patch(color=RESIDUAL, alpha=0.25, label="the same block, through the table"),
        Patch(color=GREY, label="a request's own"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"{held[0]} blocks of 16 tokens are stored for {held[1]}", fontsize=10, loc="left")
    write(figure, "blocks")


if __name__ == "__main__":
    main()
