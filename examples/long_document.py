"""Several questions on a document that is read once: python examples/long_document.py [--model ID] [--tokens N]

Each question continues a copy of the compressed cache. The document is from Jane Austen's *Persuasion*, with three
made-up facts in it that are asked for.
"""

import argparse
import copy
import time

import torch

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.texts import BUNDLED_TEXT

FACTS = {
    "The phone number of the hotel in Lisbon is": "2614",
    "The door code of the laboratory is": "3957",
    "The height of the mountain in metres is": "7518",
}


def document(tokenizer, num_tokens: int) -> torch.Tensor:
    """Ids `[1, about num_tokens]` of the text with a fact after each quarter of it."""
    text = BUNDLED_TEXT.read_text(encoding="utf-8")
    paragraphs = tokenizer.decode(tokenizer(text).input_ids[:num_tokens]).split("\n\n")
    for number, (subject, value) in enumerate(FACTS.items(), start=1):
        place = number * len(paragraphs) // (len(FACTS) + 1)
        paragraphs.insert(place, f"{subject} {value}. Remember it: {subject} {value}.")
    return tokenizer("\n\n".join(paragraphs), return_tensors="pt").input_ids


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Questions on a document that is read once.")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the document")
    args = parser.parse_args()
    model, tokenizer = load_by_name(args.model)
    ids = document(tokenizer, args.tokens).to(model.device)

    began, cache = time.perf_counter(), DeltaKVCache(model)
    model(ids, past_key_values=cache, logits_to_keep=1)
    print(f"read {ids.shape[1]:,} tokens in {time.perf_counter() - began:.1f} s\n{cache.memory_report()}\n")

    for subject, value in FACTS.items():
        began, branch = time.perf_counter(), copy.deepcopy(cache)
        asked = tokenizer(f"\n\nAnswer: {subject}", return_tensors="pt").input_ids.to(model.device)
        whole = torch.cat([ids, asked], dim=1)
        output = model.generate(whole, past_key_values=branch, max_new_tokens=5, do_sample=False)
        answer = tokenizer.decode(output[0, whole.shape[1] :]).strip().split(".")[0]
        print(f"{subject} ... {answer} (true: {value}; {time.perf_counter() - began:.1f} s)")


if __name__ == "__main__":
    main()
