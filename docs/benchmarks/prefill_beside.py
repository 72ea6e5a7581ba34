"""What coding a prompt costs behind each layer, and beside the next one on a stream of its own.

python docs/benchmarks/prefill_beside.py out.json

32,768 tokens through four layers in the shape of Llama-3.1-8B, random weights in bfloat16, 409 bytes a token, without
references and with one token in ten as reference; runs in turns, the first two of 32 are not counted.
"""

import json
import statistics
import sys
import time

import torch
from shapes import new_model, random_compressor
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.steps import environment
from deltakv_hf.side_stream import SideStream

NUM_TOKENS, NUM_LAYERS, TURNS = 32768, 4, 32
BESIDE = SideStream.run


def behind(self, device, work, *read) -> None:
    """`SideStream.run` without a stream."""
    work()


def tensors(cache) -> list[torch.Tensor]:
    states = [layer.state for layer in cache.layers]
    return [part for state in states for part in (*state.raw().values(), *vars(state.store).values())]


def measure(model, ids: torch.Tensor, stride: int) -> dict:
    compressor = random_compressor(model, stride)
    kinds = {
        "dynamic": (lambda: DynamicCache(config=model.config), behind),
        "inline": (lambda: DeltaKVCache(model, compressor=compressor), behind),
        "beside": (lambda: DeltaKVCache(model, compressor=compressor), BESIDE),
        "static beside": (lambda: DeltaKVCache(model, compressor=compressor, max_cache_len=NUM_TOKENS + 64), BESIDE),
    }
    spans, peak, last = {name: [] for name in kinds}, {}, {}
    for _ in range(TURNS):
        for name, (make, SideStream.run) in kinds.items():
            last.pop(name, None)
            cache = make()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            model(ids, past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            spans[name].append(1000 * (time.perf_counter() - began))
            peak[name], last[name] = (torch.cuda.max_memory_allocated() - before) / 2**20, cache
    median = {name: statistics.median(times[2:]) for name, times in spans.items()}
    expected = tensors(last["inline"])
    same = [all(map(torch.equal, tensors(last[name]), expected)) for name in ("beside", "static beside")]
    share = {name: span / median["dynamic"] - 1 for name, span in median.items()}
    return {"median_ms": median, "share": share, "peak_mib": peak, "ms": spans, "same": same}


with torch.no_grad():
    model, ids = new_model(NUM_LAYERS), torch.randint(0, 1000, (1, NUM_TOKENS), device="cuda")
    made = {"command": "python docs/benchmarks/prefill_beside.py out.json", "environment": environment(model.device)}
    for stride in (1, 10):
        made[f"stride {stride}"] = measure(model, ids, stride)
    with open(sys.argv[1], "w") as file:
        json.dump(made, file, indent=1)
