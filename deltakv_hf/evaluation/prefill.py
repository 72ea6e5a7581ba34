"""How a context gets into a cache, and the share of dense bytes that it takes there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..cache import DeltaKVCache
from ..errors import InvalidOptionError
from .peers import stored_share


class Shares(NamedTuple):
    """Bytes held over dense bytes: of the whole cache, and of its compressed tokens alone (0 without any).

    `compressor_bytes` are those of the compressor on the model's devices, which caches share and which are in neither;
    they are saved again after `break_even_tokens` compressed tokens. Both are 0 without a compressor.
    """

    stored: float
    compressed: float
    compressor_bytes: int = 0
    break_even_tokens: int = 0


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, prefill_chunk: int = 0) -> Shares:
    """Feeds `ids` `[n]` int64 in calls of `prefill_chunk` tokens, or in one (0).

    Returns:
        the shares held then, see `held_shares`.
    """
    ids = ids.to(model.device).unsqueeze(0)
    for part in ids.split(prefill_chunk or ids.shape[1], dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return held_shares(model, cache)


def held_shares(model: PreTrainedModel, cache: Cache) -> Shares:
    """The shares that `cache` holds; the full cache's is 1, of one that gives no `memory_report` all tensors count."""
    if isinstance(cache, DynamicCache):
        return Shares(1.0, 0.0)
    if not hasattr(cache, "memory_report"):
        return Shares(stored_share(model, cache), getattr(cache, "compressed_share", 0.0))
    report = cache.memory_report()
    return Shares(report.ratio, report.compressed_share, report.compressor_bytes, report.break_even_tokens or 0)


def feed_behind(model: PreTrainedModel, ids: torch.Tensor, cache: Cache, kept: int, block: int = 0) -> torch.Tensor:
    """Feeds `ids` `[n]` on top of what `cache` holds, and returns the last logits `[kept, vocabulary]`.

    In one call, or in calls of `block` tokens; one by one with a `selection`, which chooses in steps of one token.
    """
    steps = isinstance(cache, DeltaKVCache) and cache.options.selection != "all"
    parts = ids.to(model.device)[None].split(1 if steps else block or len(ids), dim=1)
    logits = [
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=min(kept, part.shape[1])).logits[0]
        for part in parts
    ]
    return torch.cat(logits)[-kept:]


def check_chunk(name: str, num_tokens: int) -> None:
    """Raises `InvalidOptionError` for a negative number."""
    if num_tokens < 0:
        raise InvalidOptionError(f"`{name}` must be 0 (one call) or positive, got {num_tokens}.")


def check_cache(name: str, cache: object) -> None:
    """Raises `InvalidOptionError` unless what `make_caches[name]` made is a cache."""
    if not isinstance(cache, Cache):
        raise InvalidOptionError(
            f"`make_caches[{name!r}]` must make a transformers Cache, got a {type(cache).__name__}."
        )
