"""What calibration sees of a model: tokens as a cache stores them, and what the predictions would pay for an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..attach import evaluation_mode
from ..cache import DeltaKVCache
from ..errors import CompressorError, UnsupportedModelError
from ..hf_compat import DynamicCache
from ..rope import RopeForm, unrotated_tokens

# keeps gradients of half precision models above the smallest number
LOSS_SCALE = 256.0


class CaptureCache(DynamicCache):
    """A host cache that also keeps the layers' tokens `[K; V]` with keys un-rotated."""

    def __init__(self, config, forms: dict[int, RopeForm | None]):
        super().__init__(config=config)
        self.forms = forms
        self.tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tokens: dict[int, torch.Tensor] = {}
        self.is_capturing = True

    def note_attention(self, module: nn.Module, tables: object) -> None:
        """Called by the hook on attention modules with their RoPE tables."""
        form = self.forms.get(module.layer_idx)
        if self.is_capturing and form is not None:
            self.tables[module.layer_idx] = tuple(form.angles(table).float() for table in tables)

    def note_forward(self, *args, **kwargs) -> None:
        """Called by the hook on the model; nothing to note."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores new tokens as the host does and keeps what a compressor would be given."""
        if self.is_capturing and layer_idx in self.forms:
            states = key_states, value_states, self.tables.get(layer_idx)
            self.tokens[layer_idx] = unrotated_tokens(self.forms[layer_idx], *states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Observer:
    """Runs windows of text through a model, which must be in evaluation mode (see `evaluating`).

    Attributes:
        forms: how keys are rotated, by number of each layer that a compressor serves.
        widths: numbers of a token in K and in V, by layer.
        heads: of K and of V, by layer; configs name the number in many ways, and some mean another one by it.
    """

    def __init__(self, model: PreTrainedModel):
        cache = DeltaKVCache(model)
        self.model, self.config = model, cache.model_config
        self.forms = {layer.layer_idx: layer.form for layer in cache.own_layers}
        if not self.forms:
            raise UnsupportedModelError(
                f"`model` must have layers with full attention to calibrate, {type(model).__name__} has none."
            )
        seen = self.read(torch.zeros(1, 2, dtype=torch.int64)).layers
        parts = {layer_idx: (seen[layer_idx].keys, seen[layer_idx].values) for layer_idx in self.forms}
        self.widths = {i: tuple(part.shape[1] * part.shape[3] for part in pair) for i, pair in parts.items()}
        self.heads = {i: keys.shape[1] for i, (keys, _) in parts.items()}

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> CaptureCache:
        """Reads `ids` `[batch, n]` in one call; the tokens captured are `[batch, n, width]`."""
        cache = CaptureCache(self.config, self.forms)
        self.model(input_ids=ids.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.is_capturing = False
        return cache

    def gradients(
        self, cache: CaptureCache, ids: torch.Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[dict[int, torch.Tensor]]:
        """Predicts `ids` `[n]` after what `cache`, of one row, holds, and draws an answer from each `draws` times.

        The squares of the gradients of the answers' log likelihood are, on average, the Fisher information: what an
        error in a stored token adds to KL(full || compressed), to second order.

        Yields:
            for each draw, by layer, `[tokens, width]` float32: gradients with respect to `[K; V]`, keys un-rotated,
            over the root of the number of predictions.
        """
        leaves = []
        for layer_idx in self.forms:
            layer = cache.layers[layer_idx]
            layer.keys, layer.values = (part.detach().requires_grad_(True) for part in (layer.keys, layer.values))
            leaves += [layer.keys, layer.values]
        scale = LOSS_SCALE if self.model.dtype == torch.float16 else 1.0
        with torch.enable_grad():
            logits = self.model(input_ids=ids.to(self.model.device)[None], past_key_values=cache, use_cache=True).logits
            likelihoods = torch.log_softmax(logits[0].to(self.model.device).float(), dim=-1)
        if likelihoods.isnan().any():
            raise CompressorError(
                "`model` must give finite predictions, got NaN. Load it in another dtype (bfloat16 or float32 for "
                "models trained so), and look at the text."
            )
        # never yields with gradients enabled: whoever stops half way would be left with them
        for draw in range(draws):
            answers = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
            with torch.enable_grad():
                loss = likelihoods.gather(1, answers).sum() * (scale / len(ids) ** 0.5)
            found = torch.autograd.grad(loss, leaves, retain_graph=draw < draws - 1)
            # the scale goes in float32: in half precision it would be as if there had been none
            keys, values = ([part[0].float() / scale for part in parts] for parts in (found[::2], found[1::2]))
            yield {i: self._unrotate(cache, i, *pair) for i, *pair in zip(self.forms, keys, values, strict=True)}

    def _unrotate(self, cache: CaptureCache, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Gradients `[heads, tokens, head_dim]` float32 with respect to rotated keys -> to un-rotated `[K; V]`."""
        keys, values = (part.transpose(0, 1).contiguous() for part in (keys, values))
        if self.forms[layer_idx] is not None:
            cos, sin = (table[0].unsqueeze(1) for table in cache.tables[layer_idx])
            rotated = torch.empty_like(keys)
            # the transpose of a rotation turns the other way and keeps the factor of the tables
            self.forms[layer_idx].apply(keys, cos, -sin, rotated)
            keys = rotated
        # layers may be on several devices
        return torch.cat([keys.flatten(1), values.flatten(1)], dim=-1).to(self.model.device)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts every module in evaluation mode, and each that was not back; without gradients, inference mode, autocast."""
    # what is computed in inference mode can never be differentiated, and autocast would round what is fitted
    precise = torch.autocast(model.device.type, enabled=False)
    with evaluation_mode(model), torch.inference_mode(False), torch.no_grad(), precise:
        yield
