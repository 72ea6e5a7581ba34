"""Fidelity of a cache to the full cache: what the stored context changes in the predictions after it.

Protocol: a window's first `context` tokens are prefilled, then the rest is fed at once (teacher forcing) on top of the
stored context, or one by one where a `selection` chooses in steps. Those logits are compared with those after a
one-shot prefill into a `DynamicCache`. With `prefill_chunk` the context comes in several calls, so that all but the
first attend over what is already stored; with `predict_chunk` so do the tokens behind it, which are compressed as they
leave the window: what a long generation does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import InvalidOptionError
from .prefill import Shares, check_cache, check_chunk, feed_behind, prefill

LOGIT_TILE = 128
# tokens in the first bin of distances; every next one is so many times as wide
FIRST_BIN, BIN_GROWTH = 16, 4


@dataclass(frozen=True)
class DistanceFidelity:
    """The same figures of the tokens that were predicted `first` to `last` tokens behind a window's context."""

    first: int
    last: int
    kl: float
    top1: float
    nll: float
    full_nll: float


@dataclass(frozen=True)
class WindowFidelity:
    """One window.

    Attributes:
        kl: mean KL(full || cache) over the predicted tokens, nats.
        top1: share of predicted tokens whose most likely token is the full cache's.
        nll, full_nll: mean negative log likelihood of the true tokens with the cache and with the full cache, nats.
        stored_share: bytes held by the cache over those of the full cache, whole cache, after the context.
        compressed_share: the same of the compressed tokens alone (0 without any).
        compressor_bytes: of the compressor on the model's devices, which caches share; in neither share.
        break_even_tokens: compressed tokens that save as much.
        by_distance: the same figures by how far behind the context: 1 to 16 tokens, 17 to 64, 65 to 256, ...
    """

    kl: float
    top1: float
    nll: float
    full_nll: float
    stored_share: float
    compressed_share: float
    compressor_bytes: int = 0
    break_even_tokens: int = 0
    by_distance: tuple[DistanceFidelity, ...] = ()


# what there is a mean of
FIGURES = [field.name for field in fields(WindowFidelity) if field.name != "by_distance"]


@dataclass(frozen=True)
class Fidelity:
    """All windows of a measurement; `mean` and `standard_error` give each of a window's figures.

    Attributes:
        windows: figures of each window.
    """

    windows: list[WindowFidelity]

    def mean(self, name: str) -> float:
        """Averages over the windows.

        Args:
            name: of a field of `WindowFidelity`.

        Returns:
            The mean, in the unit of the field.
        """
        return sum(getattr(w, name) for w in self.windows) / len(self.windows)

    def standard_error(self, name: str) -> float:
        """How sure a mean is.

        Args:
            name: of a field of `WindowFidelity`.

        Returns:
            Standard error of its mean over the windows (0 for one window).
        """
        n, mean = len(self.windows), self.mean(name)
        if n == 1:
            return 0.0
        return math.sqrt(sum((getattr(w, name) - mean) ** 2 for w in self.windows) / (n - 1) / n)

    @property
    def nll_change(self) -> float:
        """Relative change of the mean negative log likelihood."""
        return self.mean("nll") / self.mean("full_nll") - 1

    def summary(self) -> dict[str, float]:
        """All figures, for JSON.

        Returns:
            Means by the name of the field, standard errors as `{name}_se`, and `nll_change`.
        """
        means = {name: self.mean(name) for name in FIGURES}
        return means | {f"{name}_se": self.standard_error(name) for name in FIGURES} | {"nll_change": self.nll_change}

    def __str__(self) -> str:
        lines = [f"{name:<14}{self.mean(name):10.5f} ± {self.standard_error(name):.5f}" for name in FIGURES]
        return "\n".join([*lines, f"{'ΔNLL':<14}{self.nll_change:+10.3%}"])


@torch.no_grad()
def predict_after(
    model: PreTrainedModel,
    ids: torch.Tensor,
    context: int,
    cache: Cache,
    prefill_chunk: int = 0,
    predict_chunk: int = 0,
) -> tuple[torch.Tensor, Shares]:
    """Reads `ids` `[n]` in the calls of the protocol: context and rest in calls of so many tokens each, or in one (0).

    Returns:
        logits `[n - context, vocabulary]` behind the context, and the shares of dense bytes held before them.
    """
    shares = prefill(model, ids[:context], cache, prefill_chunk)
    return feed_behind(model, ids[context:], cache, len(ids) - context, predict_chunk), shares


