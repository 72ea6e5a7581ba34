"""`DeltaKVCache`: a `transformers` cache that stores tokens as quantised residuals against similar earlier tokens."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .attach import attach, unwrap
from .bare import FORM, BareRope
from .base import CompressedCache
from .compressor import DirectCompressor, Int4Compressor
from .compressor.kv_compressor import KVCompressor
from .config import DeltaKVConfig
from .conversion import fill, to_dynamic
from .errors import CacheStateError, InvalidOptionError, UnsupportedModelError
from .hf_compat import DynamicCache, DynamicLayer
from .layer import DeltaKVLayer
from .lazy import LazyStates
from .ledger import TokenLedger
from .memory import MemoryReport, report
from .rope import RopeRegistry
from .saving import SavedPrompt, load, save
from .selection import SelectionPlan
from .support import check_config, check_length, longrope_switch


class DeltaKVCache(CompressedCache):
    """Drop-in KV cache for `model.generate(past_key_values=...)` (DeltaKV, arXiv 2602.08005).

    Full-attention layers keep the first tokens and a recent window as they are and everything between as packed
    bytes; sliding-window, linear and hybrid layers are the host's own. The prompt's own attention is exact.

    Args:
        model: the model that will use the cache; hooks are registered on it once (see `deltakv_hf.detach`). A bare
            `PretrainedConfig` is taken too, for one unpadded row and standard RoPE.
        compressor: made for this model (`KVCompressor.calibrate` or `.from_pretrained`); None compresses without any.
            Of the options it leaves `num_sink_tokens`, `recent_window` (64 then) and `block_size` to you.
        offloading: keep what is stored in CPU memory and fetch each layer while the one before it runs (needs an
            accelerator).
        offload_only_non_sliding: with `offloading`, leave sliding-window layers on the device.
        **options: fields of `DeltaKVConfig`.

    Raises:
        InvalidOptionError: an option is unknown or out of range.
        UnsupportedModelError: the model's attention cannot be served.

    Example:

    ```python
    cache = DeltaKVCache(model)
    out = model.generate(**inputs, past_key_values=cache)
    print(cache.memory_report())
    ```
    """

    # of a cache that was loaded: the ids in the file
    saved_prompt: SavedPrompt | None = None

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        compressor: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **options,
    ):
        self.compressor = _check_compressor(compressor, model)
        self.options = DeltaKVConfig.from_options(options, compressor)
        bare = isinstance(model, PretrainedConfig)
        root = None if bare else unwrap(model)
        check_config(model if bare else root.config)
        self.model_config = (model if bare else root.config).get_text_config(decoder=True)
        self._model = None if bare else weakref.ref(root)
        self._bare_rope = BareRope(self.model_config) if bare else None
        self._probes = {} if bare else attach(root)
        self._longrope_switch = longrope_switch(self.model_config)
        self._ledger = TokenLedger(self.options)
        self._registry = RopeRegistry()
        layers = DynamicCache(config=self.model_config).layers
        own = [layer_idx for layer_idx, layer in enumerate(layers) if type(layer) is DynamicLayer]
        plan = SelectionPlan(self.options, self.compressor, self.model_config, own)
        for layer_idx in own:
            if not bare and layer_idx not in self._probes:
                raise UnsupportedModelError(
                    f"every full-attention layer must store its keys and values, but layer {layer_idx} of "
                    f"{self.model_config.model_type!r} stored none. Use `DynamicCache`."
                )
            form = FORM if bare else self._probes[layer_idx].form
            make_compressor = partial(_make_layer_compressor, self.options, compressor, layer_idx)
            if layer_idx in plan.filter_layers:
                # keys as the model rotated them, so that attention reads them as they are
                form, make_compressor = None, _make_int4_compressor
            selector = plan.selector(layer_idx)
            layers[layer_idx] = DeltaKVLayer(layer_idx, self._ledger, make_compressor, form, self._registry, selector)
        if offloading and not torch.accelerator.is_available():
            raise InvalidOptionError("`offloading` must be False on a machine without an accelerator, got True.")
        # a linear layer can't tell which forwards have been through it
        self._touched: dict[int, int] = {}
        super().__init__(layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self._ledger.num_layers = len(self.own_layers)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path,
        *,
        model: PreTrainedModel | PretrainedConfig,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir=None,
        local_files_only: bool = False,
        force_download: bool = False,
        **options,
    ) -> DeltaKVCache:
        """A cache with a compressor from a folder, from this package (a bare name) or from the Hub (`owner/name`).

        For many caches load it once: `DeltaKVCache(model, compressor=KVCompressor.from_pretrained(...))`.

        Args:
            id_or_path, revision, token, cache_dir, local_files_only, force_download: as `KVCompressor.from_pretrained`.
            model, **options: as for `DeltaKVCache`.

        Raises:
            CompressorError: there is none, it is damaged, or it was made for a model of another architecture.
        """
        compressor = KVCompressor.from_pretrained(
            id_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls(model, compressor=compressor, **options)

    # -- what the hooks and the model tell ------------------------------------------------------------------------

    def note_attention(self, module: nn.Module, tables: object) -> None:
        """Called by the hook on attention modules; `tables` are the module's `position_embeddings`."""
        if self._bare_rope is not None:
            return
        layer_idx = module.layer_idx
        probe = self._probes.get(layer_idx)
        if probe is None or probe.module() is not module:
            raise CacheStateError(
                f"this cache was made for another model: layer {layer_idx} ({type(module).__name__}) is not the "
                "one that it knows. Make a cache for each model with `DeltaKVCache(model)`."
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, DeltaKVLayer):
            layer.receive_tables(*(tables if layer.form is not None and tables is not None else ()))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Stores `[batch, num_key_value_heads, q, head_dim]` new tokens of a layer; see `DeltaKVLayer.update`."""
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
                f"batch of {key_states.shape[0]}. Use `DeltaKVCache(model)`."
            )
        layer.receive_tables(*self._bare_rope.tables(key_states, layer.columns))

    # -- what users and generate call -----------------------------------------------------------------------------

    def flush(self) -> None:
        """Compresses all tokens beyond the window now; the state is then a function of the tokens fed alone."""
        self._check_whole()
        self._ledger.settle()
        with self._ledger.changing("flush"):
            flush = self._ledger.make_flush(merge=True)
            for layer in self.own_layers if flush is not None else ():
                layer.flush(flush)

    def memory_report(self) -> MemoryReport:
        """Bytes held, by part, beside those of a `DynamicCache`; prints as a table."""
        extra = self._bare_rope.tensors() if self._bare_rope is not None else []
        if self.saved_prompt is not None:
            extra += [self.saved_prompt.input_ids, self.saved_prompt.attention_mask]
        return report(self.layers, self._ledger, self._registry, extra)

    def dequantize(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys (rotated) and values of a layer, `[batch, num_key_value_heads, columns, head_dim]`.

        Padding is zero. A layer of the host gives what it holds: a sliding-window layer its window.

        Raises:
            CacheStateError: the layer holds no keys and values, or the last forward was broken off.
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
        """A `DynamicCache` of the decoded tokens, in memory of its own; padding is zero."""
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
    ) -> DeltaKVCache:
        """Compresses a `DynamicCache` that `model` has filled; it stays as it is.

        Args:
            cache: keys and values of a prompt.
            model, **options: as for `DeltaKVCache`.
            attention_mask: `[batch, columns]`, 0 at the padding of the prompt; None if there was none.
            position_ids: `[1 or batch, columns]`; None counts the real tokens of each row, as `generate` does.

        Raises:
            InvalidOptionError: `cache` is of another model, empty, or does not fit `attention_mask`.
            UnsupportedModelError: the model's rotary tables can't be made outside a forward.
        """
        made = cls(model, **options)
        fill(made, cache, attention_mask, position_ids)
        return made

    def save(self, path, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None) -> None:
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
    def load(
        cls,
        path,
        model: PreTrainedModel | PretrainedConfig,
        input_ids: torch.Tensor | None = None,
        *,
        compressor: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> DeltaKVCache:
        """The cache that `save` wrote, for the same model; its options are the saved ones.

        Args:
            path: of the file.
            model: the model (or bare config) of the saved cache, in this process.
            input_ids: `[batch, at least the saved columns]`; refused unless they begin with the ids in the file.
            compressor: the one that the saved cache used, if it used one; it is not in the file.
            offloading, offload_only_non_sliding: as for `DeltaKVCache`.

        Returns:
            A cache in memory of its own, on the devices where the layers of `model` run. Its `saved_prompt` is the
            `SavedPrompt` of the file, or None if it was saved without ids.

        Raises:
            CacheStateError: the file is damaged, of something else, of another model, class or version.
            InvalidOptionError: no such file, or `input_ids` differ from the saved ones.
        """
        make = partial(
            cls,
            model,
            compressor=compressor,
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )
        return load(cls, path, model, input_ids, make, compressor)

    def __repr__(self) -> str:
        own = len(self.own_layers)
        return f"DeltaKVCache({own} of {len(self.layers)} layers compressed, {self.get_seq_length()} tokens seen)"


def _check_compressor(compressor: object, model: PreTrainedModel | PretrainedConfig) -> KVCompressor | None:
    if compressor is None:
        return None
    if not isinstance(compressor, KVCompressor):
        raise InvalidOptionError(
            f"`compressor` must be a KVCompressor or None, got {compressor!r}. Load one by name with "
            "`KVCompressor.from_pretrained`, or call `DeltaKVCache.from_pretrained(name, model=model)`."
        )
    compressor.check_model(model)
    return compressor


# not a method: a layer must not hold the cache
def _make_layer_compressor(
    options: DeltaKVConfig,
    compressor: KVCompressor | None,
    layer_idx: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    device: torch.device,
):
    key_width, value_width = heads * key_dim, heads * value_dim
    if compressor is None:
        return DirectCompressor(options, key_width, value_width)
    return compressor.layer(layer_idx, key_width, value_width, device)


def _make_int4_compressor(heads: int, key_dim: int, value_dim: int, device: torch.device) -> Int4Compressor:
    return Int4Compressor(heads, key_dim, value_dim)
