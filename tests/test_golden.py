"""A compressor folder and its codes as they were first written: what is stored must mean the same for ever.

`python tests/test_golden.py` writes both anew, which only a new version of the format may need.
"""

import json
from pathlib import Path

import torch
from compressors import append, decode, random_compressor
from models import tiny_model

from deltakv_hf import KVCompressor
from deltakv_hf.compressor.folder import CONFIG, TENSORS

GOLDEN = Path(__file__).parent / "golden"
NUM_TOKENS = 45


def given_tokens(width: int) -> torch.Tensor:
    """Two rows of numbers that every machine has exactly."""
    rows, tokens, numbers = (torch.arange(n) for n in (2, NUM_TOKENS, width))
    return ((rows[:, None, None] * 17 + tokens[:, None] * 131 + numbers * 37) % 61 - 30) / 16


def coded(compressor: KVCompressor) -> list[dict]:
    """Codes and decoded tokens of each layer; bytes as they lie in a file, the lowest of a number first."""
    layers = []
    for layer_idx, record in enumerate(compressor.config["layers"]):
        coder = compressor.layer(layer_idx, *record["widths"], torch.device("cpu"))
        tokens = given_tokens(coder.width)
        store = append(coder, tokens, [])
        stored = {
            name: part.contiguous().view(torch.uint8).numpy().tobytes().hex() for name, part in vars(store).items()
        }
        layers.append(stored | {"decoded": decode(coder, store, NUM_TOKENS)[:, -2:].flatten().tolist()})
    return layers


def test_old_codes_are_made_and_read_as_they_were():
    expected = json.loads((GOLDEN / "codes.json").read_text())
    found = coded(KVCompressor.from_pretrained(GOLDEN / "compressor"))
    assert len(found) == len(expected) == 2
    for layer, old in zip(found, expected, strict=True):
        # the order of a projection's sums is the machine's
        torch.testing.assert_close(torch.tensor(layer.pop("decoded")), torch.tensor(old.pop("decoded")))
        assert layer == old
    assert found[0]["reference_idx"] and not found[1]["reference_idx"]


def test_an_old_folder_is_written_again_byte_for_byte(tmp_path):
    KVCompressor.from_pretrained(GOLDEN / "compressor").save_pretrained(tmp_path / "c")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "c" / name).read_bytes() == (GOLDEN / "compressor" / name).read_bytes()


if __name__ == "__main__":
    made = random_compressor(tiny_model("llama"))
    made.save_pretrained(GOLDEN / "compressor")
    (GOLDEN / "compressor" / "README.md").unlink()
    (GOLDEN / "codes.json").write_text(json.dumps(coded(made), indent=1) + "\n")
