"""Which compressed tokens a decode step reads.

Coarse to fine: every token of a calibrated compressor begins with the components that matter most. A step scores all
tokens by the first bytes of their codes, takes those with the largest weight for any head, and reads only these whole.
Filter layers: some layers hold all tokens in four bits, read them all, and choose for the layers behind them. Sinks and
the recent window are read in any case.
"""

from __future__ import annotations

import math

import torch

from . import dispatch
from .code_reading import CodeReader
from .compressor.kv_compressor import KVCompressor
from .config import DeltaKVConfig
from .errors import InvalidOptionError
from .filter_layers import find_filter_layers
from .layout import Layout
from .stats import SelectionStats


class Choice:
    """The tokens that a layer has chosen last, for the layers behind it in the same step. All layers share one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As before the first step."""
        self._slots = self._step = None
        self._layer_idx = -1

    def put(self, slots: torch.Tensor, layer_idx: int, layout: Layout, columns: int) -> None:
        """Layer `layer_idx` has chosen `slots` in the step to `columns`, while tokens stood as in `layout`."""
        self._slots, self._layer_idx, self._step = slots, layer_idx, (layout, columns)

    def get(self, first: int, layer_idx: int, layout: Layout, columns: int) -> torch.Tensor | None:
        """What layer `first` or a later one has chosen for `layer_idx` in this step."""
        # a layout is made anew whenever tokens move; a layer that stands here itself begins another step
        is_now = self._step is not None and self._step[0] is layout and self._step[1] == columns
        return self._slots if is_now and first <= self._layer_idx < layer_idx else None


class Selector:
    """How a layer's decode steps choose tokens, and what they have chosen so far.

    Args:
        options: of the cache.
        keep: compressed tokens of a row to read: a number, or a share of them (a float up to 1).
        choice: shared by its layers.
        layer_idx: of the layer.
        first: of the layers that share a choice with this one, the first.

    Attributes:
        steps, tokens_read, tokens_held: steps that read a choice, and compressed tokens that they read and could have
            read.
        recalls: of each sampled step, the share of attention that went to what was read, mean over heads and rows.
    """

    def __init__(self, options: DeltaKVConfig, keep: int | float, choice: Choice, layer_idx: int = 0, first: int = 0):
        self.options, self.keep, self.choice, self.layer_idx, self.first = options, keep, choice, layer_idx, first
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self.choice.forget()
        self.steps = self.tokens_read = self.tokens_held = 0
        self.recalls: list[float] = []

    def budget(self, compressed: int) -> int:
        """How many of so many compressed tokens are read."""
        return self.keep if isinstance(self.keep, int) else math.ceil(self.keep * compressed)

    def count(self, num_steps: int, batch_size: int, compressed: int) -> None:
        """Counts steps that ran by themselves."""
        budget = self.budget(compressed)
        if budget < compressed:
            self.steps += num_steps
            self.tokens_read += num_steps * batch_size * budget
            self.tokens_held += num_steps * batch_size * compressed

    def is_worth_it(self, compressed: int, code_bytes: int) -> bool:
        """Whether so many compressed tokens of so many bytes are worth a choice: scoring short ones is reading them."""
        is_long = self.options.selection == "filter_layers" or code_bytes > self.options.index_bytes
        return is_long and self.budget(compressed) < compressed

    def choose(
        self,
        scores: torch.Tensor,
        raw: dispatch.Attended,
        layout: Layout,
        columns: int,
        backend: str | None = None,
    ) -> torch.Tensor:
        """Chooses by `scores` of all compressed tokens, for this layer and those behind it."""
        slots = dispatch.choose(scores, raw.log_total, self.budget(layout.compressed), backend)
        self.choice.put(slots, self.layer_idx, layout, columns)
        return slots

    def attend(
        self, codes: CodeReader, query: torch.Tensor, mask: torch.Tensor | None, raw: dispatch.Attended
    ) -> dispatch.Attended:
        """What a step sees in chosen compressed tokens and in `raw`.

        Args:
            query: `[batch, heads, queries, head_dim]`, of one column.
            mask: of the compressed tokens.
            raw: what was seen in sinks, window and pending tokens.
        """
        layout, columns = codes.layout, codes.state.columns
        slots = self.choice.get(self.first, self.layer_idx, layout, columns)
        if slots is None:
            if self.options.selection == "filter_layers":
                # the filter layer was read by another attention
                return codes.attend(query, mask, raw)
            scores = codes.score(query, mask, self.options.index_bytes)
            slots = self.choose(scores, raw, layout, columns, codes.backend)
        seen, every = codes.attend(query, mask, raw, slots), self.options.sample_every
        if every and self.steps % every == 0:
            self.recalls.append(attention_share(seen, codes.attend(query, mask, raw)))
        self.steps += 1
        self.tokens_read += slots.numel()
        self.tokens_held += layout.compressed * len(query)
        return seen


