"""A model and compressors in the layer shape of Llama-3.1-8B with random weights, for the scripts beside this one."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deltakv_hf.evaluation.shapes import random_compressor

__all__ = ["new_model", "random_compressor"]

LONG = 262144


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
