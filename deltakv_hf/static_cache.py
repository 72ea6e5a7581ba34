"""What a cache does that may be of fixed size: it answers the model for the steps that a compiler or a graph has."""

from __future__ import annotations

import torch
from torch import nn

from .attention import NAME
from .errors import InvalidOptionError
from .hf_compat import DynamicSlidingWindowLayer
from .model_cache import ModelCache
from .static_layer import StaticLayer
from .static_run import StaticRun
from .static_window import StaticWindowLayer


class StaticModelCache(ModelCache):
    """A `ModelCache` that is of fixed size if `_static` is set."""

    _static: StaticRun | None = None
    _shares = False

    def _fix_size(self, max_cache_len: int) -> None:
        """Called once, when the layers are there."""
        if self._bare_rope is not None:
            raise InvalidOptionError(
                f"`max_cache_len` must be None with a bare config, got {max_cache_len}: it has no steps to compile."
            )
        layers = [layer for layer in self.layers if isinstance(layer, StaticLayer)]
        if not layers:
            # all are the host's
            return
        windows = [
            StaticWindowLayer(layer_idx, layer, max_cache_len)
            for layer_idx, layer in enumerate(self.layers)
            if self._slides(layer_idx)
        ]
        for window in windows:
            self.layers[window.layer_idx] = window
        self._static = StaticRun(max_cache_len, self._ledger, self._registry, layers, windows)
        # what a layer wrote is attended to by others behind it, too, where a step counts one attention a layer
        self._shares = bool(getattr(self.model_config, "num_kv_shared_layers", 0))

    def _slides(self, layer_idx: int) -> bool:
        """Whether a layer of the host sees a window; a chunk, which is held the same, begins anew."""
        types = getattr(self.model_config, "layer_types", None)
        is_window = type(self.layers[layer_idx]) is DynamicSlidingWindowLayer and layer_idx in self._probes
        return is_window and types is not None and types[layer_idx] == "sliding_attention"

    def _resize(self, sizes: tuple[int, int, int], max_pool_tokens: int | None) -> None:
        self._check_whole()
        self._ledger.settle()
        if self._static is not None:
            if self._ledger.columns > sizes[0]:
                raise InvalidOptionError(
                    f"`max_cache_len` must be at least the {self._ledger.columns} columns held, got {sizes[0]}."
                )
            self._static.resize(sizes, max_pool_tokens)

    @property
    def _attends(self) -> bool:
        """Whether the model's attention reads layers of fixed size; if not, they serve as growing ones."""
        return self._static is not None and not self._shares and self.model_config._attn_implementation == NAME

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model's steps."""
        return self._attends and super().is_compileable

    def _is_static(self, layer_idx: int) -> bool:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return isinstance(layer, StaticLayer) or isinstance(layer, StaticWindowLayer) and layer.is_compileable

    def _catch_up(self) -> None:
        """Counts the steps that have run, too."""
        super()._catch_up()
        if self._static is not None:
            self._static.catch_up()

    # -- what the hooks and the model tell ------------------------------------------------------------------------

    def note_forward(
        self, module: nn.Module, attention_mask: object, input_ids: torch.Tensor | None = None, *args, **kwargs
    ) -> torch.Tensor | None:
        """See `ModelCache.note_forward`; in what is compiled nothing is noted.

        Returns:
            Of a compiled step's mask `[batch, columns]` the newest column, for the model to make its masks of.
        """
        if self._static is None:
            super().note_forward(module, attention_mask, input_ids, *args, **kwargs)
        elif torch.compiler.is_compiling():
            is_step = self._attends and self._static.is_ready and input_ids is not None and input_ids.shape[-1] == 1
            if is_step and torch.is_tensor(attention_mask) and attention_mask.ndim == 2:
                return attention_mask[:, -1:]
        else:
            mask = _mask_of_columns(attention_mask) if self._attends else attention_mask
            super().note_forward(module, mask, input_ids, *args, **kwargs)
            if input_ids is not None and self._ledger.step is None:
                # before the host's layers take what ours has no room for
                self._static.check_length(input_ids.shape[-1])
            if self._attends and input_ids is not None and input_ids.shape[-1] == 1:
                # a compiled forward asks nothing more
                self._static.prepare()
        return None

    def note_attention(self, module: nn.Module, tables: object) -> None:
        """See `ModelCache.note_attention`."""
        if self._static is None or not torch.compiler.is_compiling():
            super().note_attention(module, tables)
            return
        layer = self.layers[module.layer_idx]
        if isinstance(layer, StaticLayer):
            layer.receive_tables(*(tables if layer.form is not None else ()))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """See `ModelCache.update`; a step of one token is written where it stands."""
        layer = self.layers[layer_idx]
        if self._is_static(layer_idx):
            if key_states.shape[2] == 1 and self._attends and self._static.is_ready:
                return layer.step(key_states, value_states)
        if isinstance(layer, StaticLayer):
            if not torch.compiler.is_compiling() and self._ledger.step is None:
                self._static.check_length(key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """See `transformers.Cache.activate_past_recording`; windows that record grow, so steps are not compiled."""
        self._catch_up()
        super().activate_past_recording()
        if self._static is not None:
            self._static.stop()

    # -- what `generate` and the model ask ------------------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Says which keys the next forward's mask must cover.

        Args:
            query_length: tokens of that forward.
            layer_idx: number of the layer.

        Returns:
            Length and offset of these keys: of a step of fixed size, those of the newest column.
        """
        if query_length == 1 and self._attends and self._is_static(layer_idx):
            if torch.compiler.is_compiling():
                return 1, 0
            if self._static.prepare():
                return 1, self._ledger.columns
        return super().get_mask_sizes(query_length, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Counts what was fed.

        Args:
            layer_idx: number of the layer.

        Returns:
            Columns seen, padding included; a tensor in what is compiled.
        """
        if self._is_static(layer_idx):
            if torch.compiler.is_compiling() and self._static.is_ready:
                return self._static.plan.columns[0]
            self._catch_up()
        return super().get_seq_length(layer_idx)

    def _extra(self) -> list[torch.Tensor]:
        return super()._extra() + ([] if self._static is None else self._static.tensors())


def _mask_of_columns(mask: object) -> object:
    """A host's 4-D mask, which `generate` makes for a cache that may be compiled, as one of columns."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if torch.is_tensor(mask) and mask.ndim == 4:
        # the newest query sees all that is no padding
        return mask[:, 0, -1]
    return mask
