"""What blocks that share storage save, what it costs in predictions, and what it costs in time.

    python docs/benchmarks/joint.py quality ids.json --out joint-quality.json
    python docs/benchmarks/joint.py cost --out joint-cost.json

`quality` reads batches with SmolLM2-135M-Instruct: one prompt continued eight times, eight requests with one system
prompt, the same passages in another order behind heads of other lengths (as retrieval gives them), and unrelated texts.
`ids.json` holds token ids of texts by name. `cost` takes layers in the shape of Llama-3.1-8B with random weights, 32
rows of 2,048 tokens, and needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch
from transformers import DynamicCache

from deltakv_hf import JointEncodedCache, KVCompressor
from deltakv_hf.evaluation.fidelity import compare
from deltakv_hf.evaluation.model import load_demo_model, pick_device
from deltakv_hf.evaluation.steps import environment
from deltakv_hf.files import write_atomically

ROWS, PASSAGES, PASSAGE, NEXT = 8, 6, 224, 128
ERRORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


def batches(texts: dict[str, list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By name, contexts `[rows, n]` and what is fed behind them `[rows, NEXT + 1]`."""
    names, chosen = list(texts), random.Random(0)
    texts = [texts[name] for name in names]
    nexts = torch.tensor([texts[-1 - row % len(texts)][30000 + 200 * row :][: NEXT + 1] for row in range(ROWS)])
    prompt = texts[0][4000:6048]
    system, passages = texts[1][8000:9536], [text[9000 : 9000 + PASSAGE] for text in texts[:PASSAGES]]
    retrieved = []
    for row in range(ROWS):
        order = list(range(PASSAGES))
        chosen.shuffle(order)
        # cut at the front: heads are of other lengths, so passages stand at other places in their blocks
        head = texts[-1][100 * row :][:80]
        body = [token for place in order for token in passages[place]]
        retrieved.append((head + body)[chosen.randrange(1, 16) :][: PASSAGES * PASSAGE + 48])
    aligned = [row[-PASSAGES * PASSAGE - 48 :] for row in _aligned(texts, passages)]
    own = [texts[row % len(texts)][12000 + 300 * row :][:256] for row in range(ROWS)]
    unrelated = [texts[row % len(texts)][5000 + 3000 * row :][:2048] for row in range(ROWS)]
    rows = {
        "one prompt, 8 continuations": [prompt] * ROWS,
        "one system prompt of 1,536, 8 requests": [system + part for part in own],
        "6 passages in 8 orders, whole blocks": aligned,
        "6 passages in 8 orders, anywhere": retrieved,
        "unrelated": unrelated,
    }
    return {name: (torch.tensor(ids), nexts) for name, ids in rows.items()}


def _aligned(texts: list[list[int]], passages: list[list[int]]) -> list[list[int]]:
    """Passages begin where blocks begin."""
    chosen, rows = random.Random(1), []
    for row in range(ROWS):
        order = list(range(PASSAGES))
        chosen.shuffle(order)
        rows.append(texts[-1][100 * row :][:48] + [token for place in order for token in passages[place]])
    return rows


