"""Greedy answers from prefilled caches, one token at a time, with what is needed to compare two of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Answer:
    """One answer as it grows.

    Attributes:
        ids: generated token ids.
        logits: `[vocabulary]` each, the ones that each id was picked from.
        first_seconds: time of the forward over the question, which gives the first token.
        step_seconds: time of each later forward, of one token.
    """

    ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    first_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    @property
    def margin(self) -> float:
        """How near another answer was: the smallest lead of a picked token over the next best, nats."""
        best = torch.stack([logits.float().topk(2).values for logits in self.logits])
        return (best[:, 0] - best[:, 1]).min().item()


@torch.no_grad()
def prefill(model, cache, ids: torch.Tensor) -> float:
    """Reads `ids` `[1, n]` into an empty cache; returns seconds."""
    started = time.perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    # on a GPU the clock stops when the work is done, not when it is queued
    logits.argmax().item()
    return time.perf_counter() - started


@torch.no_grad()
def stream(model, cache, ids: list[int], max_new_tokens: int, is_end: Callable[[int], bool]) -> Iterator[Answer]:
    """Answers `ids` greedily on a copy of `cache`; gives the same growing `Answer` after every token.

    Args:
        is_end: whether a token ends the answer; it is not part of the answer's ids, but its logits are kept.
    """
    cache, answer, feed = copy.deepcopy(cache), Answer(), ids
    for number in range(max_new_tokens):
        started = time.perf_counter()
        inputs = torch.tensor([feed], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = logits.argmax().item()
        seconds = time.perf_counter() - started
        answer.logits.append(logits)
        if number:
            answer.step_seconds.append(seconds)
        else:
            answer.first_seconds = seconds
        if not is_end(token):
            answer.ids.append(token)
        yield answer
        if is_end(token):
            return
        feed = [token]


def stream_both(model, caches: list, ids: list[int], max_new_tokens: int, is_end) -> Iterator[list[Answer]]:
    """Streams the answers of several caches in turns; gives all of them after every turn."""
    streams = [stream(model, cache, ids, max_new_tokens, is_end) for cache in caches]
    answers, running = [Answer() for _ in caches], set(range(len(caches)))
    while running:
        for place in sorted(running):
            grown = next(streams[place], None)
            if grown is None:
                running.discard(place)
            else:
                answers[place] = grown
        yield answers


def same_inputs(first: Answer, second: Answer) -> int:
    """Positions whose logits answer the same input: up to and with the first one where the answers part."""
    count = min(len(first.logits), len(second.logits))
    for place, (a, b) in enumerate(zip(first.ids, second.ids, strict=False)):
        if a != b:
            return min(count, place + 1)
    return count


@torch.no_grad()
def logits_after(model, cache, ids: list[int]) -> torch.Tensor:
    """Logits `[n, vocabulary]` of `ids` fed at once on top of a copy of `cache`."""
    inputs = torch.tensor([ids], device=model.device)
    return model(input_ids=inputs, past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
