"""A chat whose cache grows from turn to turn: python examples/chat.py [--interactive] [--model ID]

A turn feeds only what is new, and what is held is printed after it. Where a template rewrites what was said, the cache
is cropped to what stayed the same.
"""

import argparse
from collections.abc import Iterator
from itertools import takewhile

import torch
from transformers import TextStreamer

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_by_name

SCRIPT = (
    "I have flour, eggs, milk, two apples and some sugar. What can I bake this afternoon?",
    "Write the recipe down in numbered steps.",
    "My oven is broken. How do I make it in a pan?",
)


def questions(interactive: bool) -> Iterator[str]:
    if interactive:
        yield from iter(lambda: input("\n> "), "")
    else:
        for question in SCRIPT:
            print(f"\n> {question}")
            yield question


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat with a compressed cache.")
    parser.add_argument("--interactive", action="store_true", help="ask yourself; an empty line ends the chat")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    parser.add_argument("--max-new-tokens", type=int, default=120, help="longest answer")
    args = parser.parse_args()
    model, tokenizer = load_by_name(args.model)
    cache, messages, seen = DeltaKVCache(model), [], torch.empty(1, 0)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for question in questions(args.interactive):
        messages.append({"role": "user", "content": question})
        form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **form).to(model.device)
        pairs = zip(seen[0].tolist(), inputs["input_ids"][0].tolist(), strict=False)
        num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache.crop(min(0, num_same - cache.get_seq_length()))
        how = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": streamer}
        seen = model.generate(**inputs, past_key_values=cache, **how)
        answer = seen[0, inputs["input_ids"].shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        report = cache.memory_report()
        held = f"{report.stored_bytes / 2**20:.1f} MiB for {report.tokens} tokens"
        print(f"[{held}, {report.ratio:.0%} of a full cache; {report.compressed_tokens} tokens compressed]")


if __name__ == "__main__":
    main()