@torch.no_grad()
def quality(arguments) -> list[dict]:
    """Bytes and predictions of each batch with each cache."""
    model, _ = load_demo_model(torch.float32, arguments.device)
    kinds = {"exact": {}, "target_ratio 0.5": {"target_ratio": 0.5}}
    for size in ("10x", "15x"):
        kinds[f"residual {size}"] = {"residual": KVCompressor.from_pretrained(f"smollm2-135m-instruct-{size}")}
    kinds |= {f"error {e}, {rope}": {"max_relative_error": e, "rope": rope} for e in ERRORS for rope in ROPE}
    kinds |= {f"error 0.4, {scope}": {"max_relative_error": 0.4, "scope": scope} for scope in SCOPES}
    results = []
    for name, (ids, nexts) in batches(json.loads(arguments.ids.read_text())).items():
        if arguments.batch and name not in arguments.batch:
            continue
        ids, nexts = ids.to(model.device), nexts.to(model.device)
        full = DynamicCache(config=model.config)
        model(ids, past_key_values=full, logits_to_keep=1)
        expected = model(nexts[:, :-1], past_key_values=full).logits.float()
        for kind, options in kinds.items():
            if name not in FUSED and kind not in ("exact", "residual 10x", "residual 15x"):
                continue
            if arguments.cache and kind not in arguments.cache:
                continue
            cache = JointEncodedCache(model, **options)
            model(ids, past_key_values=cache, logits_to_keep=1)
            report = cache.memory_report()
            logits = model(nexts[:, :-1], past_key_values=cache).logits.float()
            figures = [compare(*row) for row in zip(logits, expected, nexts[:, 1:], strict=True)]
            kl, top1, nll, full_nll = (statistics.mean(part) for part in zip(*figures, strict=True))
            plans = cache.rate_distortion()
            results.append(
                {
                    "batch": name,
                    "cache": kind,
                    "tokens": list(ids.shape),
                    "whole_cache": report.ratio,
                    "compressed_share": report.compressed_share,
                    "kl": kl,
                    "kl_se": statistics.stdev(part[0] for part in figures) / len(figures) ** 0.5,
                    "top1": top1,
                    "nll_change": nll / full_nll - 1,
                    "predicted_kept": [round(plan.predicted_kept, 4) for plan in plans],
                    "achieved_kept": [round(plan.achieved_kept, 4) for plan in plans],
                    "achieved_error": [round(plan.achieved_error, 4) for plan in plans],
                    "left_alone": sum(plan.is_left_alone for plan in plans),
                }
            )
            line = (
                f"{name:40} {kind:24} {report.ratio:7.1%} {report.compressed_share:7.1%} KL {kl:.5f} top-1 {top1:.3f}"
            )
            print(line, flush=True)
    return results


ROPE, SCOPES = ("stripped", "rotated"), ("batch", "intra", "same_index")
FUSED = ("6 passages in 8 orders, whole blocks", "6 passages in 8 orders, anywhere", "unrelated")


@torch.no_grad()
def cost(arguments) -> list[dict]:
    """Seconds of a prefill and of a step, and bytes that the allocator holds."""
    from shapes import new_model

    model, results = new_model(arguments.num_layers), []
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(5, 1000, (64, 256), generator=generator)
    mixed = torch.stack([pool[torch.randperm(64, generator=generator)[:8]].flatten() for _ in range(32)]).cuda()
    shared = torch.cat([mixed[:1, :1920].expand(32, -1), mixed[:, :128]], dim=1)
    kinds = {"DynamicCache": None, "exact": {}, "error 0.3": {"max_relative_error": 0.3}}
    kinds["target_ratio 0.3"] = {"target_ratio": 0.3}
    named = ("8 of 64 passages each, 32 rows of 2,048", mixed), ("1,920 tokens in common", shared)
    for (batch, ids), attention in product(named, ("sdpa", "deltakv")):
        model.set_attn_implementation(attention)
        for kind, options in kinds.items():
            seconds, steps = [], []
            for _ in range(3):
                cache = None
                held, started = torch.cuda.memory_allocated(), _now()
                cache = DynamicCache(config=model.config)
                if options is not None:
                    cache = JointEncodedCache(model, **options)
                model(ids, past_key_values=cache, logits_to_keep=1)
                seconds.append(_now() - started)
                allocated = torch.cuda.memory_allocated() - held
            for _ in range(48):
                started = _now()
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
                steps.append(_now() - started)
            result = {
                "batch": batch,
                "attention": attention,
                "cache": kind,
                "layers": arguments.num_layers,
                "prefill_s": min(seconds[1:]),
                "step_ms": 1000 * statistics.median(steps[4:]),
                "allocated_mib": allocated / 2**20,
            }
            if options is not None:
                result["whole_cache"] = cache.memory_report().ratio
                result["kept"] = [plan.achieved_kept for plan in cache.rate_distortion()]
            results.append(result)
            print(result, flush=True)
            del cache
    return results


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    made = commands.add_parser("quality")
    made.add_argument("ids", type=Path, help="token ids of texts by name, JSON")
    made.add_argument("--device")
    made.add_argument("--batch", action="append", help="only this one; may be repeated")
    made.add_argument("--cache", action="append", help="only this one; may be repeated")
    made.set_defaults(run=quality, dtype=torch.float32)
    timed = commands.add_parser("cost")
    timed.add_argument("--num-layers", type=int, default=16)
    timed.set_defaults(run=cost, device="cuda", dtype=torch.bfloat16)
    for command in (made, timed):
        command.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results, device = arguments.run(arguments), pick_device(arguments.device)
    if arguments.out:
        what = {"command": shlex.join(["python", *sys.argv]), "environment": environment(device, arguments.dtype)}
        write_atomically(arguments.out, (json.dumps(what | {"results": results}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
