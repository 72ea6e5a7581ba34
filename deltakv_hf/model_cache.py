"""What caches of this package have in common that a model's hooks tell and that users and `generate` call."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .attach import attach, unwrap
from .bare import FORM, BareRope
from .base import CompressedCache
from .compressor.kv_compressor import KVCompressor
from .conversion import fill, to_dynamic
from .errors import CacheStateError, InvalidOptionError, UnsupportedModelError
from .hf_compat import DynamicCache, DynamicLayer
from .layer import DeltaKVLayer
from .lazy import LazyStates
from .ledger import TokenLedger
from .memory import MemoryReport, report
from .rope import RopeForm, RopeRegistry
from .saving import SavedPrompt, load, save
from .support import check_config, check_length, longrope_switch


class ModelCache(CompressedCache):
    """A cache made for a model, whose full-attention layers are ours.

    Args:
        model: the model that will use the cache; hooks are registered on it once. A bare `PretrainedConfig` is taken
            too, for one unpadded row and standard RoPE.
        ledger: of the cache.
        offloading: keep what is stored in CPU memory and fetch each layer while the one before it runs (needs an
            accelerator).
        offload_only_non_sliding: with `offloading`, leave sliding-window layers on the device.

    Raises:
        InvalidOptionError: an option is out of range.
        UnsupportedModelError: the model's attention cannot be served.
    """

    # what codes stored tokens, if it was made for the model
    compressor: KVCompressor | None = None
    # and what it is called as an argument
    compressor_argument = "compressor"
    # how its layers store tokens, in a word
    _how = "compressed"
    # of a cache that was loaded: the ids in the file
    saved_prompt: SavedPrompt | None = None

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        ledger: TokenLedger,
        offloading: bool,
        offload_only_non_sliding: bool,
    ):
        bare = isinstance(model, PretrainedConfig)
        root = None if bare else unwrap(model)
        check_config(model if bare else root.config)
        self.model_config = (model if bare else root.config).get_text_config(decoder=True)
        self._model = None if bare else weakref.ref(root)
        self._bare_rope = BareRope(self.model_config) if bare else None
        self._probes = {} if bare else attach(root)
        self._longrope_switch = longrope_switch(self.model_config)
        self._ledger = ledger
        self._registry = RopeRegistry()
        layers = DynamicCache(config=self.model_config).layers
        own = [layer_idx for layer_idx, layer in enumerate(layers) if type(layer) is DynamicLayer]
        for layer_idx in own:
            if not bare and layer_idx not in self._probes:
                raise UnsupportedModelError(
                    f"every full-attention layer must store its keys and values, but layer {layer_idx} of "
                    f"{self.model_config.model_type!r} stored none. Use `DynamicCache`."
                )
        forms = {layer_idx: FORM if bare else self._probes[layer_idx].form for layer_idx in own}
        for layer_idx, layer in self._make_layers(forms).items():
            layers[layer_idx] = layer
        if offloading and not torch.accelerator.is_available():
            raise InvalidOptionError("`offloading` must be False on a machine without an accelerator, got True.")
        # a linear layer can't tell which forwards have been through it
        self._touched: dict[int, int] = {}
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._ledger.num_layers = len(self.own_layers)

    @abstractmethod
    def _make_layers(self, forms: dict[int, RopeForm | None]) -> dict[int, DeltaKVLayer]:
        """A layer for each number of a full-attention layer; `forms` say how they rotate their keys."""

    # -- what the hooks and the model tell ------------------------------------------------------------------------

    def note_attention(self, module: nn.Module, tables: object) -> None:
        """Called by the hook on attention modules before their forward.

        Args:
            module: the attention module.
            tables: its `position_embeddings`, cosines and sines `[1 or batch, q, rotated numbers]`, or None.

        Raises:
            CacheStateError: the module is of another model.
        """
        if self._bare_rope is not None:
            return
        layer_idx = module.layer_idx
        probe = self._probes.get(layer_idx)
        if probe is None or probe.module() is not module:
            raise CacheStateError(
                f"this cache was made for another model: layer {layer_idx} ({type(module).__name__}) is not the "
                f"one that it knows. Make a cache for each model with `{type(self).__name__}(model)`."
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, DeltaKVLayer):
            layer.receive_tables(*(tables if layer.form is not None and tables is not None else ()))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores new tokens of a layer; the model's attention calls it.

        Args:
            key_states: `[batch, num_key_value_heads, q, head_dim]`, rotated, in the model's dtype.
            value_states: the same of the values.
            layer_idx: number of the layer.

        Returns:
            Keys and values of all columns, new ones last: the tensors given where nothing is stored yet, else a pair of
            `LazyStates`, which decodes what attention reads.

        Raises:
            CacheStateError: the call does not fit what is held, or the last forward was broken off.
            InvalidOptionError: a bare config was given for a batch or padding.
        """
        if torch.compiler.is_compiling():
            return self._update_untraced(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, DeltaKVLayer):
            check_length(self._longrope_switch, layer.columns, key_states.shape[2])
            if self._bare_rope is not None:
                self._derive_tables(layer, key_states)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.model_config._attn_implementation == "flex_attention":
            # flex attention is compiled: what decodes must run before its trace begins
            states = tuple(s.materialize() if isinstance(s, LazyStates) else s for s in states)
        if self._bare_rope is not None and self._ledger.step is None:
            self._bare_rope.forget()
        return states

    @torch.compiler.disable
    def _update_untraced(self, *args, **kwargs):
        # a trace of the coding of tokens takes long to make and gains nothing
        states = self.update(*args, **kwargs)
        return tuple(s.materialize() if isinstance(s, LazyStates) else s for s in states)

    def _derive_tables(self, layer: DeltaKVLayer, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != 1 or self._ledger.row_columns is not None:
            raise InvalidOptionError(
                "`model` must be the model itself for a batch or padding: a bare config cannot see positions, got a "
                f"batch of {key_states.shape[0]}. Use `{type(self).__name__}(model)`."
            )
        layer.receive_tables(*self._bare_rope.tables(key_states, layer.columns))

    # -- what users and generate call -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Compresses all tokens beyond the window now; the state is then a function of the tokens fed alone.

        Raises:
            CacheStateError: the last forward was broken off.
        """
        self._check_whole()
        self._ledger.settle()
        with self._ledger.changing("flush"):
            flush = self._ledger.make_flush(merge=True)
            for layer in self.own_layers if flush is not None else ():
                layer.flush(flush)

    def memory_report(self) -> MemoryReport:
        """Counts the bytes held.

        Returns:
            Bytes by part, beside those of a `DynamicCache`; prints as a table.

        Examples:
            >>> report = cache.memory_report()
            >>> report.tokens, report.compressed_tokens
            (512, 352)
            >>> report.ratio == report.stored_bytes / report.dense_bytes
            True
        """
        self._catch_up()
        return report(self.layers, self._ledger, self._registry, self._extra())

    def _extra(self) -> list[torch.Tensor]:
        """What is held beside layers, ledger and RoPE tables."""
        extra = self._bare_rope.tensors() if self._bare_rope is not None else []
        if self.saved_prompt is not None:
            extra += [self.saved_prompt.input_ids, self.saved_prompt.attention_mask]
        return extra

    def dequantize(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes a layer.

        Args:
            layer_idx: number of the layer; negative ones count from the last.

        Returns:
            Dense keys (rotated) and values, `[batch, num_key_value_heads, columns, head_dim]` in the model's dtype;
            padding is zero. A layer of the host gives what it holds: a sliding-window layer its window.

        Raises:
            CacheStateError: the layer holds no keys and values, or the last forward was broken off.
            InvalidOptionError: there is no such layer.

        Examples:
            >>> keys, values = cache.dequantize(0)
            >>> keys.shape
            torch.Size([1, 2, 512, 8])
        """
        if not -len(self.layers) <= layer_idx < len(self.layers):
            raise InvalidOptionError(f"`layer_idx` must be below {len(self.layers)}, got {layer_idx}.")
        self._check_whole()
        layer = self.layers[layer_idx]
        if isinstance(layer, DeltaKVLayer):
            return layer.dequantize()
        if getattr(layer, "keys", None) is None:
            raise CacheStateError(
                f"layer {layer_idx} must hold keys and values to be read, but this {type(layer).__name__} has none."
            )
        return layer.keys, layer.values

    def __iter__(self):
        """Yields keys, values, sliding-window tensor or None of each layer, as `DynamicCache` does, decoded in turn."""
        self._check_whole()
        for layer in self.layers:
            if isinstance(layer, DeltaKVLayer) and layer.is_initialized:
                pair = layer.dequantize()
            else:
                pair = getattr(layer, "keys", None), getattr(layer, "values", None)
            yield *pair, getattr(layer, "_sliding_window_tensor", None)

    def to_dynamic_cache(self) -> DynamicCache:
        """Decodes everything.

        Returns:
            A `DynamicCache` of the decoded tokens, in memory of its own; padding is zero.

        Raises:
            CacheStateError: the last forward was broken off.
        """
        self._check_whole()
        return to_dynamic(self)

    @classmethod
    def from_dynamic(
        cls,
        cache: DynamicCache,
        model: PreTrainedModel | PretrainedConfig,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **options,
    ) -> ModelCache:
        """Compresses a `DynamicCache` that `model` has filled; it stays as it is.

        Args:
            cache: keys and values of a prompt.
            model: the model, as for the class itself.
            attention_mask: `[batch, columns]`, 0 at the padding of the prompt; None if there was none.
            position_ids: `[1 or batch, columns]`; None counts the real tokens of each row, as `generate` does.
            **options: as for the class itself.

        Returns:
            A cache of the class that this is called on, which holds the same columns.

        Raises:
            InvalidOptionError: `cache` is of another model, empty, or does not fit `attention_mask`.
            UnsupportedModelError: the model's rotary tables can't be made outside a forward.
        """
        made = cls(model, **options)
        fill(made, cache, attention_mask, position_ids)
        return made

    def save(
        self,
        path: str | os.PathLike,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Writes everything held to one safetensors file, whole or not at all; the cache stays as it is.

        Args:
            path: of the file; an old one is replaced.
            input_ids: ids that were fed, `[batch, at least the columns seen]`, kept in the file as far as the cache has
                seen them (`generate` returns one token more). Rows of different length go by the padding seen.
            attention_mask: `[batch, columns]` of the padding in `input_ids`, for a model none of whose layers is
                compressed: only then the cache has not seen it. Missing columns at the end are real ones.

        Raises:
            CacheStateError: the last forward was broken off, or a layer holds what cannot be saved.
            InvalidOptionError: `path`, `input_ids` or `attention_mask` does not fit.
        """
        save(self, path, input_ids, attention_mask)

    @classmethod
    def _load(cls, path, model, input_ids: torch.Tensor | None, make, compressor: KVCompressor | None) -> ModelCache:
        """See `load` of a cache; `make(options)` gives an empty one."""
        return load(cls, path, model, input_ids, make, compressor)

    def __repr__(self) -> str:
        own, seen = len(self.own_layers), self.get_seq_length()
        return f"{type(self).__name__}({own} of {len(self.layers)} layers {self._how}, {seen} tokens seen)"


def checked_compressor(name: str, compressor: object, model: PreTrainedModel | PretrainedConfig) -> KVCompressor | None:
    """The argument `name` of a cache for `model`: a compressor that was made for it, or None."""
    if compressor is None:
        return None
    if not isinstance(compressor, KVCompressor):
        raise InvalidOptionError(
            f"`{name}` must be a KVCompressor or None, got {compressor!r}. Load one by name with "
            "`KVCompressor.from_pretrained`."
        )
    compressor.check_model(model)
    return compressor
