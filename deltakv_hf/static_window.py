"""A sliding-window layer of a cache of fixed size: the host's growing one, whose decode steps go round in a ring.

The host's `StaticSlidingWindowLayer` counts in Python, so a step is compiled anew once its window is full; it moves the
whole window for every token, and it can't be cropped. Here a step writes one token over the one that leaves the window,
and between steps the layer is the host's `DynamicSlidingWindowLayer`: whoever asks for `keys` gets them in order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .hf_compat import DynamicSlidingWindowLayer
from .static_layer import StaticStates, check_step
from .static_plan import StaticPlan, keep_address


class StaticWindowLayer(DynamicSlidingWindowLayer):
    """A cache layer for sliding-window attention in a cache with room for so many columns.

    Args:
        layer_idx: number of the decoder layer.
        growing: the host's layer whose place it takes.
        max_cache_len: columns that the cache has room for.

    Attributes:
        size: places of the ring; column `c` stands at `c % size`.
        plan: of the cache; None before the first step.
        live: `[batch, size]` bool, which places hold tokens that the next one sees; shared by layers of one size.
        is_first, is_last: of the layers that share `live`, and of all that take turns in a step.
    """

    saved_as = DynamicSlidingWindowLayer.__name__

    def __init__(self, layer_idx: int, growing: DynamicSlidingWindowLayer, max_cache_len: int):
        self.layer_idx, self.size = layer_idx, min(growing.sliding_window, max_cache_len)
        self.ring_keys: torch.Tensor | None = None
        self.ring_values: torch.Tensor | None = None
        self.plan: StaticPlan | None = None
        self.live: torch.Tensor | None = None
        self.is_first = self.is_last = False
        # seen by the ring: the host's code changes its own count before it asks for keys, or behind
        self.columns = 0
        # what the host's code has set; without it, the ring holds the tokens
        self._set: dict[str, torch.Tensor | None] = {}
        self._own = frozenset(vars(self)) | {"_own"}
        super().__init__(growing.sliding_window)

    # -- between steps: the host's layer ---------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:
        """`[batch, num_key_value_heads, tokens, head_dim]`, as the host's layer holds them."""
        return self._set["keys"] if "keys" in self._set else self._in_order(self.ring_keys)

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._set["keys"] = states

    @property
    def values(self) -> torch.Tensor | None:
        """The same of values."""
        return self._set["values"] if "values" in self._set else self._in_order(self.ring_values)

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._set["values"] = states

    def _in_order(self, ring: torch.Tensor) -> torch.Tensor:
        return ring.index_select(2, self._places(min(self.columns, self.sliding_window - 1), ring.device))

    def _places(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Where the newest tokens stand."""
        return torch.arange(self.columns - num_tokens, self.columns, device=device) % self.size

    @property
    def is_compileable(self) -> bool:
        """Whether its steps go round in the ring: not while tokens that have left the window may be asked back."""
        return not self.record_past

    def get_max_length(self) -> int:
        """Columns that it has room for."""
        return self.size

    def to_growing(self) -> DynamicSlidingWindowLayer:
        """The host's layer that holds the same tokens; it may share them."""
        growing = DynamicSlidingWindowLayer(self.sliding_window)
        vars(growing).update({name: value for name, value in vars(self).items() if name not in self._own})
        growing.keys, growing.values = self.keys, self.values
        return growing

    def take(self, growing: DynamicSlidingWindowLayer) -> None:
        """Becomes what the host's layer is, and keeps the ring."""
        for name, value in vars(growing).items():
            setattr(self, name, value)

    def tensors(self) -> list[torch.Tensor]:
        """What is held beside `live`."""
        held = self.ring_keys, self.ring_values, *self._set.values(), self._sliding_window_tensor
        return [tensor for tensor in held if tensor is not None]

    def resize(self, max_cache_len: int) -> None:
        """Moves what is held into room for another number of columns."""
        if self.is_initialized:
            self.keys, self.values = self.keys, self.values
        self.size = min(self.sliding_window, max_cache_len)
        self.ring_keys = self.ring_values = None

    def equip(self, plan: StaticPlan, live: torch.Tensor) -> None:
        """Makes the layer ready for the steps of `plan`."""
        self.plan, self.live, self.columns = plan, live, self.cumulative_length
        for name, states in self._set.items():
            ring = getattr(self, f"ring_{name}")
            shape = *states.shape[:2], self.size, states.shape[3]
            if ring is None or (ring.shape, ring.dtype, ring.device) != (shape, states.dtype, states.device):
                # zeros: what is never read is multiplied by zero
                ring = states.new_zeros(shape)
                setattr(self, f"ring_{name}", ring)
            ring.index_copy_(2, self._places(states.shape[2], states.device), states)
        self._set = {}
        keep_address(self.ring_keys)
        keep_address(self.ring_values)

    def advance(self, num_steps: int) -> None:
        """Counts the tokens of steps that have run."""
        self.cumulative_length += num_steps
        self.columns += num_steps

    # -- a decode step ---------------------------------------------------------------------------------------------

    def step(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[StaticStates, StaticStates]:
        """Writes one token of every row, `[batch, num_key_value_heads, 1, head_dim]`, over the oldest."""
        place = self.plan.columns % self.size
        self.ring_keys.index_copy_(2, place, key_states.detach())
        self.ring_values.index_copy_(2, place, value_states.detach())
        if self.is_first:
            self.live.index_fill_(1, place, True)
        return StaticStates(self, key_states), StaticStates(self, value_states)

    def attend_step(
        self, query: torch.Tensor, mask: torch.Tensor | None, scale: float | None, others: dict
    ) -> torch.Tensor:
        """See `StaticLayer.attend_step`; the mask, which is of the newest column, is read there."""
        check_step(query, others)
        # queries that share a head stand as tokens: keys are not repeated
        queries = query.squeeze(2).unflatten(1, (self.ring_keys.shape[1], -1))
        live = self.live[:, None, None]
        output = F.scaled_dot_product_attention(queries, self.ring_keys, self.ring_values, live, scale=scale)
        if self.is_last:
            self.plan.move_on()
        return output.flatten(1, 2).unsqueeze(1)


def new_live(batch_size: int, size: int, device: torch.device) -> torch.Tensor:
    """`live` of layers with so many places, which keeps its address."""
    live = torch.zeros(batch_size, size, dtype=torch.bool, device=device)
    keep_address(live)
    return live


def live_places(size: int, columns: int, row_columns: list[torch.Tensor] | None, batch_size: int) -> torch.Tensor:
    """Which places hold tokens that the next column, number `columns`, sees: `[batch, size]` bool on the CPU."""
    first = max(0, columns - size + 1)
    live = torch.zeros(batch_size, size, dtype=torch.bool)
    for row in range(batch_size):
        held = torch.arange(columns) if row_columns is None else row_columns[row]
        live[row, held[held >= first] % size] = True
    return live
