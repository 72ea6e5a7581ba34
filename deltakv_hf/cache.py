"""`DeltaKVCache`: a `transformers` cache that stores tokens as quantised residuals against similar earlier tokens."""

from __future__ import annotations

import os
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .block_table import BlockPool
from .compressor import DirectCompressor, Int4Compressor
from .compressor.kv_compressor import KVCompressor
from .config import FREE, DeltaKVConfig
from .errors import InvalidOptionError
from .layer import DeltaKVLayer
from .ledger import TokenLedger
from .model_cache import checked_compressor
from .rope import RopeForm
from .selection import SelectionPlan
from .static_cache import StaticModelCache
from .static_layer import StaticLayer
from .static_run import check_max_cache_len, check_max_pool_tokens, pool_block_size, static_sizes


class DeltaKVCache(StaticModelCache):
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
        max_cache_len: columns that there is room for. With it, and `model.set_attn_implementation("deltakv")`, all
            memory is taken at the prompt and `generate` compiles its steps on a GPU; beyond it, it raises. None: the
            cache grows.
        max_pool_tokens: with `max_cache_len`, compressed tokens that all rows together have room for; beyond it, it
            raises. None: as many as the rows of the prompt may come to need, padding left out.
        **options: fields of `DeltaKVConfig`.

    Raises:
        InvalidOptionError: an option is unknown or out of range.
        UnsupportedModelError: the model's attention cannot be served.

    Examples:
        >>> cache = DeltaKVCache(model)
        >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=8)
        >>> cache
        DeltaKVCache(2 of 2 layers compressed, 519 tokens seen)
        >>> cache.crop(-7)  # takes back all but the first new token
        >>> cache.get_seq_length()
        512
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        compressor: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        max_cache_len: int | None = None,
        max_pool_tokens: int | None = None,
        **options,
    ):
        self.compressor = checked_compressor("compressor", compressor, model)
        self.options = DeltaKVConfig.from_options(options, compressor)
        self._max_cache_len, ledger = max_cache_len, TokenLedger(self.options)
        check_max_pool_tokens(max_pool_tokens, max_cache_len)
        if max_cache_len is not None:
            check_max_cache_len(max_cache_len, self.options, offloading)
            ledger.pool = BlockPool(pool_block_size(_strides(self.options, self.compressor)), max_pool_tokens)
        super().__init__(model, ledger, offloading, offload_only_non_sliding)
        if max_cache_len is not None:
            self._fix_size(max_cache_len)

    def _make_layers(self, forms: dict[int, RopeForm | None]) -> dict[int, DeltaKVLayer]:
        plan, layers = SelectionPlan(self.options, self.compressor, self.model_config, list(forms)), {}
        sizes = None if self._max_cache_len is None else self._sizes(self._max_cache_len)
        for layer_idx, form in forms.items():
            make_compressor = partial(_make_layer_compressor, self.options, self.compressor, layer_idx)
            if layer_idx in plan.filter_layers:
                # keys as the model rotated them, so that attention reads them as they are
                form, make_compressor = None, _make_int4_compressor
            held = layer_idx, self._ledger, make_compressor, form, self._registry, plan.selector(layer_idx)
            layers[layer_idx] = DeltaKVLayer(*held) if sizes is None else StaticLayer(*held, sizes=sizes)
        return layers

    def _sizes(self, max_cache_len: int) -> tuple[int, int, int]:
        return static_sizes(self.options, max_cache_len, self._ledger.pool.block_size)

    def resize(self, max_cache_len: int, max_pool_tokens: int | None = None) -> None:
        """Makes room for another number of columns in a cache that was made with `max_cache_len`.

        What is held moves, with both rooms in memory for one layer at a time; the model's step is compiled anew.

        Args:
            max_cache_len: columns that there shall be room for.
            max_pool_tokens: compressed tokens that all rows together shall have room for; None: as for the class.

        Raises:
            InvalidOptionError: not that many columns or tokens can be, more are held, or the cache grows by itself.
        """
        if self._max_cache_len is None:
            raise InvalidOptionError(
                f"`resize` must be left out for a cache without `max_cache_len`, which grows, got {max_cache_len}."
            )
        check_max_cache_len(max_cache_len, self.options, self.offloading)
        check_max_pool_tokens(max_pool_tokens, max_cache_len)
        self._resize(self._sizes(max_cache_len), max_pool_tokens)
        self._max_cache_len = max_cache_len

    def release_rows(self, rows: list[int] | torch.Tensor) -> None:
        """Forgets all tokens of some rows, whose texts have come to their end; the other rows stay as they are.

        They stay in the batch and may be fed, but what they say means nothing any more. With `max_cache_len` other
        rows may take their blocks of the pool, and steps read nothing of them. Layers of the host keep what they hold.
        In `generate`, `ReleaseFinished` calls it.

        Args:
            rows: their numbers, or `[batch]` bool.

        Raises:
            InvalidOptionError: there is no such row.
            CacheStateError: the last forward was broken off.

        Examples:
            >>> cache.release_rows([])
        """
        self._check_whole()
        ledger = self._ledger
        numbers = torch.as_tensor(rows).cpu()
        numbers = (numbers.nonzero().flatten() if numbers.dtype == torch.bool else numbers).tolist()
        if not all(0 <= row < ledger.batch_size for row in numbers):
            raise InvalidOptionError(f"`rows` must be from 0 to {ledger.batch_size - 1}, got {numbers}.")
        if not numbers:
            return
        with ledger.changing("release_rows"):
            crop = ledger.release(numbers)
            for layer in self.own_layers:
                layer.crop_to(crop)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | os.PathLike,
        *,
        model: PreTrainedModel | PretrainedConfig,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **options,
    ) -> DeltaKVCache:
        """A cache with a compressor from a folder, from this package (a bare name) or from the Hub (`owner/name`).

        For many caches load it once: `DeltaKVCache(model, compressor=KVCompressor.from_pretrained(...))`.

        Args:
            id_or_path: as for `KVCompressor.from_pretrained`, like the next five.
            model: as for `DeltaKVCache`.
            revision: branch, tag or commit on the Hub (None: main).
            token: for the Hub (None: the one that was logged in with).
            cache_dir: where downloads are kept (None: the cache that all of `huggingface_hub` uses).
            local_files_only: take what was downloaded before and ask nobody.
            force_download: download again what is there already.
            **options: as for `DeltaKVCache`.

        Returns:
            An empty cache.

        Raises:
            CompressorError: there is none, it is damaged, or it was made for a model of another architecture.
            InvalidOptionError: an option is unknown, out of range or fixed by the compressor.
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

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PretrainedConfig,
        input_ids: torch.Tensor | None = None,
        *,
        compressor: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        max_cache_len: int | None = None,
        max_pool_tokens: int | None = None,
    ) -> DeltaKVCache:
        """The cache that `save` wrote, for the same model; its options are the saved ones.

        Args:
            path: of the file.
            model: the model (or bare config) of the saved cache, in this process.
            input_ids: `[batch, at least the saved columns]`; refused unless they begin with the ids in the file.
            compressor: the one that the saved cache used, if it used one; it is not in the file.
            offloading: as for `DeltaKVCache`.
            offload_only_non_sliding: as for `DeltaKVCache`.
            max_cache_len: as for `DeltaKVCache`; the saved cache may have been of another size, or of none.
            max_pool_tokens: as for `DeltaKVCache`.

        Returns:
            A cache in memory of its own, on the devices where the layers of `model` run. Its `saved_prompt` is the
            `SavedPrompt` of the file, or None if it was saved without ids.

        Raises:
            CacheStateError: the file is damaged, of something else, of another model, class or version.
            InvalidOptionError: no such file, or `input_ids` differ from the saved ones.
        """

        def make(options: dict) -> DeltaKVCache:
            free = options if compressor is None else {name: options[name] for name in FREE}
            placing = {"offloading": offloading, "offload_only_non_sliding": offload_only_non_sliding}
            sizes = {"max_cache_len": max_cache_len, "max_pool_tokens": max_pool_tokens}
            return cls(model, compressor=compressor, **sizes, **placing, **free)

        return cls._load(path, model, input_ids, make, compressor)


def _strides(options: DeltaKVConfig, compressor: KVCompressor | None) -> set[int]:
    layers = [] if compressor is None else [layer for layer in compressor.config["layers"] if layer is not None]
    return {layer.get("reference_stride", options.reference_stride) for layer in layers} or {options.reference_stride}


# not a method: a layer must not hold the cache
def _make_layer_compressor(
    options: DeltaKVConfig,
    compressor: KVCompressor | None,
    layer_idx: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
):
    key_width, value_width = heads * key_dim, heads * value_dim
    if compressor is None:
        return DirectCompressor(options, key_width, value_width)
    return compressor.layer(layer_idx, key_width, value_width, device)


def _make_int4_compressor(
    heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Int4Compressor:
    return Int4Compressor(heads, key_dim, value_dim)
