"""Speed of `generate` with one cache after the other: what a token takes, where the time goes, what fits.

A row is one kind of cache at one context and batch. Caches of a long context are filled with random numbers behind a
short prompt: the time of a step depends on how many tokens are held, not on which. Where `prefill` is asked for, the
prompt is read as it is, and the time to the first token is measured.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import DeltaKVCache, KVCompressor
from .pretending import pretend
from .steps import synchronize

# ways to read, by name of a kind
SELECTIONS = {
    "deltakv": {},
    "deltakv coarse": {"selection": "coarse_to_fine", "layers_per_choice": 4},
    "deltakv filter": {"selection": "filter_layers"},
}
KINDS = ("dynamic", "static", "quantized", *SELECTIONS)
# steps that are not counted: what compiles, and what runs for the first time
WARM_UP, NUM_STEPS, NUM_PROFILED = 8, 40, 4
ATTENTION = ("attend", "score", "mix", "decode", "project", "finish", "lead", "key_kernel", "sum_kernel")
ATTENTION += ("tally", "write_kernel", "int4", "merge", "fmha", "flash", "softmax", "index_put", "gather")
WEIGHTS = ("gemm", "gemv", "cutlass", "nvjet", "_mm", "dot_kernel")


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        kind: of cache, one of `KINDS`.
        context: tokens held by each row of the batch.
        batch: rows.
        prefill: whether the prompt is really read.
        backend: that compiles, instead of inductor.
        ragged: whether rows are of different length, left padded: the first of a share of the context, the last whole.
        released: how many rows, the longest, have ended and been released.
    """

    kind: str
    context: int
    batch: int = 1
    prefill: bool = False
    backend: str | None = None
    ragged: bool = False
    released: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row of the batch."""
        if not self.ragged:
            return [self.context] * self.batch
        return [self.context * (row + 1) // self.batch for row in range(self.batch)]


class _Clock(StoppingCriteria):
    """Notes when each token is there."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def ms(self) -> list[float]:
        """Of each token but the first."""
        return [1000 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]


