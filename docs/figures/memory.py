"""Counts and draws memory against context: SmolLM2-135M-Instruct in bfloat16 reading *Persuasion*.

    python docs/figures/memory.py

One pass fills a `DynamicCache`; caches are made of its first tokens by `from_dynamic`, so all bytes are of real tokens.
"""

from __future__ import annotations

import torch
from style import DENSE, RAW, REFERENCE, RESIDUAL, new_figure, tidy, write, write_numbers
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache, KVCompressor
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.texts import BUNDLED_TEXT, read_text

# the text has 6,336 tokens
CONTEXTS = (512, 1024, 2048, 3072, 4096, 6144)
COMPRESSORS = {"compressor, ratio 10": "smollm2-135m-instruct-10x", "compressor, ratio 15": "smollm2-135m-instruct-15x"}
COLORS = {"no compressor": RAW, "compressor, ratio 10": RESIDUAL, "compressor, ratio 15": REFERENCE}
# whose share the figure of quality needs, at its context
OPTIONS = ({"group_size": 32}, {"reference_stride": 16}, {"top_k": 4}, {"nbits": 8}, {"nbits": 2})
QUALITY_CONTEXT = 3072


@torch.no_grad()
def main() -> None:
    model, tokenizer = load_demo_model(torch.bfloat16, "cpu")
    ids = tokenizer(read_text(BUNDLED_TEXT), return_tensors="pt").input_ids[:, : CONTEXTS[-1]]
    full = DynamicCache(config=model.config)
    for part in ids.split(1024, dim=1):
        model(part, past_key_values=full, logits_to_keep=1)
    makers = {"no compressor": {}}
    makers |= {name: {"compressor": KVCompressor.from_pretrained(idea)} for name, idea in COMPRESSORS.items()}
    bytes_held: dict[str, list[int]] = {name: [] for name in ("DynamicCache", *makers)}
    for context in CONTEXTS:
        dense = first_tokens(model, full, context)
        for name, options in makers.items():
            report = DeltaKVCache.from_dynamic(dense, model, **options).memory_report()
            bytes_held[name].append(report.stored_bytes)
        bytes_held["DynamicCache"].append(report.dense_bytes)
    dense = first_tokens(model, full, QUALITY_CONTEXT)
    shares = {str(o): DeltaKVCache.from_dynamic(dense, model, **o).memory_report().ratio for o in ({}, *OPTIONS)}
    draw(bytes_held)
    figures = {"contexts": CONTEXTS, "bytes": bytes_held, "share_at": QUALITY_CONTEXT, "share_by_options": shares}
    write_numbers("memory", model.device, "bfloat16", figures)


def first_tokens(model, full: DynamicCache, context: int) -> DynamicCache:
    """A `DynamicCache` of the first `context` tokens of `full`."""
    dense = DynamicCache(config=model.config)
    for layer_idx, layer in enumerate(full.layers):
        dense.update(layer.keys[:, :, :context].clone(), layer.values[:, :, :context].clone(), layer_idx)
    return dense


def draw(bytes_held: dict[str, list[int]]) -> None:
    """Lines of MiB against tokens."""
    figure = new_figure(5.6, 3.6)
    axes = figure.add_subplot()
    for name, sizes in bytes_held.items():
        color, mib = COLORS.get(name, DENSE), [size / 2**20 for size in sizes]
        axes.plot(CONTEXTS, mib, color=color, marker="o", markersize=3.5)
        share = "" if name == "DynamicCache" else f", {sizes[-1] / bytes_held['DynamicCache'][-1]:.1%}"
        # the two lowest lines end side by side
        shift = {"compressor, ratio 10": 5, "compressor, ratio 15": -5}.get(name, 0)
        place = {"xytext": (7, shift), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": color}
        axes.annotate(f"{name}{share}", (CONTEXTS[-1], mib[-1]), **place)
    axes.set(xlabel="context, tokens", ylabel="bytes held by the cache, MiB", xlim=(0, 9300), ylim=(0, None))
    axes.set_xticks(range(0, 6145, 2048))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    tidy(axes)
    write(figure, "memory")


if __name__ == "__main__":
    main()
