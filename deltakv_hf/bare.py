"""RoPE tables from a bare config, for callers that have no model object: one unpadded row, standard rotation."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .errors import UnsupportedModelError
from .rope import RopeForm
from .support import rope_parameters

# families that rotate whole heads in halves, every layer with the same table
FAMILIES = (
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
FORM = RopeForm("half", "halves")


class BareRope:
    """Tables of a config.

    Args:
        config: text config of one of `FAMILIES` with a RoPE type of `ROPE_TYPES`.
    """

    def __init__(self, config: PretrainedConfig):
        parameters = rope_parameters(config)
        types = [p.get("rope_type", "default") for p in parameters]
        partial = [p.get("partial_rotary_factor", 1.0) for p in parameters]
        if config.model_type not in FAMILIES or set(types) - set(ROPE_TYPES) or set(partial) != {1.0}:
            raise UnsupportedModelError(
                f"a bare config must be of {', '.join(FAMILIES)} with whole-head RoPE of type "
                f"{', '.join(ROPE_TYPES)}, got "
                f"{config.model_type!r} with {', '.join(types)}. Pass the model: `DeltaKVCache(model)`."
            )
        self._embedding = LlamaRotaryEmbedding(config)
        self._tables: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def tables(self, key_states: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin `[1, q, head_dim]` of the columns that `key_states` adds behind `past`; one tensor per forward."""
        length = key_states.shape[2]
        if self._tables is None or self._tables[0] != past or self._tables[1].shape[1] != length:
            positions = torch.arange(past, past + length, device=key_states.device)
            self._tables = (past, *self._embedding.to(key_states.device)(key_states, positions[None]))
        return self._tables[1:]

    def forget(self) -> None:
        """Drops the tables of the forward that has ended."""
        self._tables = None

    def tensors(self) -> list[torch.Tensor]:
        """Tensors held."""
        return [*self._embedding.buffers(), *(self._tables or ())[1:]]
