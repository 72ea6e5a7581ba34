"""What a suite measures of every cache: fidelity on text, tasks, free generation. One class each, all used alike."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..hf_compat import Cache
from .bytes16 import Bytes16
from .candidates import FULL_CACHE, REFERENCE, Candidate
from .fidelity import measure_fidelity
from .generation import judge_generation, write
from .prefill import Shares, prefill
from .presses import PressModel, measure_press_fidelity, run_press_tasks
from .runner import make_contexts
from .scores import ItemScore, TaskScores, score_item
from .tasks import pick_tasks
from .texts import BUNDLED_TEXT, read_text
from .windows import text_windows


class Bench:
    """What measurements run on, and what the full cache did, which all caches are compared with.

    Args:
        model: a causal language model, in float32 for figures that tell good caches apart.
        tokenizer: its tokenizer.
        texts: text files; none takes the bundled text.
        source: the model's folder or id, for presses, which another process measures.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[Path] | None = None,
        source: str | None = None,
    ):
        self.model, self.tokenizer, self.texts, self.source = model, tokenizer, texts or [BUNDLED_TEXT], source
        self._full = {}

    @cached_property
    def bytes16(self) -> Bytes16:
        """Shares as a 16-bit model holds them, of the beginning of the bundled text."""
        ids = self.tokenizer(read_text(BUNDLED_TEXT), add_special_tokens=False).input_ids
        return Bytes16(self.model, torch.tensor(ids), self.source)

    @property
    def press_model(self) -> PressModel:
        """The model for the process that measures presses."""
        return PressModel.like(self.model, self.source)

    def full(self, measurement, make):
        """What the full cache did in `measurement`: made once."""
        if measurement not in self._full:
            # of one measurement at a time: the caches take turns in it
            self._full = {measurement: make()}
        return self._full[measurement]

    def checksums(self) -> dict[str, str]:
        """Of every text, by its name."""
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in self.texts}


@dataclass(frozen=True)
class FidelityMeasurement:
    """Predictions on windows of every text behind a context; see `measure_fidelity`."""

    name: str
    context: int
    predict: int
    windows: int
    predict_chunk: int = 0
    kind = "fidelity"
    with_full_cache = False

    @property
    def with_presses(self) -> bool:
        """A press compresses once, behind a context: not what comes in chunks."""
        return not self.predict_chunk

    @property
    def held_tokens(self) -> int:
        """Tokens of which bytes are counted: in a long generation those written on the way too."""
        return self.context + (self.predict if self.predict_chunk else 0)

    def run(self, bench: Bench, candidate: Candidate) -> dict:
        """Figures of all windows, each with the name of its text."""
        size = self.context + self.predict
        cut = [(path, text_windows(bench.tokenizer, path, size, self.windows)) for path in bench.texts]
        sources = [{"text": path.stem, "window": n} for path, windows in cut for n in range(len(windows))]
        windows = [window for _, windows in cut for window in windows]
        if candidate.press:
            made = {candidate.name: candidate.press}
            [fidelity] = measure_press_fidelity(bench.press_model, windows, made, context=self.context).values()
        else:
            made = {candidate.name: lambda: candidate.make(bench.model)}
            how = {"context": self.context, "predict_chunk": self.predict_chunk}
            [fidelity] = measure_fidelity(bench.model, windows, made, **how).values()
        rows = [source | asdict(window) for source, window in zip(sources, fidelity.windows, strict=True)]
        return fidelity.summary() | {"windows": len(rows), "per_window": rows}


@dataclass(frozen=True)
class TaskMeasurement:
    """A task at one length; see `run_tasks`."""

    name: str
    task: str
    context: int
    contexts: int
    kind = "task"
    with_full_cache = with_presses = True

    @property
    def held_tokens(self) -> int:
        """Tokens of which bytes are counted: the context."""
        return self.context

    def run(self, bench: Bench, candidate: Candidate) -> dict:
        """Scores of all items beside the full cache's."""
        seeds, model = list(range(self.contexts)), bench.model
        made = make_contexts(model, bench.tokenizer, pick_tasks([self.task]), [self.context], seeds)
        [contexts] = made.values()
        if candidate.press:
            named = {candidate.label: candidate.press}
            [scored] = run_press_tasks(bench.press_model, made, seeds, named)
            return scored.summary()

        def scores(make) -> tuple[list[list[ItemScore]], list[Shares]]:
            items, held = [], []
            for context in contexts:
                cache = make()
                held.append(prefill(model, torch.tensor(context.ids), cache))
                items.append([score_item(model, cache, item) for item in context.items])
            return items, held

        full, held = bench.full(self, lambda: scores(lambda: FULL_CACHE.make(model)))
        own = full
        if candidate.role != REFERENCE:
            own, held = scores(lambda: candidate.make(model))
        return TaskScores(self.task, self.context, candidate.label, seeds, own, full, held).summary()


@dataclass(frozen=True)
class GenerationMeasurement:
    """Free generation behind windows, of every text in turn; see `evaluation/generation.py`."""

    name: str
    context: int
    new_tokens: int
    prompts: int
    seed: int | None = None
    kind = "generation"
    with_full_cache, with_presses = True, False

    @property
    def held_tokens(self) -> int:
        """Tokens of which bytes are counted: those written too."""
        return self.context + self.new_tokens

    def run(self, bench: Bench, candidate: Candidate) -> dict:
        """What it wrote behind all prompts, judged by the full cache."""
        each = -(-self.prompts // len(bench.texts))
        windows = [text_windows(bench.tokenizer, path, self.context, each) for path in bench.texts]
        prompts = torch.stack([window for number in range(each) for window in (w[number] for w in windows)])
        prompts, model = prompts[: self.prompts], bench.model

        def written(cache: Cache) -> torch.Tensor:
            return write(model, prompts, cache, self.new_tokens, self.seed)

        full = bench.full(self, lambda: written(FULL_CACHE.make(model)))
        own = full if candidate.role == REFERENCE else written(candidate.make(model))
        return judge_generation(model, prompts, own, full).summary()


Measurement = FidelityMeasurement | TaskMeasurement | GenerationMeasurement


def measure(measurement: Measurement, candidate: Candidate, bench: Bench) -> dict:
    """Measures one cache in one way: the one place that runs a candidate.

    Returns:
        `figures` as the measurement's class gives them, and the shares of a dense 16-bit cache.
    """
    figures = measurement.run(bench, candidate)
    return {"figures": figures} | bench.bytes16.shares(candidate, measurement.held_tokens)


def settings(measurement: Measurement, bench: Bench) -> dict:
    """What a row must have been measured with to stand beside others: all settings, the model, the texts."""
    model = {"model": bench.model.config.name_or_path, "dtype": str(bench.model.dtype).removeprefix("torch.")}
    return asdict(measurement) | {"kind": measurement.kind} | model | {"texts": bench.checksums()}
