"""Lazy keys and values: tensors with a shape, a dtype and a device, whose numbers are decoded on first use.

A decode step hands such a pair to whatever attention the model runs. Its first touch of either decodes both, once;
when the layer's attention returns, the pair and the dense numbers die with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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


class _Pair:
    """Both dense tensors of one layer and one forward, once somebody asked for them."""

    def __init__(self, decode: Callable[[], tuple[torch.Tensor, torch.Tensor]]):
        self._decode = decode
        self._dense: tuple[torch.Tensor, torch.Tensor] | None = None

    def dense(self, which: int) -> torch.Tensor:
        if self._dense is None:
            self._dense = self._decode()
            # what the decoding held (stored bytes of before a flush) is not needed any more
            self._decode = None
        return self._dense[which]


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
        args, kwargs = tree_map_only(LazyStates, LazyStates.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # reached by callers below the Python API (autograd, compiled code)
        args, kwargs = tree_map_only(LazyStates, LazyStates.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)


def lazy_pair(
    decode: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    key_states: torch.Tensor,
    value_states: torch.Tensor,
) -> tuple[LazyStates, LazyStates]:
    """Lazy keys and values of the given shapes, with dtype and device of `key_states` and `value_states`."""
    pair = _Pair(decode)
    return LazyStates(pair, 0, key_shape, key_states), LazyStates(pair, 1, value_shape, value_states)