@torch.no_grad()
def measure_row(
    model: PreTrainedModel,
    row: Row,
    compressor: KVCompressor | None,
    options: dict | None = None,
    text: torch.Tensor | None = None,
) -> dict:
    """Measures one row.

    Args:
        model: with the attention that it is to be measured with; our kinds set `deltakv`, the host's `sdpa`.
        compressor: of our kinds.
        options: of `DeltaKVCache`, over those of the kind.
        text: `[tokens]` int64 to fill prompts from, a row behind the other and from the beginning again; None: random.

    Returns:
        `token_ms` (wall time of a token in `generate`) and `step_ms` (of its forward alone), medians; `tokens_s`;
        `parts_ms` of a step by what the device did (attention, weights, other, idle); `cache_bytes`, `peak_bytes`;
        `graphs` compiled and `launches` of recorded graphs a step; with `prefill`, `first_token_s`. Or `error`.
    """
    device, total = model.device, row.context + WARM_UP + NUM_STEPS + 64
    ours = row.kind in SELECTIONS
    model.set_attn_implementation("deltakv" if ours else "sdpa")
    _fresh(model, device)
    model.generation_config.compile_config = _compile_config(row.backend, device)
    try:
        cache = _make(model, row, compressor, options or {}, total)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        result = _run(model, row, cache, _prompt(model, row, text))
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {str(error)[:120]}"}
    except Exception as error:  # a row that fails must not end the others
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    if device.type == "cuda":
        result |= {"allocated_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated(device)}
    if ours:
        report = cache.memory_report()
        result |= {"cache_bytes": report.stored_bytes, "dense_bytes": report.dense_bytes}
    return result


def _compile_config(backend: str | None, device: torch.device) -> CompileConfig | None:
    """None: what `generate` takes by itself."""
    if backend is None:
        return None
    config = CompileConfig(backend=backend, mode=None)
    # the host compiles on accelerators only, unless told
    config._compile_all_devices = device.type == "cpu"
    return config


def _fresh(model: PreTrainedModel, device: torch.device) -> None:
    torch._dynamo.reset()
    vars(model).pop("_compiled_call", None)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _make(model: PreTrainedModel, row: Row, compressor, options: dict, total: int) -> Cache:
    """An empty cache, or a full one where nothing is to be read."""
    config, shape = model.config, (row.batch, model.config.num_key_value_heads, row.context, model.config.head_dim)
    if row.kind == "quantized":
        if not (find_spec("optimum") or find_spec("hqq")):
            raise ModuleNotFoundError("neither optimum-quanto nor hqq is installed")
        from transformers import QuantizedCache

        return QuantizedCache("quanto" if find_spec("optimum") else "hqq", config)
    if row.kind == "dynamic":
        cache = DynamicCache(config=config)
        for layer_idx in range(0 if row.prefill else config.num_hidden_layers):
            states = torch.randn(shape, dtype=model.dtype, device=model.device)
            cache.update(states, states.clone(), layer_idx)
        return cache
    if row.kind == "static":
        cache = StaticCache(config=config, max_cache_len=total)
        if not row.prefill:
            cache.early_initialization(row.batch, shape[1], shape[3], model.dtype, model.device)
            for layer in cache.layers:
                layer.cumulative_length.fill_(row.context)
        return cache
    options = SELECTIONS[row.kind] | options
    if row.ragged and not row.prefill:
        # what a padded prompt would ask for
        options = {"max_pool_tokens": sum(row.lengths) + row.batch * (total - row.context)} | options
    cache = DeltaKVCache(model, compressor=compressor, max_cache_len=total, **options)
    if not row.prefill:
        pretend(cache, model, row.lengths)
        cache.release_rows(range(row.batch - row.released, row.batch))
    return cache


def _prompt(model: PreTrainedModel, row: Row, text: torch.Tensor | None) -> torch.Tensor:
    """`[batch, context + 1]`"""
    shape = row.batch, row.context + 1
    if text is None:
        ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    else:
        ids = text.repeat(-(-shape[0] * shape[1] // len(text)))[: shape[0] * shape[1]].view(shape)
    return ids.to(model.device)


def _run(model: PreTrainedModel, row: Row, cache: Cache, ids: torch.Tensor) -> dict:
    from torch._dynamo.utils import counters

    counters.clear()
    result, mask = {}, torch.ones_like(ids)
    for place, length in enumerate(row.lengths):
        mask[place, : row.context - length] = 0
    if row.prefill:
        synchronize(model.device)
        start = time.perf_counter()
        read = {"attention_mask": mask[:, :-1]} if row.ragged else {}
        model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1, **read)
        synchronize(model.device)
        result["first_token_s"] = time.perf_counter() - start

    def generate(ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, list[float]]:
        clock = _Clock()
        ids = model.generate(
            ids,
            attention_mask=torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1),
            past_key_values=cache,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return ids, clock.ms()

    start = time.perf_counter()
    ids, times = generate(ids, WARM_UP)
    result["warm_up_s"] = time.perf_counter() - start
    ids, times = generate(ids, NUM_STEPS)
    median = statistics.median(times[4:])
    result |= {"token_ms": median, "tokens_s": 1000 * row.batch / median}
    with _timed(model) as steps:
        ids, _ = generate(ids, NUM_STEPS // 2)
    # the first is the eager one that `generate` makes of what the cache has not seen
    result |= {"step_ms": statistics.median(steps[4:]), "graphs": counters["stats"]["unique_graphs"]}

    def go_on(num_tokens: int) -> None:
        nonlocal ids
        ids, _ = generate(ids, num_tokens)

    if model.device.type == "cuda":
        result |= _profiled(go_on, result["step_ms"])
    return result


class _timed:
    """While it lasts, the time of each forward of `model`, compiled or not, in milliseconds."""

    def __init__(self, model: PreTrainedModel):
        self._model, self._times = model, []
        self._name = "_compiled_call" if hasattr(model, "_compiled_call") else "forward"

    def __enter__(self) -> list[float]:
        call = getattr(self._model, self._name)

        def timed(*args, **kwargs):
            synchronize(self._model.device)
            start = time.perf_counter()
            made = call(*args, **kwargs)
            synchronize(self._model.device)
            self._times.append(1000 * (time.perf_counter() - start))
            return made

        self._call = call
        vars(self._model)[self._name] = timed
        return self._times

    def __exit__(self, *error) -> None:
        if self._name == "forward":
            del vars(self._model)["forward"]
        else:
            vars(self._model)[self._name] = self._call


def _profiled(generate: Callable[[int], object], step_ms: float) -> dict:
    """Milliseconds of a step by what the device does, and recorded graphs launched in it."""
    # the first token is an eager step's
    first, launches_of_first = _device_times(lambda: generate(1))
    times, launches = _device_times(lambda: generate(1 + NUM_PROFILED))
    parts = {kind: (times[kind] - first[kind]) / NUM_PROFILED for kind in times}
    parts["idle"] = max(0.0, step_ms - sum(parts.values()))
    return {"parts_ms": parts, "launches": (launches - launches_of_first) / NUM_PROFILED}


def _device_times(run: Callable[[], object]) -> tuple[dict[str, float], int]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    times, launches = {"attention": 0.0, "weights": 0.0, "other": 0.0}, 0
    for event in profiler.key_averages():
        name = event.key.lower()
        launches += event.count if "cudagraphlaunch" in name else 0
        if event.device_type == torch.autograd.DeviceType.CUDA and "memcpy" not in name:
            kind = "attention" if any(part in name for part in ATTENTION) else "other"
            kind = "weights" if any(part in name for part in WEIGHTS) else kind
            times[kind] += event.self_device_time_total / 1000
    return times, launches
