"""Generates with a compressed cache and shows what it holds: python examples/quickstart.py [--model ID]"""

import argparse

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_by_name


def main() -> None:
    parser = argparse.ArgumentParser(description="Generates with a compressed cache and shows what it holds.")
    parser.add_argument("--model", default="demo", help="id on the Hub or folder (the model that comes with the demo)")
    model, tokenizer = load_by_name(parser.parse_args().model)
    notes = "\n".join(f"Day {day}: the wind was calm and the boat made {day % 7 + 3} miles." for day in range(1, 41))
    messages = [{"role": "user", "content": f"{notes}\n\nSummarize this log book in one sentence."}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)

    cache = DeltaKVCache(model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=60, do_sample=False)

    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print()
    print(cache.memory_report())


if __name__ == "__main__":
    main()
