"""Which layers of a model choose for the layers behind them."""

from __future__ import annotations

from .compressor.kv_compressor import KVCompressor
from .errors import InvalidOptionError

# by model type, layers and hidden size: those that the authors of DeltaKV (arXiv 2602.08005) used
KNOWN = {
    ("llama", 32, 4096): (0, 1, 2, 8, 18),
    ("qwen2", 28, 3584): (0, 1, 2, 4, 7, 14),
    ("qwen2", 64, 5120): (0, 1, 2, 3, 4, 5, 17, 29, 40),
}


def find_filter_layers(
    given: tuple[int, ...] | None, compressor: KVCompressor, model_config, own_layers: list[int]
) -> tuple[int, ...]:
    """The filter layers of a cache.

    Args:
        given: what the user asks for, or None.
        compressor: may bring a list.
        model_config: the text config of the model.
        own_layers: numbers of the layers that are compressed.

    Raises:
        InvalidOptionError: none is known, or they do not fit the model.
    """
    model = model_config.model_type, model_config.num_hidden_layers, model_config.hidden_size
    brought = compressor.config.get("filter_layers")
    chosen = given or (tuple(brought) if isinstance(brought, list) else ()) or KNOWN.get(model)
    if chosen is None:
        raise InvalidOptionError(
            f"`filter_layers` must be given: none are known for {model[0]!r} of {model[1]} layers, and the compressor "
            "brings none. Find them with `deltakv calibrate --select-layers`."
        )
    unknown = [idx for idx in chosen if idx not in own_layers]
    if unknown:
        raise InvalidOptionError(
            f"`filter_layers` must be compressed layers, got {unknown[0]}; these are {', '.join(map(str, own_layers))}."
        )
    if chosen[0] != own_layers[0]:
        raise InvalidOptionError(
            f"`filter_layers` must begin with the first compressed layer, {own_layers[0]}, for which nobody else "
            f"chooses, got {chosen}."
        )
    return chosen
