"""What calibrated compressors of SmolLM2-135M-Instruct cost in bytes and in predictions, with and without references.

    python docs/benchmarks/compressors.py --train corpus/train --heldout corpus/heldout --out compressors.json

on a GPU, about eight minutes (`examples/build_corpus.py corpus` makes the texts). Predictions are of the model in
float32, shares of bytes of the model in bfloat16. `--shape 8b` measures instead how long calibration takes in the layer
shape of Llama-3.1-8B with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

from deltakv_hf import DeltaKVCache, KVCompressor
from deltakv_hf.calibration.texts import read_documents, token_windows
from deltakv_hf.evaluation.fidelity import measure_fidelity
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.steps import environment, shape_model
from deltakv_hf.evaluation.windows import text_windows
from deltakv_hf.files import write_atomically

SHARES = (0.125, 0.095, 0.066, 0.047)


def repeated(ids: torch.Tensor) -> torch.Tensor:
    """A window whose context holds a text twice, one token apart; the same tokens are predicted."""
    return torch.cat([ids[:1536], ids[1:1537], ids[1537:2561]])


def compare(options) -> dict:
    """Fidelity at every share of bytes."""
    model, tokenizer = load_by_name(options.model, torch.float32, options.device)
    half, _ = load_by_name(options.model, torch.bfloat16, options.device)
    documents = read_documents(sorted(options.train.glob("*.txt")))
    windows, _ = token_windows(
        tokenizer, documents, num_tokens=options.num_tokens, num_uncounted=1024, window=4096, num_held_out=0
    )
    texts = sorted(options.heldout.glob("*.txt"))
    test = [window for path in texts for window in text_windows(tokenizer, path, 4096, 2)]
    sets = {"text": test, "repeated": [repeated(window) for window in test]}
    reading = {"sensitivity_windows": options.sensitivity_windows, "draws": options.draws}
    rows = []
    with tempfile.TemporaryDirectory() as workspace:
        for stride in (1, 8):
            for share in SHARES:
                began = time.perf_counter()
                made = KVCompressor.calibrate(
                    model,
                    windows,
                    ratio=1 / share,
                    reference_stride=stride,
                    measured_windows=0,
                    workspace=workspace,
                    **reading,
                )
                row = {"reference_stride": stride, "compressed_share": made.report.share}
                row["layers_with_references"] = sum(layer.uses_references for layer in made.report.layers)
                row |= {"compressor_bytes": made.nbytes, "seconds": time.perf_counter() - began}
                row["seconds_by_stage"] = made.config["calibration"]["seconds"]
                held = measure_fidelity(half, test[:1], {"": lambda made=made: DeltaKVCache(half, compressor=made)})[""]
                row |= {"whole_cache_share": held.mean("stored_share"), "region_share": held.mean("compressed_share")}
                for name, measured in sets.items():
                    caches = {"": lambda made=made: DeltaKVCache(model, compressor=made)}
                    row[name] = measure_fidelity(model, measured, caches)[""].summary()
                    figures = row[name]
                    print(
                        f"stride {stride}, {row['region_share']:.2%}, whole {row['whole_cache_share']:.2%}, {name}: "
                        f"KL {figures['kl']:.5f} ± {figures['kl_se']:.5f}, top-1 {figures['top1']:.4f}, "
                        f"NLL {figures['nll_change']:+.3%}, {row['seconds']:.0f} s",
                        flush=True,
                    )
                rows.append(row)
    how = {"windows": len(test), "calibration_windows": list(windows.shape)} | reading
    return {"environment": environment(model.device, model.dtype)} | how | {"results": rows}


def time_shape(options) -> dict:
    """Seconds of a calibration on random weights and random tokens."""
    model = shape_model(options.shape, 32, torch.device(options.device), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, model.config.vocab_size, (-(-options.num_tokens // 3072), 4096), generator=generator)
    began = time.perf_counter()
    made = KVCompressor.calibrate(model, windows, ratio=10, measured_windows=0)
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "seconds_by_stage": made.config["calibration"]["seconds"]}
    result |= {"compressor_bytes": made.nbytes, "compressed_share": made.report.share}
    if model.device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(result, flush=True)
    return {"environment": environment(model.device, model.dtype), "windows": list(windows.shape)} | result


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="`demo`, an id on the Hub or a folder")
    parser.add_argument("--train", type=Path, help="folder of texts to calibrate on")
    parser.add_argument("--heldout", type=Path, help="folder of texts to measure on")
    parser.add_argument("--shape", help="measure the time of this shape instead: 8b")
    parser.add_argument("--num-tokens", type=int, default=120_000, help="to calibrate on")
    parser.add_argument("--sensitivity-windows", type=int, default=40)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if not options.shape and not (options.train and options.heldout):
        parser.error("--train and --heldout are needed without --shape")
    result = time_shape(options) if options.shape else compare(options)
    result = {"command": shlex.join(["python", "docs/benchmarks/compressors.py", *sys.argv[1:]])} | result
    write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
