"""Which layers may choose for the layers behind them: those whose top tokens these attend to as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache, PreTrainedModel

from ..config import COMPRESSOR_WINDOW, check_integer
from ..errors import InvalidOptionError
from ..hf_compat import DynamicLayer

# of a window: tokens at its end whose attention is looked at, and the share of those before that they choose
STEPS, CHOSEN = 8, 1 / 8


@torch.no_grad()
def select_filter_layers(
    model: PreTrainedModel,
    windows: torch.Tensor,
    number: int,
    *,
    num_sink_tokens: int = 4,
    advance: Callable[[], None] = lambda: None,
) -> list[int]:
    """Chooses filter layers by dynamic programming, so that the others lose as little attention as can be.

    Filter layers are those of DeltaKV (arXiv 2602.08005, after OmniKV); the paper chooses them by the overlap of what
    layers attend to most, this by the attention that is kept.

    Args:
        model: on the device where it shall run.
        windows: ids `[n, window]` int64.
        number: how many filter layers; the first layer with full attention is always one.
        num_sink_tokens: first tokens of a window, which nobody has to choose.
        advance: called after each window.

    Returns:
        numbers of layers, ascending.

    Raises:
        InvalidOptionError: there are fewer layers, or windows are too short.
    """
    layers = check_number(model, number)
    kept = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for ids in windows:
        kept += kept_attention(model, ids.to(model.device)[None], layers, num_sink_tokens)
        advance()
    return [layers[place] for place in best_places(kept / len(windows), number)]


def check_number(model, number: int) -> list[int]:
    """Layers with full attention; raises unless there are `number`."""
    config = model.config.get_text_config(decoder=True)
    layers = [idx for idx, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer]
    check_integer("select_layers", number, low=1, high=len(layers))
    return layers


def kept_attention(model, ids: torch.Tensor, layers: list[int], num_sink_tokens: int) -> torch.Tensor:
    """Share `[layers, layers]` of the column's attention that is kept if it reads the row's top tokens.

    The top tokens of a layer are those with the largest softmax weight for any head; sinks and the window are read in
    any case, and a layer that chooses reads everything itself. Mean over heads and the last steps of a window.
    """
    candidates = slice(num_sink_tokens, ids.shape[1] - STEPS - COMPRESSOR_WINDOW)
    count = int(CHOSEN * (candidates.stop - candidates.start))
    if count < 1:
        shortest = num_sink_tokens + STEPS + COMPRESSOR_WINDOW + int(1 / CHOSEN)
        raise InvalidOptionError(f"`windows` must hold {shortest} tokens or more, got {ids.shape[1]}.")
    config = model.config.get_text_config(decoder=True)
    cache, kept = DynamicCache(config=config), torch.zeros(len(layers), len(layers), dtype=torch.float64)
    model(ids[:, :-STEPS], past_key_values=cache, logits_to_keep=1)
    with _eager(model):
        for token in ids[:, -STEPS:].split(1, dim=1):
            seen = model(token, past_key_values=cache, output_attentions=True).attentions
            # [layers, heads, candidates]
            weights = torch.stack([seen[idx][0, :, 0, candidates].double() for idx in layers])
            top = weights.amax(1).topk(count).indices
            is_top = torch.zeros_like(weights[:, 0]).scatter_(1, top, 1.0)
            weights = weights.mean(1)
            kept += (1 - (1 - is_top) @ weights.T).cpu()
    return (kept / STEPS).fill_diagonal_(1.0)


@contextmanager
def _eager(model) -> Iterator[None]:
    """While attention hands its weights out."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def best_places(kept: torch.Tensor, number: int) -> list[int]:
    """`number` layers, the first among them, by which those up to the next one keep most.

    Args:
        kept: `[layers, layers]`, what the column's layer keeps by the row's.
    """
    count = len(kept)
    # of layers a .. b - 1 behind layer a
    gain = torch.nn.functional.pad(kept.triu().cumsum(1), (1, 0)).tolist()
    # the best of layers a .. with some of them chosen, a among them: gain and places
    best = {a: (gain[a][count], [a]) for a in range(count)}
    for _ in range(number - 1):
        best = {a: max((gain[a][b] + best[b][0], [a, *best[b][1]]) for b in best if b > a) for a in range(max(best))}
    return best[0][1]
