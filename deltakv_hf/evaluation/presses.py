"""Presses of kvpress as peers: picked by name, measured by a process of their own as ours are in this one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ..errors import InvalidOptionError
from .fidelity import Fidelity, WindowFidelity, check_window
from .items import TaskContext
from .peers import PRESSES
from .prefill import Shares
from .press_environment import find_environment
from .press_process import answers
from .scores import ItemScore, TaskScores


@dataclass(frozen=True)
class Press:
    """A press of kvpress.

    Attributes:
        about: what it is, for tables.
        kind: one of `PRESSES`.
        ratio: share of tokens that it drops (ThinK: of the channels of keys).
    """

    about: str
    kind: str
    ratio: float


@dataclass(frozen=True)
class PressModel:
    """A model as another process loads it.

    Attributes:
        source: its folder, or its id on the Hub.
        dtype, device: names.
        threads: of the CPU.
    """

    source: str
    dtype: str
    device: str
    threads: int

    @classmethod
    def like(cls, model: PreTrainedModel, source: str) -> PressModel:
        """That of `source`, run as `model` is run here.

        Args:
            model: in this process.
            source: its folder, or its id on the Hub.

        Returns:
            what another process is told of it.
        """
        return cls(source, str(model.dtype).removeprefix("torch."), str(model.device), torch.get_num_threads())


def pick_press(name: str) -> Press | None:
    """The press of a name.

    Args:
        name: like `snapkv-0.5`: what it is called, and the share that it drops.

    Returns:
        the press; None if that is no press' name.

    Raises:
        InvalidOptionError: the name has no share to drop, or one out of range.
        DeltaKVError: the environment that it runs in has not been made.
    """
    kind, _, ratio = name.partition("-")
    if kind not in PRESSES:
        return None
    if not re.fullmatch(r"0?\.\d+|0", ratio):
        raise InvalidOptionError(
            f"`peer` must end in the share that the press drops, from 0 to below 1, like {kind}-0.5, got {name!r}."
        )
    find_environment()
    return Press(PRESSES[kind].format(f"{float(ratio):g}"), kind, float(ratio))


def measure_press_fidelity(
    model: PressModel,
    windows: Iterable[torch.Tensor],
    presses: Mapping[str, Press],
    *,
    context: int = 3072,
    progress: Callable[[Iterable], Iterator] = iter,
) -> dict[str, Fidelity]:
    """`measure_fidelity` for presses: beside the full cache of the same process, whose transformers is another.

    Args:
        model: as the process loads it.
        windows: token ids `[n]` int64 each, `n > context + 1`.
        presses: by name.
        context: tokens stored before predicting, read in one call; a press leaves alone what comes behind them.
        progress: wraps the iteration over windows (for a progress bar).

    Returns:
        a `Fidelity` by name.
    """
    windows = list(windows)
    for ids in windows:
        check_window(ids, context)
    asked = [{"ids": ids.tolist(), "context": context} for ids in windows]
    results = {name: [] for name in presses}
    with closing(answers(find_environment(), _job(model, presses) | {"windows": asked})) as found:
        for _, by_press in zip(progress(windows), found, strict=True):
            for name, figures in by_press.items():
                results[name].append(WindowFidelity(**figures, compressed_share=0.0))
    return {name: Fidelity(windows) for name, windows in results.items()}


def run_press_tasks(
    model: PressModel,
    cells: Mapping[tuple[str, int], Sequence[TaskContext]],
    seeds: Sequence[int],
    presses: Mapping[str, Press],
    progress: Callable[[Iterable], Iterator] = iter,
) -> list[TaskScores]:
    """`run_tasks` for presses: beside the full cache of the same process, which is in no result of its own.

    Args:
        model: as the process loads it.
        cells: contexts by task's name and length, as `make_contexts` makes them: one for each of `seeds`.
        seeds: of the contexts.
        presses: by name.
        progress: wraps the iteration over contexts (for a progress bar).

    Returns:
        scores by cell, then press.
    """
    contexts = [(cell, context) for cell, made in cells.items() for context in made]
    asked = [asdict(context) for _, context in contexts]
    full = {cell: [] for cell in cells}
    scores = {(cell, name): ([], []) for cell in cells for name in presses}
    with closing(answers(find_environment(), _job(model, presses) | {"contexts": asked})) as found:
        for (cell, _), answer in zip(progress(contexts), found, strict=True):
            full[cell].append([ItemScore(**item) for item in answer["full"]])
            for name, measured in answer["presses"].items():
                items, held = scores[cell, name]
                items.append([ItemScore(**item) for item in measured["items"]])
                held.append(Shares(measured["stored_share"], 0.0))
    return [
        TaskScores(task, length, name, list(seeds), items, full[task, length], held)
        for ((task, length), name), (items, held) in scores.items()
    ]


def _job(model: PressModel, presses: Mapping[str, Press]) -> dict:
    return {
        "model": model.source,
        "dtype": model.dtype,
        "device": model.device,
        "threads": model.threads,
        "presses": {name: (press.kind, press.ratio) for name, press in presses.items()},
    }
