"""Presses of kvpress, measured in a process of their own: kvpress does not run on the transformers that we need.

`python press_worker.py JOB` reads what to do from a JSON file and prints a line of JSON for each window or context as
soon as it is measured. The script imports nothing of the package that it lies in: `press_process.py` starts it in the
environment that `deltakv eval peers` makes.

A press compresses behind an exact prefill of the whole context and knows no question. What follows is fed on top of
what it kept, at its true positions: `position_ids` count the tokens seen, as in kvpress' own pipeline.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # a script's own folder is searched first, and `kernels.py` in ours would hide a package of that name
    sys.path = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]

import contextlib
import copy
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LOGIT_TILE = 128
PACKAGES = ("kvpress", "transformers", "torch", "tokenizers", "huggingface_hub", "datasets")

# of the module kvpress and the share to drop
PRESSES = {
    "snapkv": lambda k, ratio: k.SnapKVPress(compression_ratio=ratio),
    "chunkkv": lambda k, ratio: k.ChunkKVPress(press=k.SnapKVPress(compression_ratio=ratio)),
    "expected_attention": lambda k, ratio: k.ExpectedAttentionPress(compression_ratio=ratio),
    "kvzip": lambda k, ratio: k.KVzipPress(compression_ratio=ratio),
    "keydiff": lambda k, ratio: k.KeyDiffPress(compression_ratio=ratio),
    "streaming_llm": lambda k, ratio: k.StreamingLLMPress(compression_ratio=ratio),
    "think": lambda k, ratio: k.ThinKPress(key_channel_compression_ratio=ratio),
}


def make_press(kind: str, ratio: float) -> Callable:
    """The press called `kind` that drops the share `ratio`: called with a model, a context manager around a prefill."""
    import kvpress

    return PRESSES[kind](kvpress, ratio)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: list[int], press: Callable | None = None) -> DynamicCache:
    """A cache with `ids`, read in one call and compressed by `press`."""
    cache, ids = DynamicCache(config=model.config), torch.tensor([ids], device=model.device)
    with press(model) if press else contextlib.nullcontext():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def feed_behind(model: PreTrainedModel, ids: list[int], cache: DynamicCache, seen: int, kept: int) -> torch.Tensor:
    """Feeds `ids` behind `seen` tokens, of which `cache` may hold less; returns the last logits `[kept, vocab]`."""
    positions = torch.arange(seen, seen + len(ids), device=model.device)[None]
    feed = {"input_ids": torch.tensor([ids], device=model.device), "position_ids": positions, "past_key_values": cache}
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    try:
        return model(**feed, use_cache=True, logits_to_keep=kept).logits[0]
    except ValueError:
        # KVzip masks by a key that all queries of a call point away from; where it finds none, calls become shorter
        if len(ids) == 1:
            raise
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    half = len(ids) // 2
    first = feed_behind(model, ids[:half], cache, seen, half)
    return torch.cat([first, feed_behind(model, ids[half:], cache, seen + half, len(ids) - half)])[-kept:]


def compare(logits: torch.Tensor, full_logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """What `compare` in `fidelity.py` gives, by name."""
    tiles = []
    for start in range(0, len(targets), LOGIT_TILE):
        tile = slice(start, start + LOGIT_TILE)
        p, q = (torch.log_softmax(x[tile].float(), dim=-1) for x in (full_logits, logits))
        true = targets[tile, None]
        kl, same = (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).float()
        figures = torch.stack([kl, same, -q.gather(1, true)[:, 0], -p.gather(1, true)[:, 0]])
        tiles.append(figures.cpu().double())
    return dict(zip(("kl", "top1", "nll", "full_nll"), torch.cat(tiles, dim=1).mean(1).tolist(), strict=True))


def score_item(model: PreTrainedModel, cache: DynamicCache, seen: int, item: dict) -> dict:
    """What `score_item` in `scores.py` gives, by name; `cache` stays as it is."""
    fed, answer = item["question"] + item["answer"][:-1], torch.tensor(item["answer"], device=model.device)
    logits = feed_behind(model, fed, copy.deepcopy(cache), seen, len(answer)).float()
    hits = logits.argmax(-1) == answer
    nll = torch.nn.functional.cross_entropy(logits, answer).item()
    return {"correct": bool(hits.all()), "token_accuracy": hits.float().mean().item(), "nll": nll}


def held_bytes(model: PreTrainedModel, cache: DynamicCache) -> int:
    """Bytes of the keys and values that `cache` holds, and of what a press masks by.

    Presses that drop other tokens in each head keep all of them, with a list of those to be masked on each layer. What
    KVzip read the context again with is cut off: the next step lets go of it.
    """
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for module in model.modules():
        tensors += getattr(module, "masked_key_indices", None) or ()
    return sum(tensor.nbytes for tensor in tensors)


def measure_window(model: PreTrainedModel, window: dict, presses: dict[str, Callable]) -> dict[str, dict]:
    """Fidelity of each press to the full cache: the figures of `WindowFidelity`, by press."""
    ids, context = window["ids"], window["context"]
    rest, targets = ids[context:], torch.tensor(ids[context + 1 :], device=model.device)

    def read(press: Callable | None = None) -> tuple[torch.Tensor, int]:
        cache = prefill(model, ids[:context], press)
        held = held_bytes(model, cache)
        return feed_behind(model, rest, cache, context, len(rest))[:-1], held

    full_logits, dense = read()
    found = {}
    for name, press in presses.items():
        with named(name):
            logits, held = read(press)
        found[name] = compare(logits, full_logits, targets) | {"stored_share": held / dense}
    return found


def measure_context(model: PreTrainedModel, context: dict, presses: dict[str, Callable]) -> dict[str, dict]:
    """Scores of a context's items, with the full cache (None) and each press."""
    ids, found, dense = context["ids"], {}, None
    for name, press in {"": None, **presses}.items():
        with named(name):
            cache = prefill(model, ids, press)
            held = held_bytes(model, cache)
            dense = dense or held
            items = [score_item(model, cache, len(ids), item) for item in context["items"]]
        found[name] = {"items": items, "stored_share": held / dense}
    return {"full": found.pop("")["items"], "presses": found}


