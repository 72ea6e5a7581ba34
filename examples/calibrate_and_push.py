"""Fits a compressor to a model, saves and uploads it: python examples/calibrate_and_push.py [--repo OWNER/NAME]

Without `--text` it learns from the documentation that comes with Python, 2,048 tokens of it: enough to see it work, in
minutes on a CPU. For a compressor to keep take 100,000 tokens of text like yours (`--num-tokens`) and a GPU. Without
`--repo` nothing is uploaded.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from deltakv_hf import DeltaKVCache, KVCompressor
from deltakv_hf.calibration.texts import read_documents
from deltakv_hf.evaluation.model import load_by_name


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits a compressor to a model and shares it.")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="text files, documents separated by a line FF")
    parser.add_argument("--ratio", type=float, default=10, help="bytes of a 16-bit cache over those of the compressed")
    parser.add_argument("--num-tokens", type=int, default=2048, help="tokens to learn from")
    parser.add_argument("--window", type=int, default=512, help="tokens read at once")
    parser.add_argument("--out", type=Path, default=Path("my-compressor"), help="folder to save to")
    parser.add_argument("--repo", help="repository on the Hub to upload to; log in first: hf auth login")
    args = parser.parse_args()
    model, tokenizer = load_by_name(args.model)
    texts = read_documents(args.text) if args.text else {"topics of Python": list(topics.values())}

    compressor = KVCompressor.calibrate(
        model,
        texts,
        tokenizer=tokenizer,
        ratio=args.ratio,
        num_tokens=args.num_tokens,
        window=args.window,
        sensitivity_windows=2,
        measured_windows=2,
        progress=lambda stage, steps: print(f"{stage} ({steps})", flush=True) or (lambda: None),
    )
    print(compressor.config["measured"][0])
    compressor.save_pretrained(args.out)
    print(f"saved to {args.out}")

    name = str(args.out)
    if args.repo:
        print(f"uploaded: {compressor.push_to_hub(args.repo)}")
        name = args.repo
    # what anyone with this model does from now on
    cache = DeltaKVCache.from_pretrained(name, model=model)
    inputs = tokenizer(next(iter(texts.values()))[0][:2000], return_tensors="pt").to(model.device)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
    print(cache.memory_report())


if __name__ == "__main__":
    main()