def token_figures(logits: torch.Tensor, full_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each token, `[4, n]` float64 on the CPU: KL(full || other), whether the most likely token is the same, and the
    negative log likelihood of `targets` `[n]` with each of the logits `[n, vocabulary]`.
    """
    tiles = []
    for start in range(0, len(targets), LOGIT_TILE):
        tile = slice(start, start + LOGIT_TILE)
        p, q = (torch.log_softmax(x[tile].float(), dim=-1) for x in (full_logits, logits))
        true = targets[tile, None]
        same = (p.argmax(-1) == q.argmax(-1)).float()
        figures = (p.exp() * (p - q)).sum(-1), same, -q.gather(1, true)[:, 0], -p.gather(1, true)[:, 0]
        tiles.append(torch.stack(figures).cpu().double())
    return torch.cat(tiles, dim=1)


def compare(
    logits: torch.Tensor, full_logits: torch.Tensor, targets: torch.Tensor
) -> tuple[float, float, float, float]:
    """Mean KL(full || other), top-1 agreement, and NLL of `targets` with each, of logits `[n, vocabulary]`."""
    return tuple(token_figures(logits, full_logits, targets).mean(1).tolist())


def distance_bins(count: int) -> list[tuple[int, int]]:
    """First and last distance of each bin, from 1 up to `count`."""
    bins, first, last = [], 1, FIRST_BIN
    while first <= count:
        bins.append((first, min(last, count)))
        first, last = last + 1, last * BIN_GROWTH
    return bins


def _by_distance(figures: torch.Tensor) -> tuple[DistanceFidelity, ...]:
    """Means of `figures` `[4, n]` in each bin."""
    return tuple(
        DistanceFidelity(first, last, *figures[:, first - 1 : last].mean(1).tolist())
        for first, last in distance_bins(figures.shape[1])
    )


def check_window(ids: torch.Tensor, context: int) -> None:
    """Raises `InvalidOptionError` unless `ids` go on behind the context."""
    if ids.ndim != 1 or len(ids) < context + 2:
        raise InvalidOptionError(f"`windows` must hold 1-D ids of at least {context + 2} tokens, got {ids.shape}.")


def measure_fidelity(
    model: PreTrainedModel,
    windows: Iterable[torch.Tensor],
    make_caches: dict[str, Callable[[], Cache]],
    *,
    context: int = 3072,
    prefill_chunk: int = 0,
    predict_chunk: int = 0,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, Fidelity]:
    """Runs the protocol for several caches; the full cache's logits are computed once per window.

    Args:
        model: a causal language model.
        windows: token ids `[n]` int64 each, `n > context + 1`.
        make_caches: a function that makes an empty cache, by name.
        context: tokens stored before predicting.
        prefill_chunk: tokens of each call that fills the caches measured, 0 for one call; the full cache gets one.
        predict_chunk: the same of the tokens predicted.
        progress: wraps the iteration over windows (for a progress bar).

    Returns:
        a `Fidelity` by name.

    Raises:
        InvalidOptionError: a window is too short, a chunk below 0, or a function makes no cache.

    Examples:
        >>> from deltakv_hf.evaluation import measure_fidelity
        >>> caches = {"4 bits": lambda: DeltaKVCache(model), "8 bits": lambda: DeltaKVCache(model, nbits=8)}
        >>> fidelity = measure_fidelity(model, inputs["input_ids"], caches, context=400)
        >>> fidelity["8 bits"].mean("kl") < fidelity["4 bits"].mean("kl")
        True
    """
    check_chunk("prefill_chunk", prefill_chunk)
    check_chunk("predict_chunk", predict_chunk)
    results = {name: [] for name in make_caches}
    for ids in progress(list(windows)):
        check_window(ids, context)
        targets = ids[context + 1 :].to(model.device)
        full_logits, _ = predict_after(model, ids, context, DynamicCache(config=model.config))
        for name, make_cache in make_caches.items():
            cache = make_cache()
            check_cache(name, cache)
            logits, shares = predict_after(model, ids, context, cache, prefill_chunk, predict_chunk)
            figures = token_figures(logits[:-1], full_logits[:-1], targets)
            results[name].append(WindowFidelity(*figures.mean(1).tolist(), *shares, by_distance=_by_distance(figures)))
    return {name: Fidelity(windows) for name, windows in results.items()}
