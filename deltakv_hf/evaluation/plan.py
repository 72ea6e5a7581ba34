"""What `deltakv eval all` measures, of which caches: in minutes on two CPU cores, or all of it."""

from __future__ import annotations

from .measurements import FidelityMeasurement, GenerationMeasurement, Measurement, TaskMeasurement
from .peers import PEERS
from .tasks import TASKS

BUNDLED = "smollm2-135m-instruct-"
# drop a half of the tokens, or as many as leave an eighth of the bytes
PRESSES = [f"{press}-{share}" for press in ("snapkv", "chunkkv", "expected_attention") for share in (0.5, 0.875)]
PRESSES += [f"{press}-0.5" for press in ("kvzip", "keydiff", "streaming_llm", "think")]


def quick_plan() -> list[Measurement]:
    """Short contexts, few of them: shows that all of it works, and gross differences."""
    return [
        FidelityMeasurement("fidelity", context=512, predict=128, windows=2),
        FidelityMeasurement("long-generation", context=256, predict=256, windows=1, predict_chunk=32),
        *[TaskMeasurement(f"{task}-512", task, context=512, contexts=2) for task in ("niah4", "copy")],
        GenerationMeasurement("generation", context=256, new_tokens=32, prompts=2),
    ]


def full_plan() -> list[Measurement]:
    """What figures are published from."""
    return [
        FidelityMeasurement("fidelity", context=3072, predict=1024, windows=2),
        FidelityMeasurement("long-generation", context=1024, predict=2000, windows=1, predict_chunk=32),
        *[
            TaskMeasurement(f"{task}-{length}", task, context=length, contexts=10)
            for task in TASKS
            for length in (1024, 4096)
        ],
        GenerationMeasurement("generation", context=1024, new_tokens=500, prompts=9),
        GenerationMeasurement("sampling", context=1024, new_tokens=500, prompts=9, seed=0),
    ]


def default_candidates(full: bool, demo: bool) -> tuple[list[str], list[str], list[str]]:
    """Options (JSON), compressors and peers to measure where none are named.

    Args:
        full: of the full plan.
        demo: whether the model is the one that compressors come with.
    """
    compressors = [f"{BUNDLED}{ratio}x" for ratio in ((15, 10, 5) if full else (15, 10))] if demo else []
    joint = [f'{{"cache": "joint", "residual": "{BUNDLED}10x"}}'] if full and demo else []
    return ["{}", *joint], compressors, [*PEERS, *PRESSES] if full else ["kivi4", "kivi2"]
