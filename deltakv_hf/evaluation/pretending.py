"""Fills a cache with random codes behind a short prompt, to measure steps of a context that nobody waits for."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .. import DeltaKVCache
from ..errors import InvalidOptionError


def pretend(cache: DeltaKVCache, model: PreTrainedModel, batch_size: int, context: int) -> None:
    """Makes an empty cache of fixed size hold `context` columns of `batch_size` rows, without padding."""
    ledger, block = cache._ledger, cache.options.block_size
    added = ledger.canonical(context) - block
    if added < 0:
        raise InvalidOptionError(f"`context` must be long enough for a block to be compressed, got {context}.")
    # one block of it is compressed
    ids = torch.randint(0, model.config.vocab_size, (batch_size, context - added), device=model.device)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    cache.flush()
    ledger.pretend(added)
    for layer in cache.own_layers:
        layer.pretend(ledger.compressed[0], ledger.columns)
    positions = torch.arange(ledger.columns, device=model.device)[None]
    tables = model.model.rotary_emb(torch.empty(1, 1, 1, dtype=model.dtype, device=model.device), positions)
    for held in cache._registry.tables:
        held.cos, held.sin = (held.form.angles(table) for table in tables)
