"""What rounding keys and values of 16 bits to 11 bits before they are coded changes: python rounded_states.py out.json

SmolLM2-135M-Instruct, the bundled compressor at a tenth, four windows of the bundled text: 1,536 tokens are read, 512
predicted. Codes of the first window's context that differ, and the KL of predictions to the full cache.
"""

import json
import sys

import torch

from deltakv_hf import DeltaKVCache, KVCompressor, dispatch
from deltakv_hf.evaluation.fidelity import measure_fidelity
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.steps import environment
from deltakv_hf.evaluation.texts import BUNDLED_TEXT
from deltakv_hf.evaluation.windows import text_windows
from deltakv_hf.hub import bundled
from deltakv_hf.kernels import reference

WINDOWS, CONTEXT, PREDICTED = 4, 1536, 512
# what states are rounded to, and whether they are once more
WAYS = {
    "as made, exact": (None, False),
    "bfloat16, exact": (torch.bfloat16, False),
    "bfloat16, rounded": (torch.bfloat16, True),
    "float16, exact": (torch.float16, False),
    "float16, rounded": (torch.float16, True),
}
COMPARED = [
    ("as made, exact", "bfloat16, exact"),
    ("bfloat16, exact", "bfloat16, rounded"),
    ("as made, exact", "float16, exact"),
    ("float16, exact", "float16, rounded"),
]


def analyse(way: str):
    """`dispatch.analyse_states` in that way."""
    dtype, is_rounded = WAYS[way]

    def run(keys, values, angles, interleaved, mean, weights, inverse, backend=None):
        states = (part.to(dtype or part.dtype) for part in (keys, values))
        if is_rounded:
            return reference.analyse_states(*states, angles, interleaved, mean, weights, inverse)
        return reference.analyse(reference.unrotate(*states, angles, interleaved), mean, weights, inverse)

    return run


def measure(model, tokenizer, compressor, pairs: list[tuple[str, str]]) -> dict:
    ways = sorted(set(sum(pairs, ())))
    windows = text_windows(tokenizer, BUNDLED_TEXT, CONTEXT + PREDICTED, WINDOWS)

    def maker(way: str):
        def make():
            dispatch.analyse_states = analyse(way)
            return DeltaKVCache(model, compressor=compressor)

        return make

    fidelity = measure_fidelity(model, windows, {way: maker(way) for way in ways}, context=CONTEXT)
    stores = {}
    for way in ways:
        cache = maker(way)()
        model(windows[0][None, :CONTEXT], past_key_values=cache, logits_to_keep=1)
        stores[way] = [layer.state.store for layer in cache.own_layers]

    def differing(pair: tuple[str, str], name: str) -> float:
        first, second = (torch.cat([getattr(store, name).flatten() for store in stores[way]]) for way in pair)
        return (first != second).float().mean().item()

    names = type(stores[ways[0]][0]).names()
    codes = {" / ".join(pair): {name: differing(pair, name) for name in names} for pair in pairs}
    per_window = {way: [window.kl for window in result.windows] for way, result in fidelity.items()}
    return {
        "differing": codes,
        "fidelity": {way: result.summary() for way, result in fidelity.items()},
        "kl_per_window": per_window,
    }


with torch.no_grad():
    (folder,) = (folder for folder in bundled() if folder.name.endswith("10x"))
    compressor = KVCompressor.from_pretrained(folder)
    made = {"command": "python docs/benchmarks/rounded_states.py out.json"}
    for dtype, pairs in (("float32", COMPARED), ("bfloat16", COMPARED[1:2])):
        model, tokenizer = load_demo_model(dtype, "cpu")
        made["environment"] = environment(model.device)
        made[dtype] = measure(model, tokenizer, compressor, pairs)
    with open(sys.argv[1], "w") as file:
        json.dump(made, file, indent=1)
        file.write("\n")