class SelectionPlan:
    """Who chooses in a cache.

    Args:
        options: of the cache.
        compressor: of the cache.
        model_config: the text config of the model.
        own_layers: numbers of the layers that are compressed.

    Attributes:
        filter_layers: their numbers; none unless `selection` is "filter_layers".

    Raises:
        InvalidOptionError: tokens of this compressor do not begin with what matters most, or no filter layers fit.
    """

    def __init__(self, options: DeltaKVConfig, compressor: KVCompressor | None, model_config, own_layers: list[int]):
        self.options, self.choice, self.own_layers = options, Choice(), own_layers
        self.filter_layers: tuple[int, ...] = ()
        if options.selection == "all":
            return
        if compressor is None or compressor.config["kind"] != "transform":
            got = "no compressor" if compressor is None else f"one of kind {compressor.config['kind']!r}"
            raise InvalidOptionError(
                f'`selection` must be "all" without a calibrated compressor, got {options.selection!r} and {got}. Make '
                "one with `KVCompressor.calibrate(model, ...)`."
            )
        if isinstance(options.keep, tuple) and len(options.keep) != len(own_layers):
            raise InvalidOptionError(
                f"`keep` must be one number, or one for each of the {len(own_layers)} compressed layers, got "
                f"{len(options.keep)}."
            )
        if options.selection == "filter_layers":
            self.filter_layers = find_filter_layers(options.filter_layers, compressor, model_config, own_layers)

    def selector(self, layer_idx: int) -> Selector | None:
        """Of a compressed layer; None if it reads everything for itself alone."""
        options, place = self.options, self.own_layers.index(layer_idx)
        if options.selection == "all":
            return None
        if not self.filter_layers:
            first = self.own_layers[place - place % options.layers_per_choice]
            return Selector(options, self._keep(place), self.choice, layer_idx, first)
        first = max(idx for idx in self.filter_layers if idx <= layer_idx)
        behind = self.own_layers[place + 1 : place + 2]
        if layer_idx == first and (not behind or behind[0] in self.filter_layers):
            # there is nobody to choose for
            return None
        return Selector(options, self._keep(self.own_layers.index(first)), self.choice, layer_idx, first)

    def _keep(self, place: int) -> int | float:
        keep = self.options.keep
        return keep[place] if isinstance(keep, tuple) else keep


def selection_stats(selectors: list[Selector | None]) -> SelectionStats | None:
    """Of all layers, or None if none chooses."""
    used = [selector for selector in selectors if selector is not None]
    if not used:
        return None
    recalls = [recall for selector in used for recall in selector.recalls]
    counts = (sum(getattr(selector, name) for selector in used) for name in ("steps", "tokens_read", "tokens_held"))
    return SelectionStats(*counts, sum(recalls) / len(recalls) if recalls else None)


def attention_share(some: dispatch.Attended, every: dispatch.Attended) -> float:
    """Of the attention of `every` that went to the tokens of `some`."""
    share = (some.log_total - every.log_total).exp()
    return share.nan_to_num(1.0).mean().item()
