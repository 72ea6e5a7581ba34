"""Models and compressors in the layer shape of known models, with random weights: what time and memory depend on."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from .. import KVCompressor
from ..compressor.base_model import describe_model
from ..compressor.codebook import Codebook
from ..compressor.transform_tensors import transform_tensors
from ..dispatch import grid_limit
from .kernels import RUNS

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512},
}


def shape_model(
    shape: str, device: torch.device, dtype: torch.dtype, num_layers: int | None = None, max_positions: int = 131072
) -> PreTrainedModel:
    """A model with random weights.

    Args:
        shape: `8b` (Llama-3.1-8B) or `tiny` (for tests); heads are alike in both, their number is not.
        num_layers: other than that model's.
    """
    sizes = SHAPES[shape]
    config = LlamaConfig(
        **sizes | ({} if num_layers is None else {"num_hidden_layers": num_layers}),
        num_attention_heads=sizes["hidden_size"] // 128,
        num_key_value_heads=max(1, sizes["hidden_size"] // 512),
        head_dim=128,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_compressor(model: PreTrainedModel, stride: int = 1) -> KVCompressor:
    """At a tenth of a 16-bit cache of the 8b shape: 409 bytes a token, one in `stride` a reference."""
    generator, config = torch.Generator().manual_seed(0), model.config.get_text_config()
    width = 2 * config.num_key_value_heads * config.head_dim

    def book() -> Codebook:
        starts, tables, steps, place = [], [], [], 0
        for groups, size in RUNS:
            groups = max(1, groups * width // 2048)
            limit = grid_limit(size)
            table = torch.randint(-limit, limit + 1, (groups, 256, size), generator=generator)
            if place + groups * size > width:
                break
            starts.append(place)
            tables.append(table.to(torch.int8 if limit <= 127 else torch.int16))
            steps.append(torch.full((groups,), 1 / limit))
            place += groups * size
        return Codebook(starts, tables, steps, width)

    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0][None]
    books = {"reference": book(), "residual": book() if stride > 1 else Codebook([], [], [], width)}
    prediction = torch.rand(width, generator=generator)
    made, starts = transform_tensors(0, torch.zeros(width), torch.ones(width), basis, prediction, books)
    num_layers = config.num_hidden_layers
    tensors = {
        name.replace("layers.0.", f"layers.{layer_idx}."): tensor
        for layer_idx in range(num_layers)
        for name, tensor in made.items()
    }
    record = {"widths": [width // 2] * 2, "reference_stride": stride, **starts}
    description = {"kind": "transform", "model": describe_model(model), "layers": [record] * num_layers}
    return KVCompressor(description, tensors)
