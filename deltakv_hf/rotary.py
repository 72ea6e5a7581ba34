"""RoPE tables of any positions, from the model's own rotary modules, for tokens that no forward brings."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RotaryCall:
    """One call of a module that made RoPE tables, ready to be repeated for other positions.

    Attributes:
        module: weak reference to the rotary module.
        args, kwargs: of the call, its tensors emptied; integer ones are the positions.
    """

    module: weakref.ref
    args: tuple
    kwargs: dict

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin `[batch, tokens, width]` of int64 positions `[batch, tokens]`."""

        def place(value: object) -> object:
            if not torch.is_tensor(value) or value.is_floating_point():
                return value
            # multimodal tables take positions [3, batch, tokens]; text has the same in all three
            return positions.to(value.device).expand(*value.shape[:-2], *positions.shape)

        kwargs = {name: place(value) for name, value in self.kwargs.items()}
        return self.module()(*(place(value) for value in self.args), **kwargs)


class RotaryWatch:
    """Notes the calls of all modules without children while they run; `find` tells which one made given tables."""

    def __init__(self, root: nn.Module):
        self._calls: list[tuple[RotaryCall, object]] = []
        leaves = [module for module in root.modules() if next(module.children(), None) is None]
        self._handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in leaves]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            args = tuple(_emptied(value) for value in args)
            kwargs = {name: _emptied(value) for name, value in kwargs.items()}
            self._calls.append((RotaryCall(weakref.ref(module), args, kwargs), output))

    def find(self, tables: object) -> RotaryCall | None:
        """The call that returned the very tensors `tables`, a pair cos, sin."""
        if isinstance(tables, tuple) and len(tables) == 2:
            for call, output in self._calls:
                if output[0] is tables[0] and output[1] is tables[1]:
                    return call
        return None

    def remove(self) -> None:
        """Removes the hooks; what was noted stays."""
        for handle in self._handles:
            handle.remove()


def _emptied(value: object) -> object:
    # rotary modules ask the hidden states for their dtype and device alone
    return value[..., :0].clone() if torch.is_tensor(value) and value.ndim else value
