"""KIVI (Z. Liu et al., ICML 2024, arXiv 2402.02750) with packed codes: a baseline to measure against.

Keys are quantised as the model rotated them, each channel over a group of tokens, values each token over a group of
channels, as the paper's section 4 has it. The newest `residual_length` values and up to as many keys stay as they came.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from ..dispatch import dequantize, quantize
from ..errors import InvalidOptionError
from ..hf_compat import Cache, DynamicLayer
from ..memory import held_bytes


class KiviLayer(DynamicLayer):
    """One layer: codes and levels of older tokens, raw newer ones.

    Attributes:
        key_codes: `[batch, heads, head_dim, groups of tokens, group_size * nbits / 8]` uint8.
        key_levels: `[batch, heads, head_dim, groups of tokens, 1, 2]` float16.
        value_codes: `[batch, heads, tokens, head_dim * nbits / 8]` uint8.
        value_levels: `[batch, heads, tokens, head_dim / group_size, 2]` float16.
        keys, values: raw, `[batch, heads, tokens, head_dim]`.
    """

    is_croppable = False

    def __init__(self, nbits: int, group_size: int, residual_length: int):
        super().__init__()
        self.nbits, self.group_size, self.residual_length = nbits, group_size, residual_length
        self.seen, self.key_codes, self.value_codes = 0, None, None
        self.key_levels, self.value_levels = None, None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Returns the keys and values of all tokens; a first prompt is attended to as it came, as KIVI's authors do."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        keys, values = self._all_keys(), self._all_values()
        self._quantize_keys(self.keys.shape[2] // self.residual_length * self.residual_length)
        self._quantize_values(max(0, self.values.shape[2] - self.residual_length))
        return keys, values

    def _all_keys(self) -> torch.Tensor:
        if self.key_codes is None:
            return self.keys
        old = dequantize(self.key_codes, self.key_levels, self.nbits).flatten(3).transpose(2, 3)
        return torch.cat([old.to(self.keys.dtype), self.keys], dim=2)

    def _all_values(self) -> torch.Tensor:
        if self.value_codes is None:
            return self.values
        old = dequantize(self.value_codes, self.value_levels, self.nbits)
        return torch.cat([old.to(self.values.dtype), self.values], dim=2)

    def _quantize_keys(self, count: int) -> None:
        if not count:
            return
        channels = self.keys[:, :, :count].float().transpose(2, 3).unflatten(3, (-1, self.group_size)).contiguous()
        codes, levels = quantize(channels, self.nbits, self.group_size)
        grown = self.key_codes is not None
        self.key_codes = torch.cat([self.key_codes, codes], dim=3) if grown else codes
        self.key_levels = torch.cat([self.key_levels, levels], dim=3) if grown else levels
        self.keys = self.keys[:, :, count:].clone()

    def _quantize_values(self, count: int) -> None:
        if not count:
            return
        codes, levels = quantize(self.values[:, :, :count].float().contiguous(), self.nbits, self.group_size)
        grown = self.value_codes is not None
        self.value_codes = torch.cat([self.value_codes, codes], dim=2) if grown else codes
        self.value_levels = torch.cat([self.value_levels, levels], dim=2) if grown else levels
        self.values = self.values[:, :, count:].clone()

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def coded(self) -> tuple[int, int]:
        """Bytes of the codes and their levels, and those of the keys and values that they stand for."""
        held = (self.key_codes, self.key_levels, self.value_codes, self.value_levels)
        tensors = [tensor for tensor in held if tensor is not None]
        numbers = sum(codes.numel() for codes in (self.key_codes, self.value_codes) if codes is not None)
        return held_bytes(tensors), numbers * 8 // self.nbits * self.keys.element_size()

    def reset(self) -> None:
        """Forgets all tokens."""
        super().reset()
        self.seen, self.key_codes, self.value_codes = 0, None, None
        self.key_levels, self.value_levels = None, None

    def _refuse(self, *args, **kwargs):
        raise NotImplementedError("a KiviCache reads and generates; it cannot be cropped nor its rows be reordered.")

    crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class KiviCache(Cache):
    """KIVI as a cache of the host.

    Args:
        config: of the model.
        nbits: 4 or 2.
        group_size: numbers that share a scale and a minimum, a divisor of the head dimension.
        residual_length: newest tokens that stay as they came, a multiple of `group_size`.

    Raises:
        InvalidOptionError: an argument breaks its rule.
    """

    def __init__(self, config: PretrainedConfig, nbits: int = 4, group_size: int = 32, residual_length: int = 32):
        if nbits not in (2, 4):
            raise InvalidOptionError(f"`nbits` must be 2 or 4, got {nbits}.")
        if group_size < 1 or residual_length < 1 or residual_length % group_size:
            raise InvalidOptionError(
                f"`residual_length` must be a multiple of `group_size`, got {residual_length} and {group_size}."
            )
        text = config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if width % group_size:
            raise InvalidOptionError(f"`group_size` must divide the head dimension {width}, got {group_size}.")
        layers = [KiviLayer(nbits, group_size, residual_length) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)

    @property
    def compressed_share(self) -> float:
        """Bytes of what is coded over the bytes that a dense cache holds for it; 0 before anything is."""
        held, dense = (
            sum(sizes) for sizes in zip(*(layer.coded() for layer in self.layers if layer.seen), strict=True)
        )
        return held / dense if dense else 0.0
