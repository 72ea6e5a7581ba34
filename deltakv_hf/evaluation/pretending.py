"""Fills a cache with random codes behind a short prompt, to measure steps of a context that nobody waits for."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .. import DeltaKVCache
from ..errors import InvalidOptionError


def pretend(cache: DeltaKVCache, model: PreTrainedModel, lengths: list[int]) -> None:
    """Makes an empty cache of fixed size hold so many tokens of each row, left padded to the longest."""
    ledger, block, context = cache._ledger, cache.options.block_size, max(lengths)
    added = [ledger.canonical(length) - block for length in lengths]
    if min(added) < 0:
        raise InvalidOptionError(f"`lengths` must be long enough for a block to be compressed, got {min(lengths)}.")
    # one block of it is compressed
    shape = len(lengths), context - max(added)
    ids = torch.randint(0, model.config.vocab_size, shape, device=model.device)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    cache.flush()
    ledger.pretend(added)
    for layer in cache.own_layers:
        layer.pretend(ledger.compressed, ledger.columns)
    positions = torch.arange(ledger.columns, device=model.device)[None]
    tables = model.model.rotary_emb(torch.empty(1, 1, 1, dtype=model.dtype, device=model.device), positions)
    for held in cache._registry.tables:
        held.cos, held.sin = (held.form.angles(table) for table in tables)
