"""Gives back what rows hold whose texts have ended, while `generate` goes on with the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import StoppingCriteria

from .cache import DeltaKVCache
from .config import check_integer
from .errors import InvalidOptionError


class ReleaseFinished(StoppingCriteria):
    """Releases the rows of a cache that have said an end token: a criterion of `generate` that never stops it.

    `generate` feeds such rows padding until the last one has ended. Their tokens are forgotten, so that steps need not
    read them, and with `max_pool_tokens` the other rows may take their room. For greedy search and sampling: beams
    change places.

    Args:
        cache: the one that `generate` is given.
        eos_token_id: end tokens, as of the generation config.
        every: tokens between two looks; a look waits for the device.

    Raises:
        InvalidOptionError: `every` is less than 1, or there is no end token.

    Examples:
        >>> ended = ReleaseFinished(cache, eos_token_id=7)
        >>> out = model.generate(**inputs, past_key_values=cache, stopping_criteria=[ended], max_new_tokens=8)
    """

    def __init__(self, cache: DeltaKVCache, eos_token_id: int | Sequence[int] | torch.Tensor, every: int = 64):
        check_integer("every", every, low=1)
        if eos_token_id is None:
            raise InvalidOptionError("`eos_token_id` must be a token or several, got None: without one no row ends.")
        self.cache, self.every = cache, every
        self.eos_token_id = torch.as_tensor(eos_token_id).flatten()
        self._first = self._seen = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """Looks for ended rows.

        Args:
            input_ids: `[batch, tokens]` int64, prompt and what was said so far.
            scores: not used.
            **kwargs: not used.

        Returns:
            `[batch]` bool, False: no row is to stop for it.
        """
        batch, length = input_ids.shape
        if length != self._seen + 1:
            # another text
            self._first = length - 1
        self._seen = length
        if (length - self._first) % self.every == 0:
            said = input_ids[:, self._first :]
            ended = torch.isin(said, self.eos_token_id.to(said.device)).any(1).cpu()
            if not ended.all():
                self.cache.release_rows(ended)
        return torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
