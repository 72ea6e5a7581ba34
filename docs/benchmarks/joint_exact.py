"""Bytes of rows that begin alike beside `DynamicCache`, exact sharing, SmolLM2-135M-Instruct on the bundled text.

python docs/benchmarks/joint_exact.py out.json [NEW]

One prompt of 2,048 tokens with eight sampled continuations of up to NEW tokens (256), both caches with the same draws;
and a system prompt of 1,536 tokens in front of eight requests of 256. Shares are those of the whole cache.
"""

import json
import sys

import torch
from transformers import DynamicCache

from deltakv_hf import JointEncodedCache
from deltakv_hf.cli.chart import dense_bytes
from deltakv_hf.evaluation.model import load_demo_model
from deltakv_hf.evaluation.steps import environment
from deltakv_hf.evaluation.texts import BUNDLED_TEXT, read_text

ROWS, PROMPT, SYSTEM, REQUEST = 8, 2048, 1536, 256


def row(name: str, num_new: int, cache: JointEncodedCache, dense: DynamicCache, least: float) -> dict:
    """A line of the table; `least` is the share if every token were held once."""
    share = cache.memory_report().stored_bytes / dense_bytes(dense)
    found = {"batch": name, "new_tokens": num_new, "whole_cache": share, "least_possible": least}
    print(found, flush=True)
    return found


def continuations(model, ids: torch.Tensor, num_new: int) -> tuple[dict, bool]:
    """Both caches behind the same draws, and whether they gave the same ids."""
    made, caches = [], (JointEncodedCache(model), DynamicCache(config=model.config))
    for cache in caches:
        torch.manual_seed(0)
        # one more than is asked for: what is drawn last is in no cache
        options = {"do_sample": True, "num_return_sequences": ROWS, "max_new_tokens": num_new + 1, "pad_token_id": 0}
        made.append(model.generate(ids, past_key_values=cache, min_new_tokens=num_new + 1, **options))
    least = (PROMPT / ROWS + num_new) / (PROMPT + num_new)
    return row("one prompt, eight continuations", num_new, *caches, least), torch.equal(*made)


def requests(model, ids: torch.Tensor) -> dict:
    """A system prompt and texts that differ behind it."""
    own = ids[0, SYSTEM : SYSTEM + ROWS * REQUEST].view(ROWS, REQUEST)
    batch, caches = (
        torch.cat([ids[:, :SYSTEM].expand(ROWS, -1), own], 1),
        (
            JointEncodedCache(model),
            DynamicCache(config=model.config),
        ),
    )
    for cache in caches:
        model(batch, past_key_values=cache, logits_to_keep=1)
    return row("a system prompt, eight requests", 0, *caches, (SYSTEM / ROWS + REQUEST) / (SYSTEM + REQUEST))


def main() -> None:
    most = int(sys.argv[2]) if len(sys.argv) > 2 else 256
    model, tokenizer = load_demo_model()
    ids = torch.tensor([tokenizer(read_text(BUNDLED_TEXT), add_special_tokens=False).input_ids]).to(model.device)
    with torch.no_grad():
        rows, same = [requests(model, ids)], []
        for num_new in sorted({0, min(64, most), most}):
            found, is_same = continuations(model, ids[:, :PROMPT], num_new)
            rows.append(found)
            same.append(is_same)
    made = {"command": "python docs/benchmarks/joint_exact.py out.json", "environment": environment(model.device)}
    with open(sys.argv[1], "w") as file:
        json.dump(made | {"same_ids": all(same), "results": rows}, file, indent=1)


main()
