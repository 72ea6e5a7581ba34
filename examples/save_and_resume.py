"""A prompt's cache, saved, for another process to go on from: python examples/save_and_resume.py [--model ID]"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.texts import BUNDLED_TEXT


@torch.no_grad()
def save(model, tokenizer, path: Path) -> None:
    ids = tokenizer(BUNDLED_TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :1500].to(model.device)
    began, cache = time.perf_counter(), DeltaKVCache(model)
    model(ids, past_key_values=cache, logits_to_keep=1)
    print(f"read {ids.shape[1]:,} tokens in {time.perf_counter() - began:.2f} s")
    cache.save(path, input_ids=ids)
    dense = cache.memory_report().dense_bytes
    print(f"saved {path.stat().st_size / 2**20:.1f} MiB ({dense / 2**20:.1f} MiB as a DynamicCache)", flush=True)


def resume(model, tokenizer, path: Path) -> None:
    began, cache = time.perf_counter(), DeltaKVCache.load(path, model)
    print(f"loaded in {time.perf_counter() - began:.2f} s, in another process")
    ids = cache.saved_prompt.input_ids.to(model.device)
    asked = tokenizer(" In short, Sir Walter was", return_tensors="pt").input_ids.to(model.device)
    whole = torch.cat([ids, asked], dim=1)
    output = model.generate(whole, past_key_values=cache, max_new_tokens=30, do_sample=False)
    print(f"...{tokenizer.decode(output[0, ids.shape[1] :])}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A prompt's cache for another process.")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    parser.add_argument("--resume", type=Path, help="file of a saved cache")
    args = parser.parse_args()
    model, tokenizer = load_by_name(args.model)
    if args.resume:
        return resume(model, tokenizer, args.resume)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.cache"
        save(model, tokenizer, path)
        # the other process: this script again
        subprocess.run([sys.executable, __file__, "--model", args.model, "--resume", str(path)], check=True)


if __name__ == "__main__":
    main()
