"""Lazy keys and values: tensors with a shape, a dtype and a device, whose numbers are decoded on first use.

A decode step hands such a pair to whatever attention the model runs. Its first touch of either decodes both, once;
when the layer's attention returns, the pair and the dense numbers die with it. Attention of torch itself
(`scaled_dot_product_attention`) is answered by the reader where it can do without dense numbers.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

# what can be asked of a lazy tensor without decoding it
_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.grad_fn.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.is_mps.__get__,
    torch.Tensor.is_nested.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
}


class Reader(Protocol):
    """What a pair is made of."""

    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values."""

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor | None:
        """What attention gives, or None if it takes dense keys and values."""


class _Pair:
    """What one layer holds in one forward, and both dense tensors once somebody asked for them."""

    def __init__(self, reader: Reader):
        self._reader: Reader | None = reader
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None
        self._attended = False

    def dense(self, which: int) -> torch.Tensor:
        if self._dense is None:
            self._dense = self._reader.decode()
            # what the decoding held (stored bytes of before a flush) is not needed any more
            self._reader = None
        return self._dense[which]

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor | None:
        # layers that share keys and values come again with the same pair: then it pays to have them dense
        if self._dense is not None or self._attended:
            return None
        self._attended = True
        return self._reader.attend(query, mask, scale)


class LazyStates(torch.Tensor):
    """Key or value states that are decoded on first use; everything but metadata sees the dense tensor."""

    @staticmethod
    def __new__(cls, pair: _Pair, which: int, shape: tuple[int, ...], like: torch.Tensor):
        lazy = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        lazy._pair, lazy._which = pair, which
        return lazy

    def materialize(self) -> torch.Tensor:
        """The dense tensor, shape as this one's."""
        return self._pair.dense(self._which)

    def __repr__(self, **kwargs) -> str:
        return f"LazyStates(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func is F.scaled_dot_product_attention:
            attended = attend_pair(*args, **kwargs)
            if attended is not None:
                return attended
        args, kwargs = tree_map_only(LazyStates, LazyStates.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # reached by callers below the Python API (autograd, compiled code)
        args, kwargs = tree_map_only(LazyStates, LazyStates.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def attend_pair(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> torch.Tensor | None:
    """`scaled_dot_product_attention` as a decode step calls it, or None where dense tensors are needed."""
    is_pair = isinstance(key, LazyStates) and isinstance(value, LazyStates) and key._pair is value._pair
    if not is_pair or (key._which, value._which) != (0, 1) or is_causal or dropout_p:
        return None
    wants_grad = torch.is_grad_enabled() and query.requires_grad
    heads = key.shape[1]
    if wants_grad or query.ndim != 4 or query.shape[1] % heads or (query.shape[1] != heads and not enable_gqa):
        return None
    return key._pair.attend(query, attn_mask, 1 / math.sqrt(query.shape[-1]) if scale is None else scale)


def lazy_pair(
    reader: Reader,
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    key_states: torch.Tensor,
    value_states: torch.Tensor,
) -> tuple[LazyStates, LazyStates]:
    """Lazy keys and values of the given shapes, with dtype and device of `key_states` and `value_states`."""
    pair = _Pair(reader)
    return LazyStates(pair, 0, key_shape, key_states), LazyStates(pair, 1, value_shape, value_states)
