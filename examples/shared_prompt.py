"""Requests behind one system prompt, which is stored once: python examples/shared_prompt.py [--model ID]

`JointEncodedCache` holds blocks of tokens that rows have in common once. Nothing is lost: the tokens are those of
`DynamicCache`, whose bytes stand beside.
"""

import argparse

import torch
from transformers import DynamicCache

from deltakv_hf import JointEncodedCache
from deltakv_hf.evaluation.model import load_by_name
from deltakv_hf.evaluation.texts import BUNDLED_TEXT

REQUESTS = (
    "Who wrote this?",
    "Describe Sir Walter Elliot in one sentence.",
    "In which English county does the family live?",
    "What is the mood of the text?",
    "List the daughters of the family.",
    "Suggest a title for this chapter.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests that share a system prompt.")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    model, tokenizer = load_by_name(parser.parse_args().model)
    system = f"Answer questions on this text.\n\n{BUNDLED_TEXT.read_text(encoding='utf-8')[:1800]}"
    chats = [[{"role": "system", "content": system}, {"role": "user", "content": request}] for request in REQUESTS]
    tokenizer.padding_side = "left"
    form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "padding": True}
    inputs = tokenizer.apply_chat_template(chats, **form).to(model.device)
    rows, columns = inputs["input_ids"].shape
    print(f"{rows} requests of {columns} tokens")

    outputs = []
    for cache in (DynamicCache(config=model.config), JointEncodedCache(model)):
        outputs.append(model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False))
        if isinstance(cache, JointEncodedCache):
            held = cache.memory_report().stored_bytes
        else:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        print(f"{type(cache).__name__:<18}{held / 2**20:8.1f} MiB")
    print("the same tokens" if torch.equal(*outputs) else "other tokens")
    answers = tokenizer.batch_decode(outputs[1][:, columns:], skip_special_tokens=True)
    for request, answer in zip(REQUESTS, answers, strict=True):
        print(f"\n{request}\n  {' '.join(answer.split())}")


if __name__ == "__main__":
    main()