@contextlib.contextmanager
def named(press: str) -> Iterator[None]:
    """Puts the press into an error that comes out of it."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{press or 'full cache'}: {type(error).__name__}: {error}") from error


def load_model(job: dict, folder: str) -> PreTrainedModel:
    """The model of a job; `folder` takes what is written for it."""
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    if any(kind == "kvzip" for kind, _ in job["presses"].values()):
        # KVzip reads the tokenizer where the config says the model is from, and takes the first tokens of a context for
        # those of the chat template, which the contexts here have not
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        model.config.name_or_path = folder
    return model.to(job["device"]).eval()


def check(folder: str) -> dict[str, dict]:
    """Versions, and for each press None, or the error with which it stopped on a tiny model."""
    # without it nothing runs
    importlib.import_module("kvpress")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    tokenizer.save_pretrained(folder)
    model.config.name_or_path = folder
    window = {"ids": torch.randint(64, (112,)).tolist(), "context": 100}
    found = {}
    for kind in PRESSES:
        try:
            presses = {"none": make_press(kind, 0.0), "half": make_press(kind, 0.5)}
            measured = measure_window(model, window, presses)
            wrong = abs(measured["none"]["kl"]) > 1e-6 or not 1e-6 < measured["half"]["kl"] < float("inf")
            found[kind] = f"is wrong on a tiny model: {measured}" if wrong else None
        except Exception as error:
            found[kind] = str(error)
    return {"versions": {name: _version(name) for name in PACKAGES}, "presses": found}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)


def run(job: dict) -> Iterator[dict]:
    """The answers to a job, one by one."""
    with tempfile.TemporaryDirectory() as folder:
        if job.get("check"):
            yield check(folder)
            return
        model = load_model(job, folder)
        presses = {name: make_press(kind, ratio) for name, (kind, ratio) in job["presses"].items()}
        for window in job.get("windows", ()):
            yield measure_window(model, window, presses)
        for context in job.get("contexts", ()):
            yield measure_context(model, context, presses)


def main(path: str) -> None:
    """Prints the answers to the job in the file `path`."""
    # what libraries print is no answer: it goes where errors go
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    for answer in run(job):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
