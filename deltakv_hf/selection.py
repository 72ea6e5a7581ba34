"""Which compressed tokens a decode step reads: those whose leading components score best (coarse to fine).

Every token of a calibrated compressor begins with the components that matter most. A step scores all tokens by the
first bytes of their codes, takes those with the largest weight for any head, and reads only these whole. Sinks and the
recent window are read in any case.
"""

from __future__ import annotations

import math

import torch

from .code_reading import CodeReader
from .compressor.kv_compressor import KVCompressor
from .config import DeltaKVConfig
from .dispatch import Attended
from .errors import InvalidOptionError
from .stats import SelectionStats


class Selector:
    """How a layer's decode steps choose tokens, and what they have chosen so far.

    Args:
        keep: compressed tokens of a row to read: a number, or a share of them (a float up to 1).
        index_bytes: of each token, by which it is scored.
        sample_every: of so many steps one also reads everything, to tell what the others miss; 0: none.

    Attributes:
        steps, tokens_read, tokens_held: steps that chose, and compressed tokens that they read and could have read.
        recalls: of each sampled step, the share of attention that went to what was read, mean over heads and rows.
    """

    def __init__(self, keep: int | float, index_bytes: int, sample_every: int = 0):
        self.keep, self.index_bytes, self.sample_every = keep, index_bytes, sample_every
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.steps = self.tokens_read = self.tokens_held = 0
        self.recalls: list[float] = []

    def budget(self, compressed: int) -> int:
        """How many of so many compressed tokens are read."""
        return self.keep if isinstance(self.keep, int) else math.ceil(self.keep * compressed)

    def chooses(self, compressed: int, code_bytes: int) -> bool:
        """Whether so many compressed tokens of so many bytes are worth a choice: scoring short ones is reading them."""
        return self.budget(compressed) < compressed and code_bytes > self.index_bytes

    def attend(self, codes: CodeReader, query: torch.Tensor, mask: torch.Tensor | None, raw: Attended) -> Attended:
        """What a step sees in chosen compressed tokens and in `raw`.

        Args:
            query: `[batch, heads, queries, head_dim]` float32, of one column.
            mask: of the compressed tokens.
            raw: what was seen in sinks, window and pending tokens.
        """
        compressed = codes.layout.compressed
        budget = self.budget(compressed)
        scores = codes.score(query, mask, self.index_bytes)
        seen = codes.attend(query, mask, choose(scores, raw, budget)).merge(raw)
        if self.sample_every and self.steps % self.sample_every == 0:
            self.recalls.append(attention_share(seen, codes.attend(query, mask).merge(raw)))
        self.steps += 1
        self.tokens_read += budget * len(query)
        self.tokens_held += compressed * len(query)
        return seen


def make_selector(options: DeltaKVConfig, compressor: KVCompressor | None) -> Selector | None:
    """A layer's, as the options have it.

    Raises:
        InvalidOptionError: tokens of this compressor do not begin with what matters most.
    """
    if options.selection == "all":
        return None
    if compressor is None or compressor.config["kind"] != "transform":
        got = "no compressor" if compressor is None else f"one of kind {compressor.config['kind']!r}"
        raise InvalidOptionError(
            f'`selection` must be "all" without a calibrated compressor, got {options.selection!r} and {got}. Make one '
            "with `KVCompressor.calibrate(model, ...)`."
        )
    return Selector(options.keep, options.index_bytes, options.sample_every)


def selection_stats(selectors: list[Selector | None]) -> SelectionStats | None:
    """Of all layers, or None if none chooses."""
    used = [selector for selector in selectors if selector is not None]
    if not used:
        return None
    recalls = [recall for selector in used for recall in selector.recalls]
    counts = (sum(getattr(selector, name) for selector in used) for name in ("steps", "tokens_read", "tokens_held"))
    return SelectionStats(*counts, sum(recalls) / len(recalls) if recalls else None)


def choose(scores: torch.Tensor, raw: Attended, budget: int) -> torch.Tensor:
    """The tokens with the largest weight for any head and query, one set for all of them.

    Args:
        scores: `[batch, heads, queries, n]` float32.
        raw: what was seen in tokens that are read in any case.

    Returns:
        `[batch, budget]` int64, ascending.
    """
    # a head that looks elsewhere has no say here
    everywhere = torch.logaddexp(scores.logsumexp(-1, keepdim=True), raw.maximum + raw.total.log())
    weights = (scores - everywhere).nan_to_num_(nan=-torch.inf).amax((1, 2))
    return weights.topk(budget, sorted=False).indices.sort(dim=-1).values


def attention_share(some: Attended, every: Attended) -> float:
    """Of the attention of `every` that went to the tokens of `some`."""
    share = (some.maximum - every.maximum).exp() * some.total / every.total
    return share.nan_to_num(1.0).mean().item()
