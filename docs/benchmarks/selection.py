"""What decode steps that read only some tokens cost in predictions and in attention.

    python docs/benchmarks/selection.py corpus/heldout/*.txt --context 4096 --out selection.json

feeds the tokens behind a context one by one and compares the predictions with the full cache's; of some steps it takes
the share of attention, layer by layer, that goes to what is read: as chosen, as exact scores would choose by the same
rule, and with a set for each head (`examples/build_corpus.py corpus` makes the texts).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache, KVCompressor, dispatch
from deltakv_hf.compressor import TransformCompressor
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.prefill import feed_behind
from deltakv_hf.evaluation.steps import environment
from deltakv_hf.evaluation.windows import text_windows
from deltakv_hf.files import write_atomically
from deltakv_hf.selection import Choice, Selector, attention_share

SAMPLED = 16


class Compared(Selector):
    """A selector that also tells what other choices would have missed.

    Args:
        exact_choice: by exact scores, shared as `choice` is; None for filter layers.
    """

    def __init__(self, selector: Selector, exact_choice: Choice | None):
        super().__init__(selector.options, selector.keep, selector.choice, selector.layer_idx, selector.first)
        self.exact_choice = exact_choice

    def reset(self) -> None:
        super().reset()
        self.exact, self.by_head, self.sampled = [], [], []

    def attend(self, codes, query, mask, raw):
        seen = super().attend(codes, query, mask, raw)
        if (self.steps - 1) % SAMPLED == 0:
            every = codes.attend(query, mask, raw)
            self.sampled.append(attention_share(seen, every))
            scores, budget = codes.score(query, mask, 2**20), self.budget(codes.layout.compressed)
            if self.exact_choice is not None:
                where = self.layer_idx, codes.layout, codes.state.columns
                slots = self.exact_choice.get(self.first, *where)
                if slots is None:
                    slots = dispatch.choose(scores, raw.log_total, budget)
                    self.exact_choice.put(slots, *where)
                self.exact.append(attention_share(codes.attend(query, mask, raw, slots), every))
            weights, others = (scores - every.log_total).exp(), (raw.log_total - every.log_total).exp()
            self.by_head.append((weights.topk(budget).values.sum(-1, keepdim=True) + others).mean().item())
        return seen


def window_figures(model, compressor, ids: torch.Tensor, options) -> dict:
    """Of one window: KL and loss with everything read and with a choice, and shares of attention."""
    context, targets = ids[None, : options.context], ids[options.context + 1 :]
    full = DynamicCache(config=model.config)
    model(context, past_key_values=full, logits_to_keep=1)
    some = DeltaKVCache.from_dynamic(full, model, compressor=compressor, keep=options.keep, **options.options)
    every = DeltaKVCache.from_dynamic(full, model, compressor=compressor)
    exact = Choice() if some.options.selection == "coarse_to_fine" else None
    for layer in some.own_layers:
        if isinstance(layer.compressor, TransformCompressor):
            layer.selector = Compared(layer.selector, exact)
    expected = feed_behind(model, ids[options.context : -1], full, len(targets)).log_softmax(-1)
    figures = {"full_nll": -expected.gather(1, targets[:, None]).mean().item()}
    for name, cache in (("all", every), ("chosen", some)):
        found = feed_behind(model, ids[options.context : -1], cache, len(targets)).log_softmax(-1)
        figures[name] = {
            "kl": (expected.exp() * (expected - found)).sum(-1).mean().item(),
            "nll": -found.gather(1, targets[:, None]).mean().item(),
        }
    figures["stored"] = {name: cache.memory_report().ratio for name, cache in (("all", every), ("chosen", some))}
    figures["layers"] = {}
    for layer in some.own_layers:
        selector = layer.selector
        if isinstance(selector, Compared) and selector.sampled:
            parts = {"chosen": selector.sampled, "exact": selector.exact, "by_head": selector.by_head}
            figures["layers"][layer.layer_idx] = {name: statistics.mean(part) for name, part in parts.items() if part}
    return figures


def summary(windows: list[dict]) -> dict:
    """Means over windows, with the standard error of what the choice adds."""
    added = [window["chosen"]["kl"] - window["all"]["kl"] for window in windows]
    means = {name: statistics.mean(window[name]["kl"] for window in windows) for name in ("all", "chosen")}
    error = statistics.stdev(added) / len(added) ** 0.5 if len(added) > 1 else 0.0
    loss = {name: statistics.mean(window[name]["nll"] for window in windows) for name in ("all", "chosen")}
    full = statistics.mean(window["full_nll"] for window in windows)
    layers = {
        idx: {name: statistics.mean(window["layers"][idx][name] for window in windows) for name in shares}
        for idx, shares in windows[0]["layers"].items()
    }
    stored = {name: statistics.mean(window["stored"][name] for window in windows) for name in ("all", "chosen")}
    return {
        "kl": means,
        "stored": stored,
        "kl_added": statistics.mean(added),
        "kl_added_se": error,
        "nll_change": {name: value / full - 1 for name, value in loss.items()},
        "layers": layers,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--compressor", default="smollm2-135m-instruct-10x")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--keep", type=int, default=512)
    parser.add_argument("--options", type=json.loads, default={"selection": "coarse_to_fine"}, help="JSON")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer = load_by_name(options.model, torch.float32)
    model.set_attn_implementation("deltakv")
    compressor = KVCompressor.from_pretrained(options.compressor)
    num_tokens, windows, made = options.context + options.steps + 1, [], {}
    for path in options.texts:
        (ids,) = text_windows(tokenizer, path, num_tokens, 1)
        windows.append({"text": path.stem} | window_figures(model, compressor, ids, options))
        made = {
            "command": shlex.join(
                ["python", "docs/benchmarks/selection.py", "TEXTS", *sys.argv[1 + len(options.texts) :]]
            ),
            "environment": environment(model.device),
            "summary": summary(windows),
            "windows": windows,
        }
        write_atomically(options.out, json.dumps(made, indent=1).encode())
        print(path.stem, {name: round(windows[-1][name]["kl"], 5) for name in ("all", "chosen")}, flush=True)
    print({name: made["summary"][name] for name in ("kl", "kl_added", "kl_added_se", "nll_change", "stored")})


if __name__ == "__main__":
    main()
