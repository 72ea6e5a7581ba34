"""Forwards of a frozen model that say how good a compressor is, with gradients with respect to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration.capture import CaptureCache, Observer
from ..hf_compat import DynamicCache
from ..rope import RopeForm, unrotated_tokens

Tables = tuple[torch.Tensor, torch.Tensor] | None


def dense_states(
    tokens: torch.Tensor, key_width: int, heads: int, form: RopeForm | None, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[K; V]` `[batch, n, width]`, keys un-rotated -> rotated K, and V, `[batch, heads, n, head_dim]` each."""
    keys, values = (part.unflatten(-1, (heads, -1)) for part in tokens.tensor_split([key_width], dim=-1))
    if form is not None:
        cos, sin = tables
        keys = form.rotated(keys, cos.unsqueeze(2), sin.unsqueeze(2))
    return keys.transpose(1, 2), values.transpose(1, 2)


def continued_kl(
    observer: Observer, modules: Mapping[int, nn.Module], ids: torch.Tensor, context: int, stored: slice
) -> torch.Tensor:
    """KL(full || compressed) of predictions after a context that was read exactly and then compressed.

    This is what a cache does: tokens `stored` of the first `context` are read back from their codes, all others as they
    are, and later tokens are raw.

    Args:
        modules: of each layer, `[batch, n, width]` tokens -> what they read back as.
        ids: `[batch, n]` int64.

    Returns:
        nats, the mean over the predictions after the context.
    """
    model = observer.model
    rest = ids[:, context:].to(model.device)
    clean = observer.read(ids[:, :context])
    # apart from the cache, which is copied
    captured, clean.tokens = clean.tokens, {}
    cache = copy.deepcopy(clean)
    with torch.no_grad():
        full = _log_likelihoods(model, rest, clean)
    for layer_idx, module in modules.items():
        layer, tokens = cache.layers[layer_idx], captured[layer_idx]
        read = torch.cat([tokens[:, : stored.start], module(tokens[:, stored]), tokens[:, stored.stop :]], dim=1)
        form, tables = observer.forms[layer_idx], clean.tables.get(layer_idx)
        states = dense_states(read, observer.widths[layer_idx][0], observer.heads[layer_idx], form, tables)
        layer.keys, layer.values = (part.to(layer.keys.dtype) for part in states)
    return F.kl_div(_log_likelihoods(model, rest, cache), full, log_target=True, reduction="batchmean")


def _log_likelihoods(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Of what follows `ids` `[batch, n]`: `[batch * n, vocabulary]` float32."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits.flatten(0, 1).float().log_softmax(-1)


class ReplacingCache(CaptureCache):
    """Hands every layer what its tokens behind the sinks read back as, all in one call: the paper's second pass."""

    def __init__(self, observer: Observer, modules: Mapping[int, nn.Module], num_sink_tokens: int):
        super().__init__(observer.config, observer.forms)
        self.observer, self.modules, self.num_sink_tokens = observer, modules, num_sink_tokens
        self.read: dict[int, torch.Tensor] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Returns keys and values of the tokens as they read back."""
        if layer_idx in self.modules:
            form, tables = self.forms[layer_idx], self.tables.get(layer_idx)
            tokens = unrotated_tokens(form, key_states, value_states, tables)
            sinks = tokens[:, : self.num_sink_tokens]
            self.read[layer_idx] = torch.cat([sinks, self.modules[layer_idx](tokens[:, self.num_sink_tokens :])], dim=1)
            key_width, heads = self.observer.widths[layer_idx][0], self.observer.heads[layer_idx]
            states = dense_states(self.read[layer_idx], key_width, heads, form, tables)
            key_states, value_states = (part.to(key_states.dtype) for part in states)
        return DynamicCache.update(self, key_states, value_states, layer_idx, *args, **kwargs)


def paper_loss(
    observer: Observer, modules: Mapping[int, nn.Module], ids: torch.Tensor, num_sink_tokens: int
) -> torch.Tensor:
    """The paper's loss (arXiv 2602.08005, section 4): next-token loss plus squared errors, summed over layers.

    Every layer attends to all tokens behind the sinks as they read back, and hands on what comes of it; errors are
    those against the tokens of a forward without compression.

    Args:
        ids: `[batch, n]` int64.
    """
    clean = observer.read(ids).tokens
    cache = ReplacingCache(observer, modules, num_sink_tokens)
    ids = ids.to(observer.model.device)
    logits = observer.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    errors = [F.mse_loss(read, clean[layer_idx]) for layer_idx, read in cache.read.items()]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()) + torch.stack(errors).sum()
