"""Time and memory of a cache: prefill, peak, bytes held and the decode step, beside `DynamicCache`.

`python -m deltakv_hf.evaluation.steps --model demo --context 4096 --out FILE.json` runs it; `--shape 8b` measures the
layer shape of Llama-3.1-8B with random weights instead of a real model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .. import DeltaKVCache, KVCompressor, __version__
from ..files import write_atomically


def synchronize(device: torch.device) -> None:
    """Waits for what runs on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_steps(
    model: PreTrainedModel, ids: torch.Tensor, make_caches: dict[str, Callable[[], Cache]], num_steps: int = 24
) -> dict[str, dict[str, float]]:
    """Prefills `ids` with each cache, then decodes with all of them in turn, so that noise hits each alike.

    Args:
        model: a causal language model.
        ids: prompt `[n]` int64.
        make_caches: function that makes an empty cache, by name.
        num_steps: decode steps per cache; the first four are not counted.

    Returns:
        by name: `prefill_s`, `step_ms` (median), `step_ms_min`, and on CUDA the bytes `held_bytes` (allocator, after
        the prefill) and `peak_bytes` (most during the prefill), both beyond the model; caches with a report add
        `stored_bytes` and `dense_bytes`.
    """
    device, results, caches = model.device, {}, {}
    ids = ids.to(device)[None]
    token = ids[:, -1:]
    for name, make_cache in make_caches.items():
        cuda = device.type == "cuda"
        cache = make_cache()
        if cuda:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        start = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize(device)
        results[name] = {"prefill_s": time.perf_counter() - start}
        if cuda:
            results[name]["held_bytes"] = torch.cuda.memory_allocated(device) - before
            results[name]["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        if hasattr(cache, "memory_report"):
            report = cache.memory_report()
            results[name] |= {"stored_bytes": report.stored_bytes, "dense_bytes": report.dense_bytes}
        caches[name] = cache
    times = {name: [] for name in caches}
    for _ in range(num_steps):
        for name, cache in caches.items():
            synchronize(device)
            start = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    for name, values in times.items():
        results[name] |= {"step_ms": statistics.median(values[4:]), "step_ms_min": min(values[4:])}
    return results


def environment(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Device, dtype and versions that a figure must carry."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    names = [name for name in ("torch", "transformers", "triton") if find_spec(name)]
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "deltakv-hf": __version__,
    }


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo`, a model id or a folder")
    parser.add_argument("--shape", choices=["8b"], help="random weights of this shape instead: 8b")
    parser.add_argument("--layers", type=int, default=32, help="layers with --shape")
    parser.add_argument("--compressor", help="for our cache: bundled name, folder or id on the Hub")
    parser.add_argument("--context", type=int, default=4096, help="tokens of the prompt")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.shape:
        from .shapes import shape_model

        model = shape_model(args.shape, device, dtype, args.layers)
    else:
        from .model import load_by_name

        model = load_by_name(args.model, dtype, device)[0]
    # the cost of a step does not depend on which tokens are read
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (args.context,), generator=generator)
    compressor = KVCompressor.from_pretrained(args.compressor) if args.compressor else None
    caches = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "DeltaKVCache": lambda: DeltaKVCache(model, compressor=compressor),
    }
    result = {
        "command": "python -m deltakv_hf.evaluation.steps " + " ".join(sys.argv[1:]),
        "environment": environment(device, dtype),
        "context": args.context,
        "caches": measure_steps(model, ids, caches),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        write_atomically(args.out, text.encode())


if __name__ == "__main__":
    main()
