"""Draws how far tokens are from their nearest reference: SmolLM2-135M-Instruct reading 2,048 tokens of *Persuasion*.

    python docs/figures/residuals.py

A token is `[K; V]` of a layer with keys un-rotated, as a cache stores it; every 32nd is a reference. Distances are
relative to the layer's spread: the root of the mean squared distance of a token from the mean of all.
"""

from __future__ import annotations

import torch
from style import DENSE, GREY, REFERENCE, RESIDUAL, new_figure, tidy, write, write_numbers

from deltakv_hf.calibration.capture import Observer
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.texts import BUNDLED_TEXT, read_text

TOKENS, SINKS, STRIDE, LAYER = 2048, 4, 32, 12
NAMES = {
    "a random earlier token": GREY,
    "the token before": REFERENCE,
    "its nearest reference": RESIDUAL,
    "the mean of all tokens": DENSE,
}


def distances(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Distances of a layer's tokens `[n, width]` float32 that are no references, from four points."""
    spread = (tokens - tokens.mean(0)).square().sum(1).mean().sqrt()
    places = torch.arange(len(tokens))
    own = places[(places % STRIDE != 0)]
    references = places[::STRIDE]
    to_references = torch.cdist(tokens[own], tokens[references])
    to_references = to_references.masked_fill(references[None] > own[:, None], torch.inf)
    drawn = (torch.rand(len(own), generator=torch.Generator().manual_seed(0)) * own).long()
    found = {
        "a random earlier token": (tokens[own] - tokens[drawn]).norm(dim=1),
        "the token before": (tokens[own] - tokens[own - 1]).norm(dim=1),
        "its nearest reference": to_references.amin(1),
        "the mean of all tokens": (tokens[own] - tokens.mean(0)).norm(dim=1),
    }
    return {name: value / spread for name, value in found.items()}


def main() -> None:
    model, tokenizer = load_demo_model(torch.float32, "cpu")
    ids = tokenizer(read_text(BUNDLED_TEXT), return_tensors="pt").input_ids[:, :TOKENS]
    layers = Observer(model).read(ids).tokens
    found = {layer_idx: distances(tokens[0, SINKS:].float()) for layer_idx, tokens in layers.items()}
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    for name, color in NAMES.items():
        drawn = {"bins": 60, "range": (0, 2.0), "color": color, "label": name, "histtype": "step", "linewidth": 1.4}
        left.hist(found[LAYER][name].numpy(), **drawn)
        medians = [of_layer[name].median().item() for of_layer in found.values()]
        right.plot(list(found), medians, color=color, marker="o", markersize=3, label=name)
    left.set(xlabel=f"distance in layer {LAYER}, of its spread", ylabel="tokens")
    right.set(xlabel="layer", ylabel="median distance, of the spread", ylim=(0, None))
    for axes in (left, right):
        tidy(axes)
    left.legend(frameon=False, fontsize=8)
    write(figure, "residuals")
    medians = {name: [round(of_layer[name].median().item(), 4) for of_layer in found.values()] for name in NAMES}
    # keys and values of layer 0 depend on the word alone
    same_word = (found[0]["its nearest reference"] < 0.01).float().mean().item()
    figures = {"tokens": TOKENS, "stride": STRIDE, "same_word_in_layer_0": same_word, "median_by_layer": medians}
    write_numbers("residuals", model.device, "float32", figures)


if __name__ == "__main__":
    main()
