"""Attention of a decode step with a choice of 2,048 tokens, in the layer shape of Llama-3.1-8B with random weights.

python docs/benchmarks/selection_steps.py out.json 8192 16384 32768 65536 131072 262144

Milliseconds of one layer of each kind behind so many tokens, out of a recorded graph and as launched, and the sums over
32 layers: filter layers as the paper has them (0, 1, 2, 8, 18), coarse to fine in every layer and with a choice shared
by four layers, beside everything read and SDPA on a dense cache. Scores, choice, sinks and window are included. out.png
shows the sums; without lengths it is drawn from out.json.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from shapes import new_model, random_compressor

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.kernels import _Clock
from deltakv_hf.evaluation.steps import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK, SCALE = 16384, 128**-0.5
# layers of each kind in a model of 32
SUMS = {
    "filter layers": {"filter, chooses": 3, "filter": 2, "chosen by a filter layer": 27},
    "coarse to fine": {"coarse, chooses": 32},
    "coarse to fine, shared by four": {"coarse, chooses": 8, "coarse, shares": 24},
    "all": {"all": 32},
    "dense": {"dense": 32},
}


def graphed(run):
    """A replay of what `run` launches; `run` itself where there are no graphs."""
    if DEVICE.type != "cuda":
        return run
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def readers(model, compressor, num_tokens: int):
    """Readers of one layer of each kind behind `num_tokens` tokens."""
    kinds = {
        ("filter, chooses", "chosen by a filter layer"): {"selection": "filter_layers", "filter_layers": (0,)},
        ("filter", None): {"selection": "filter_layers", "filter_layers": (0, 1)},
        ("coarse, chooses", "coarse, shares"): {"selection": "coarse_to_fine", "layers_per_choice": 2},
        ("all", None): {},
    }
    ids = torch.randint(0, 1000, (1, num_tokens), device=DEVICE)
    for names, options in kinds.items():
        cache = DeltaKVCache(model, compressor=compressor, **options)
        for start in range(0, num_tokens, CHUNK):
            model(ids[:, start : start + CHUNK], past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        for name, layer in zip(names, cache.layers, strict=True):
            if name is not None:
                yield name, layer._reader(layer.state, cache._ledger.layout)


def measured(model, compressor, num_tokens: int, clock: _Clock) -> dict:
    query = torch.randn(1, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
    runs = {
        name: lambda r=reader: r.attend(query, None, SCALE) for name, reader in readers(model, compressor, num_tokens)
    }
    keys, values = (torch.randn(1, 8, num_tokens, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    runs["dense"] = lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    layers = {}
    for name, run in runs.items():
        layers[name] = {"launched_ms": clock(run)}
        try:
            layers[name]["graph_ms"] = clock(graphed(run))
        except RuntimeError as error:
            layers[name]["no_graph"] = str(error)[:200]
            torch.cuda.synchronize()
    sums = {
        name: {
            way: sum(count * layers[kind][way] for kind, count in kinds.items())
            for way in ("launched_ms", "graph_ms")
            if all(way in layers[kind] for kind in kinds)
        }
        for name, kinds in SUMS.items()
    }
    return {"num_tokens": num_tokens, "one_layer": layers, "of_32_layers": sums}


def draw(made: dict, path: Path) -> None:
    """The sums over 32 layers by the number of tokens."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lengths = [run["num_tokens"] for run in made["runs"]]
    for name in SUMS:
        axes.plot(lengths, [run["of_32_layers"][name]["graph_ms"] for run in made["runs"]], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms a step, attention of 32 layers")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    axes.minorticks_off()
    axes.set_title(f"{made['environment']['device']}, layer shape of Llama-3.1-8B, 2,048 tokens read", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def main() -> None:
    out, *lengths = sys.argv[1:]
    if not lengths:
        return draw(json.loads(Path(out).read_text()), Path(out).with_suffix(".png"))
    command = "python docs/benchmarks/selection_steps.py out.json " + " ".join(lengths)
    clock, made = _Clock(DEVICE), {"command": command, "environment": environment(DEVICE), "runs": []}
    model = new_model(2, DEVICE.type)
    compressor = random_compressor(model, 1)
    for length in lengths:
        made["runs"].append(measured(model, compressor, int(length), clock))
        print({name: sums for name, sums in made["runs"][-1]["of_32_layers"].items()}, flush=True)
        with open(out, "w") as file:
            json.dump(made, file, indent=1)
    draw(made, Path(out).with_suffix(".png"))


if __name__ == "__main__":
    main()
