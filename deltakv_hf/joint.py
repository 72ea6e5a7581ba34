"""`JointEncodedCache`: a `transformers` cache that stores equal blocks of tokens once."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .compressor.blocks import BlockCoder
from .compressor.coded_blocks import CodedBlockCoder
from .compressor.fused_blocks import FusingCoder
from .compressor.kv_compressor import KVCompressor
from .joint_config import JointEncodingConfig
from .joint_layer import JointLayer
from .joint_ledger import JointLedger
from .model_cache import ModelCache, checked_compressor
from .rate_distortion import RateDistortion
from .references import Lattice
from .rope import RopeForm


class JointEncodedCache(ModelCache):
    """Drop-in KV cache for `model.generate(past_key_values=...)` (joint encoding, arXiv 2601.03067).

    Rows that begin with the same tokens at the same positions hold the same blocks, whether they came as a batch, as
    beams, as `num_return_sequences` or from `batch_repeat_interleave`; the first row's keys and values are the ones
    stored. Nothing is lost: what is stored is what the model made. With `max_relative_error` or `target_ratio` blocks
    that are similar share storage too, each within a bound on the error of its keys and of its values.

    Args:
        model: the model that will use the cache; hooks are registered on it once (see `deltakv_hf.detach`).
        residual: a compressor made for this model (`KVCompressor.calibrate` or `.from_pretrained`), which codes what is
            stored; equal blocks are coded once. None: blocks are stored as they are.
        offloading: keep what is stored in CPU memory and fetch each layer while the one before it runs (needs an
            accelerator).
        offload_only_non_sliding: with `offloading`, leave sliding-window layers on the device.
        **options: fields of `JointEncodingConfig`.

    Raises:
        InvalidOptionError: an option is unknown or out of range.
        UnsupportedModelError: the model's attention cannot be served.

    Examples:
        >>> cache = JointEncodedCache(model)
        >>> sampling = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 8}
        >>> out = model.generate(**inputs, past_key_values=cache, **sampling)
        >>> out.shape, cache.num_blocks  # four rows hold one prompt of 512 tokens: 32 blocks of 16
        (torch.Size([4, 520]), 32)
        >>> cache.memory_report().ratio < 0.5  # of a bigger model: a quarter
        True
    """

    compressor_argument = "residual"
    _how = "in blocks"

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        residual: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        **options,
    ):
        self.compressor = checked_compressor("residual", residual, model)
        self.options = JointEncodingConfig.from_options(options, residual)
        ledger = JointLedger(self.options)
        if residual is not None:
            ledger.coding = Lattice(residual.reference_stride)
        super().__init__(model, ledger, offloading, offload_only_non_sliding)
        self._ledger.has_windows = any(getattr(layer, "is_sliding", False) for layer in self.layers)

    def _make_layers(self, forms: dict[int, RopeForm | None]) -> dict[int, JointLayer]:
        options, ledger, residual = self.options, self._ledger, self.compressor

        def make_coder(
            layer_idx: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device
        ) -> BlockCoder:
            key_width, width = heads * key_dim, heads * (key_dim + value_dim)
            if residual is not None:
                inner = residual.layer(layer_idx, key_width, width - key_width, device)
                return CodedBlockCoder(options.block_size, inner)
            if not options.fuses:
                return BlockCoder(options.block_size, width, dtype)
            aim = options.scope, options.largest_error, options.target_ratio
            counts = ledger.num_groups, ledger.num_home_columns
            return FusingCoder(options.block_size, width, key_width, dtype, layer_idx, *aim, *counts)

        if not options.strips_rope and residual is None:
            forms = dict.fromkeys(forms)
        return {
            idx: JointLayer(idx, ledger, partial(make_coder, idx), form, self._registry) for idx, form in forms.items()
        }

    def note_forward(
        self,
        module: nn.Module,
        attention_mask: object,
        input_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: torch.Tensor | None = None,
        is_text: bool = True,
    ) -> None:
        """See `CompressedCache.note_forward`; the ids say which blocks are equal."""
        outermost = self._model is not None and module is self._model()
        if self._ledger.begins(outermost, module):
            self._ledger.note_text(input_ids, position_ids, is_text)
        super().note_forward(module, attention_mask, input_ids, use_cache, position_ids, is_text)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: PreTrainedModel | PretrainedConfig,
        input_ids: torch.Tensor | None = None,
        *,
        residual: KVCompressor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> JointEncodedCache:
        """The cache that `save` wrote, for the same model; its options are the saved ones.

        Args:
            path: of the file.
            model: the model (or bare config) of the saved cache, in this process.
            input_ids: `[batch, at least the saved columns]`; refused unless they begin with the ids in the file.
            residual: the compressor that the saved cache used, if it used one; it is not in the file.
            offloading: as for `JointEncodedCache`.
            offload_only_non_sliding: as for `JointEncodedCache`.

        Returns:
            A cache in memory of its own, on the devices where the layers of `model` run. Its `saved_prompt` is the
            `SavedPrompt` of the file, or None if it was saved without ids.

        Raises:
            CacheStateError: the file is damaged, of something else, of another model, class or version.
            InvalidOptionError: no such file, or `input_ids` differ from the saved ones.
        """

        def make(options: dict) -> JointEncodedCache:
            placing = {"offloading": offloading, "offload_only_non_sliding": offload_only_non_sliding}
            return cls(model, residual=residual, **placing, **options)

        return cls._load(path, model, input_ids, make, residual)

    @property
    def num_blocks(self) -> int:
        """Different blocks that the rows hold, before similar ones share storage."""
        return self._ledger.num_blocks

    def rate_distortion(self) -> list[RateDistortion]:
        """Compares theory and practice (arXiv 2601.03067, the Poisson model, and our own estimate beside it).

        Returns:
            Of each layer and group: what was predicted for the blocks that it had first, and what has come of it. Empty
            unless similar blocks may share storage and there were enough blocks.
        """
        return [plan for layer in self.own_layers for _, plan in sorted(layer.plans.items())]
