"""The token ids that a saved cache has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..errors import InvalidOptionError


@dataclass(frozen=True)
class SavedPrompt:
    """Ids beside a saved cache.

    Attributes:
        input_ids: `[batch, columns]` int64 on the CPU, as fed, padding included.
        attention_mask: `[batch, columns]` int64 on the CPU, 0 where padding was fed.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return self.attention_mask.sum(1).tolist()

    def check_begins(self, input_ids: torch.Tensor) -> None:
        """Raises `InvalidOptionError` unless `input_ids` `[batch, n]` begin with these; padding is not compared."""
        given = _first_columns("input_ids", input_ids, *self.input_ids.shape)
        differs = ((given != self.input_ids) & (self.attention_mask != 0)).nonzero().tolist()
        if differs:
            row, column = differs[0]
            raise InvalidOptionError(
                f"`input_ids` must begin with the ids of the saved cache, but row {row} has {given[row, column]} in "
                f"column {column} and the saved one {self.input_ids[row, column]}. Feed this text to a new cache."
            )


def make_prompt(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch_size: int,
    columns: int,
    padding: torch.Tensor | None,
    counted: bool,
) -> SavedPrompt | None:
    """What to keep of the ids that a user handed to `save`; None if there were none.

    Args:
        input_ids, attention_mask: as handed over.
        batch_size, columns: of the cache.
        padding: bool `[batch, columns]`, True where the cache has seen padding, or None where it has seen none.
        counted: whether the cache has seen the padding.
    """
    if input_ids is None:
        if attention_mask is not None:
            raise InvalidOptionError("`attention_mask` must come with `input_ids`, got it alone: pass both.")
        return None
    ids = _first_columns("input_ids", input_ids, batch_size, columns)
    seen = torch.ones_like(ids) if padding is None else (~padding).long()
    if attention_mask is None:
        return SavedPrompt(ids, seen)
    if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
        raise InvalidOptionError(f"`attention_mask` must be a tensor [batch, columns], got {_shape(attention_mask)}.")
    missing = max(0, columns - attention_mask.shape[1])
    widened = pad((attention_mask != 0).long(), (0, missing), value=1)
    mask = _first_columns("attention_mask", widened, batch_size, columns)
    if counted and not torch.equal(mask, seen):
        raise InvalidOptionError(
            "`attention_mask` must be the one that the cache was fed with, got another: leave it out, the cache knows."
        )
    return SavedPrompt(ids, mask)


def _first_columns(name: str, tensor: torch.Tensor, batch_size: int, columns: int) -> torch.Tensor:
    """The first `columns` columns as int64 on the CPU, in memory of their own."""
    fits = (
        torch.is_tensor(tensor)
        and tensor.ndim == 2
        and not (tensor.is_floating_point() or tensor.is_complex())
        and tensor.shape[0] == batch_size
        and tensor.shape[1] >= columns
    )
    if not fits:
        raise InvalidOptionError(
            f"`{name}` must be a whole-number tensor [{batch_size}, {columns} or more], one column for each that the "
            f"cache has seen, got {_shape(tensor)}. Pass the ids that were fed, padding and generated ones included."
        )
    return tensor[:, :columns].to("cpu", torch.int64, copy=True)


def _shape(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"
