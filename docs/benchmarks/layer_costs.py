"""What a compressed layer costs beside a dense one, in the layer shape of Llama-3.1-8B with random weights in bfloat16.

python docs/benchmarks/layer_costs.py out.json

Prefill of 32,768 tokens through four layers with `DynamicCache` and with compressors of 409 bytes a token, without
references and with one token in ten as reference, on the wall and by the GPU's own clock; then, behind 131,072 tokens
of one layer, what is alive in a decode step and in a chunk of 2,048 queries beyond what is stored.
"""

import json
import statistics
import sys
import time
from functools import partial

import torch
from shapes import new_model, random_compressor
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.steps import environment

PREFILL, LONG, CHUNK, REPEATS = 32768, 131072, 2048, 6
STRIDES = {"no references": 1, "references, one in ten": 10}


def timed(run) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return round(1000 * (time.perf_counter() - began), 2)


def alive(run) -> float:
    """MiB beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def busy(run) -> float:
    """Milliseconds that the GPU works, without what it waits for the host."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return round(sum(event.self_device_time_total for event in profile.key_averages()) / 1000, 2)


def prefill() -> dict:
    model, ids = new_model(4), torch.randint(0, 1000, (1, PREFILL), device="cuda")
    makers = {"DynamicCache": lambda: DynamicCache(config=model.config)}
    for name, stride in STRIDES.items():
        compressor = random_compressor(model, stride)
        makers[name] = lambda compressor=compressor: DeltaKVCache(model, compressor=compressor)
    wall, gpu = {name: [] for name in makers}, {name: [] for name in makers}
    # in turns, so that noise hits each alike; the first run compiles
    for _ in range(REPEATS):
        for name, make in makers.items():
            for measure, found in ((timed, wall), (busy, gpu)):
                run = partial(model, ids, past_key_values=make(), logits_to_keep=1)
                found[name].append(measure(run))
    made = {}
    for clock, found in (("wall", wall), ("gpu", gpu)):
        median = {name: statistics.median(spans[1:]) for name, spans in found.items()}
        shares = {name: round(median[name] / median["DynamicCache"] - 1, 3) for name in STRIDES}
        made[clock] = {"ms": found, "median_ms": median, "share_of_prefill": shares}
    return made


def read_once(reader) -> dict[str, float]:
    one, many = (torch.randn(1, 32, n, 128, device="cuda", dtype=torch.bfloat16) for n in (1, CHUNK))

    def step() -> None:
        reader.attend(one, None, 0.088)

    def chunk() -> None:
        reader.attend(many, None, 0.088)

    for run in (step, chunk, reader.decode):
        run()
    return {
        "decode_step_mib": alive(step),
        "chunk_in_parts_mib": alive(chunk),
        "chunk_in_parts_ms": timed(chunk),
        "dense_mib": alive(reader.decode),
        "dense_ms": timed(reader.decode),
    }


def long_past() -> dict:
    model, ids, found = new_model(1), torch.randint(0, 1000, (1, LONG), device="cuda"), {}
    for name, stride in STRIDES.items():
        cache = DeltaKVCache(model, compressor=random_compressor(model, stride))
        for start in range(0, LONG, 16384):
            model(ids[:, start : start + 16384], past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        layer = cache.layers[0]
        found[name] = read_once(layer._reader(layer.state, cache._ledger.layout))
    return found


with torch.no_grad():
    command, device = "python docs/benchmarks/layer_costs.py out.json", torch.device("cuda")
    made = {"command": command, "environment": environment(device)}
    for part in (prefill, long_past):
        made[part.__name__] = part()
        with open(sys.argv[1], "w") as file:
            json.dump(made, file, indent=1)
