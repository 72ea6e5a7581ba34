"""What the README shows runs."""

import copy
import re
from pathlib import Path

import torch
from compressors import random_compressor
from families import FAMILIES
from helpers import TIGHT, prompt
from models import VOCAB_SIZE, new_model, saved_byte_llama, tiny_model
from modes import MODES

from deltakv_hf import DeltaKVCache, KVCompressor

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The code under a heading."""
    return re.search(rf"^#+ {heading}\n.*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE).group(1)


def test_every_block_has_a_test():
    used = set(re.findall(r'block\("([^"]+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert len({block(heading) for heading in used}) == README.count("```python")


def test_the_first_screen(tmp_path, monkeypatch, capsys):
    """With folders and a file that are called as in the README."""
    monkeypatch.chdir(tmp_path)
    saved_byte_llama(tmp_path / "meta-llama" / "Llama-3.1-8B-Instruct")
    (tmp_path / "report.txt").write_text("It rains, it pours. " * 40, encoding="utf-8")
    names = {}
    exec(block("deltakv-hf"), names)
    assert names["cache"].memory_report().compressed_tokens > 500
    assert "stored" in capsys.readouterr().out


def test_requests_that_have_text_in_common():
    model, inputs = tiny_model("llama"), {"input_ids": prompt(1, 128), "attention_mask": torch.ones(1, 128)}
    names = {"model": model, "inputs": inputs}
    exec(block("Requests that have text in common"), names)
    # eight rows hold the prompt once, and each has a block of its own
    assert names["out"].shape[0] == 8 and names["cache"].num_blocks == 8 + 8


def test_use_it_like_any_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, ids = tiny_model("llama"), prompt(1, 120)
    cache = DeltaKVCache(model, **TIGHT)
    model(ids, past_key_values=cache)
    names = {"cache": cache, "model": model, "ids": ids, "copy": copy, "DeltaKVCache": DeltaKVCache}
    exec(block("Use it like any cache"), names)
    assert names["branch"].get_seq_length() == names["keys"].shape[2] == 70
    assert "tokens" in capsys.readouterr().out


def test_the_size_of_the_matrix():
    assert f"{len(FAMILIES)} model families in {len(MODES)} modes" in README


def test_a_tenth_of_the_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    texts = torch.randint(0, VOCAB_SIZE, (8, 400), generator=torch.Generator().manual_seed(0))
    names = {"model": model, "texts": texts, "DeltaKVCache": DeltaKVCache, "KVCompressor": KVCompressor}
    exec(block("A tenth of the memory"), names)
    model(prompt(1, 200), past_key_values=names["cache"])
    assert names["cache"].memory_report().compressed_share < 0.06  # of float32


def test_steps_at_the_speed_of_the_hardware():
    model = new_model("llama", "sdpa", 0)
    compressor, inputs = random_compressor(model), {"input_ids": prompt(1), "attention_mask": torch.ones(1, 48)}
    names = {"model": model, "compressor": compressor, "inputs": inputs, "DeltaKVCache": DeltaKVCache}
    exec(block("Steps at the speed of the hardware"), names)
    assert names["cache"].is_compileable and names["out"].shape[1] > 48
