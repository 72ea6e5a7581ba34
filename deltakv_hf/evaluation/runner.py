"""Runs tasks: every context is read once by each cache, and its questions are asked on top, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidOptionError
from ..support import max_positions
from .haystack import Sources, read_sources
from .items import TaskContext
from .prefill import check_cache, check_chunk, prefill
from .scores import TaskScores, score_item
from .tasks import Task

FULL = "full cache"


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    seeds: Iterable[int],
    make_caches: dict[str, Callable[[], Cache]],
    progress: Callable[[Iterable], Iterator] = iter,
    *,
    sources: Sources | None = None,
    prefill_chunk: int = 0,
) -> list[TaskScores]:
    """Scores caches in tasks, beside the full cache, which is always run.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: as `pick_tasks` gives them.
        lengths: most tokens of a context.
        seeds: one context of each task and length for each.
        make_caches: a function that makes an empty cache, by name.
        progress: wraps the iteration over contexts (for a progress bar).
        sources: texts of the contexts; None takes those that come with the package.
        prefill_chunk: tokens of each call that fills the caches measured, 0 for one call; the full cache gets one.

    Returns:
        scores by task, then length, then cache, the full cache (`FULL`) first.

    Raises:
        InvalidOptionError: a length is too small for a task or too large for the model, or an argument is empty.
    """
    check_chunk("prefill_chunk", prefill_chunk)
    seeds = list(seeds)
    if FULL in make_caches:
        raise InvalidOptionError(f"`make_caches` must not hold {FULL!r}, which is always run.")
    makers = {FULL: lambda: DynamicCache(config=model.config)} | make_caches
    # all are made before the first is read, so that an error comes at once
    cells = make_contexts(model, tokenizer, tasks, lengths, seeds, sources)
    scores = {(cell, name): ([], []) for cell in cells for name in makers}
    for cell, context in progress([(cell, context) for cell, made in cells.items() for context in made]):
        for name, make_cache in makers.items():
            cache = make_cache()
            check_cache(name, cache)
            shares = prefill(model, torch.tensor(context.ids), cache, 0 if name == FULL else prefill_chunk)
            items, held = scores[cell, name]
            items.append([score_item(model, cache, item) for item in context.items])
            held.append(shares)
    return [
        TaskScores(task, length, name, seeds, items, scores[(task, length), FULL][0], held)
        for ((task, length), name), (items, held) in scores.items()
    ]


def make_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    seeds: Sequence[int],
    sources: Sources | None = None,
) -> dict[tuple[str, int], list[TaskContext]]:
    """The contexts that `run_tasks` reads.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: as `pick_tasks` gives them.
        lengths: most tokens of a context.
        seeds: one context of each task and length for each.
        sources: texts of the contexts; None takes those that come with the package.

    Returns:
        contexts by task's name and length.

    Raises:
        InvalidOptionError: a length is too small for a task or too large for the model, or an argument is empty.
    """
    for name, given in (("tasks", tasks), ("lengths", lengths), ("seeds", seeds)):
        if not given:
            raise InvalidOptionError(f"`{name}` must not be empty.")
    sources = sources or read_sources()
    return {
        (task.name, length): [_context(model, tokenizer, task, length, seed, sources) for seed in seeds]
        for task in tasks
        for length in lengths
    }


def _context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    num_tokens: int,
    seed: int,
    sources: Sources,
) -> TaskContext:
    context = task.context(tokenizer, num_tokens, seed, sources)
    longest = len(context.ids) + max(len(item.question) + len(item.answer) for item in context.items)
    limit = max_positions(model)
    if limit is not None and longest > limit:
        raise InvalidOptionError(
            f"`lengths` must leave room for questions in the {limit} positions of the model, got {num_tokens}: a "
            f"context of {task.name} with its longest question has {longest} tokens. Take {longest - limit} less."
        )
    return context
