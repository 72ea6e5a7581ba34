"""`python -m deltakv_hf.evaluation TEXT...`: fidelity of `DeltaKVCache` on windows of text files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.progress import track

from .. import DeltaKVCache
from ..files import write_atomically
from .fidelity import measure_fidelity
from .model import load_demo_model, load_model
from .steps import environment
from .windows import text_windows


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="+", type=Path, help="text files; documents are separated by form feeds")
    parser.add_argument("--model", default="demo", help="`demo`, a model id or a folder")
    parser.add_argument("--windows", type=int, default=2, help="windows of each file")
    parser.add_argument("--context", type=int, default=3072, help="tokens stored before predicting")
    parser.add_argument("--predict", type=int, default=1024, help="tokens predicted after them")
    parser.add_argument("--prefill-chunk", type=int, default=0, metavar="N", help="feed the context N tokens at a time")
    parser.add_argument("--options", type=json.loads, action="append", help='of the cache, as JSON: {"nbits": 8}')
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    load = load_demo_model if args.model == "demo" else lambda **options: load_model(args.model, **options)
    model, tokenizer = load(dtype=getattr(torch, args.dtype), device=args.device)
    length = args.context + args.predict
    windows = [window for path in args.text for window in text_windows(tokenizer, path, length, args.windows)]
    caches = {
        json.dumps(options): lambda options=options: DeltaKVCache(model, **options) for options in args.options or [{}]
    }
    how = {"context": args.context, "prefill_chunk": args.prefill_chunk}
    results = measure_fidelity(model, windows, caches, **how, progress=track)
    rows = []
    for options, fidelity in results.items():
        print(f"\n{options}, {len(windows)} windows\n{fidelity}")
        rows.append({"options": json.loads(options), "windows": len(windows)} | fidelity.summary())
    if args.out:
        command = "python -m deltakv_hf.evaluation " + " ".join(sys.argv[1:])
        result = {"command": command, "environment": environment(model)} | how | {"results": rows}
        write_atomically(args.out, json.dumps(result, indent=2).encode())


if __name__ == "__main__":
    main()
