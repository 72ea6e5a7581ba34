"""Models that cannot be served rightly are refused here, by name of the reason."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from .errors import CacheStateError, UnsupportedModelError


def rope_parameters(config: PretrainedConfig) -> list[dict]:
    """RoPE parameters of a text config: one dict, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "rope_type" not in parameters and any(isinstance(value, dict) for value in parameters.values()):
        return [value for value in parameters.values() if isinstance(value, dict)]
    return [parameters]


def check_config(config: PretrainedConfig) -> None:
    """Raises `UnsupportedModelError` for models whose keys and values this cache cannot hold."""
    name = getattr(config, "model_type", type(config).__name__)
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"`model` must be decoder-only, got the encoder-decoder {name!r}.")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"`model` must cache keys and values per head, got {name!r} with multi-head latent attention "
            f"(kv_lora_rank={text.kv_lora_rank}), whose cache is compressed already. Use `DynamicCache`."
        )
    for parameters in rope_parameters(text):
        if parameters.get("rope_type") == "dynamic":
            raise UnsupportedModelError(
                f"`model` must keep its RoPE frequencies while it reads, got {name!r} with rope_type='dynamic', which "
                "changes them. Use rope_type 'yarn' or 'linear'."
            )


def max_positions(model: PreTrainedModel) -> int | None:
    """Positions that a model says it has, or None."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def longrope_switch(config: PretrainedConfig) -> int | None:
    """Length at which a longrope model changes its frequencies, or None for other models."""
    for parameters in rope_parameters(config):
        if parameters.get("rope_type") == "longrope":
            length = getattr(config, "original_max_position_embeddings", None)
            return parameters.get("original_max_position_embeddings") or length
    return None


def check_length(switch: int | None, past: int, query_length: int) -> None:
    """Raises where a longrope model would drop the cache: `generate` then replaces it without a word."""
    total = past + query_length
    if switch is not None and past <= switch <= total and (past or total == switch):
        raise CacheStateError(
            f"the sequence must stay below {switch} tokens (`original_max_position_embeddings`) or start beyond it, "
            f"got {past} held and {query_length} new: this longrope model changes its frequencies there and its "
            "cache is dropped by the host. Feed the longer text as one prompt."
        )
