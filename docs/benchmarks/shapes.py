"""A model and compressors in the layer shape of Llama-3.1-8B with random weights, for the scripts beside this one."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltakv_hf import KVCompressor
from deltakv_hf.compressor.base_model import describe_model
from deltakv_hf.compressor.codebook import Codebook
from deltakv_hf.compressor.transform_tensors import transform_tensors
from deltakv_hf.dispatch import grid_limit
from deltakv_hf.evaluation.kernels import RUNS

WIDTH, LONG = 2048, 262144


def new_model(num_layers: int, device: str = "cuda"):
    """In bfloat16, with the attention `deltakv`."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=LONG,
        rope_theta=500000.0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("deltakv")
    return model


def random_compressor(model, stride: int) -> KVCompressor:
    """409 bytes a token, one in `stride` a reference."""
    generator = torch.Generator().manual_seed(0)

    def book() -> Codebook:
        starts, tables, steps, place = [], [], [], 0
        for groups, size in RUNS:
            limit = grid_limit(size)
            table = torch.randint(-limit, limit + 1, (groups, 256, size), generator=generator)
            starts.append(place)
            tables.append(table.to(torch.int8 if limit <= 127 else torch.int16))
            steps.append(torch.full((groups,), 1 / limit))
            place += groups * size
        return Codebook(starts, tables, steps, WIDTH)

    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][None]
    books = {"reference": book(), "residual": book() if stride > 1 else Codebook([], [], [], WIDTH)}
    prediction = torch.rand(WIDTH, generator=generator)
    made, starts = transform_tensors(0, torch.zeros(WIDTH), torch.ones(WIDTH), basis, prediction, books)
    num_layers = model.config.num_hidden_layers
    tensors = {
        name.replace("layers.0.", f"layers.{layer_idx}."): tensor
        for layer_idx in range(num_layers)
        for name, tensor in made.items()
    }
    record = {"widths": [WIDTH // 2] * 2, "reference_stride": stride, **starts}
    config = {"kind": "transform", "model": describe_model(model), "layers": [record] * num_layers}
    return KVCompressor(config, tensors)
