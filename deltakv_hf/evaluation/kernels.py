"""Times of the ops on one layer of a known shape, beside what the device could do at most.

Random numbers in the layer shape of Llama-3.1-8B (8 key-value heads of 128 for 32 attention heads), coded at a tenth of
a 16-bit cache: 409 bytes a token, 1,602 of 2,048 components. No model is needed, and the time of an op does not depend
on what it reads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from .. import dispatch
from ..compressor.codebook import Codebook
from ..compressor.vectors import token_vectors

HEADS, QUERIES, HEAD_DIM = 8, 4, 128
# groups of one byte, and components of each
RUNS = ((40, 1), (90, 2), (110, 3), (60, 4), (40, 5), (26, 6), (20, 8), (10, 10), (8, 12), (5, 20))
REFERENCE_STRIDE, SELECTED, INDEX_BYTES, REPEATS = 10, 2048, 32, 20
RAW = (4, 128, 16)
# written between two measurements, so that nothing is left in a cache of the device
FLUSHED_BYTES = {"cuda": 2**28, "cpu": 2**24}


@dataclass(frozen=True)
class Timing:
    """One op on one shape.

    Attributes:
        op, what: its name, and what it was given.
        ms: median time.
        bytes: read and written at least.
        flops: of matrix products.
        roofline_ms: what the measured bandwidth or rate of products would take, the larger.
    """

    op: str
    what: str
    ms: float
    bytes: int
    flops: int
    roofline_ms: float

    @property
    def share(self) -> float:
        """Of the roofline."""
        return self.roofline_ms / self.ms


@torch.no_grad()
def measure_kernels(device: torch.device, num_tokens: int, backend: str | None = None) -> dict:
    """Runs every op on `num_tokens` tokens.

    Args:
        num_tokens: at least 2,048.
        backend: of `deltakv_hf.dispatch`; None: what it chooses.

    Returns:
        `rates` of the device (`copy_gb_s`, `product_tflops` in 16 bits, `int8_tops`), and `rows`, `Timing`s as
        dictionaries with their `share`.
    """
    clock, layer = _Clock(device), _Layer(device, num_tokens)
    rates = clock.rates()
    rows = [asdict(row) | {"share": row.share} for row in _timings(clock, layer, rates, backend)]
    return {"rates": rates, "num_tokens": num_tokens, "rows": rows}


class _Clock:
    def __init__(self, device: torch.device):
        self.device = device
        self.flushed = torch.empty(FLUSHED_BYTES[device.type], dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        """Median milliseconds of an op that finds nothing in the caches of the device."""
        run()
        spans = []
        for _ in range(REPEATS if self.device.type == "cuda" else 3):
            self.flushed.zero_()
            if self.device.type == "cuda":
                spans.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                # the host is far ahead when the op begins, as in a model
                torch.cuda._sleep(2_000_000)
                spans[-1][0].record()
                run()
                spans[-1][1].record()
            else:
                began = time.perf_counter()
                run()
                spans.append(1000 * (time.perf_counter() - began))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spans = [first.elapsed_time(second) for first, second in spans]
        return statistics.median(spans)

    def rates(self) -> dict[str, float]:
        """Of this device, as measured: the roofline."""
        large, size = self.device.type == "cuda", 8192 if self.device.type == "cuda" else 1024
        source = torch.empty(2**30 if large else 2**26, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        rates = {"copy_gb_s": 2 * source.nbytes / self(lambda: target.copy_(source)) / 1e6}
        x = torch.randn(size, size, device=self.device).to(torch.float16 if large else torch.float32)
        rates["product_tflops"] = 2 * size**3 / self(lambda: x @ x) / 1e9
        integers = x.clamp(-9, 9).to(torch.int8)
        rates["int8_tops"] = 2 * size**3 / self(lambda: torch._int_mm(integers, integers.T)) / 1e9
        return rates


class _Layer:
    """Random tensors of one layer."""

    def __init__(self, device: torch.device, num_tokens: int):
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        starts, tables, steps, place = [], [], [], 0
        for groups, size in RUNS:
            limit = dispatch.grid_limit(size)
            table = torch.randint(-limit, limit + 1, (groups, 256, size), generator=generator, device=device)
            starts.append(place)
            tables.append(table.to(torch.int8 if limit <= 127 else torch.int16))
            steps.append(torch.rand(groups, generator=generator, device=device) + 0.5)
            place += groups * size
        self.book = Codebook(starts, tables, steps, place)
        self.width, self.components = HEADS * HEAD_DIM, place
        self.tokens = random(1, num_tokens, place)
        self.codes = self.book.encode(self.tokens)
        self.visible = torch.arange(num_tokens, device=device)[None] // REFERENCE_STRIDE + 1
        self.query = random(1, HEADS, QUERIES, HEAD_DIM)
        dtype = torch.float16 if device.type == "cuda" else torch.float32

        def reading(book: Codebook) -> tuple[dispatch.Vectors, dispatch.KeyMap]:
            vectors = token_vectors(book).vectors
            matrix = random(len(vectors.byte_idx), self.width) / place**0.5
            key_map = dispatch.KeyMap(matrix.to(dtype), torch.ones(self.width, device=device), random(self.width))
            return vectors._replace(table=vectors.table.to(dtype)), key_map

        self.vectors, self.key_map = reading(self.book)
        self.leading, self.leading_map = reading(self.book.leading(self.book.components_in(INDEX_BYTES)))
        turn = random(1, num_tokens, HEAD_DIM // 2)
        self.rotation = dispatch.Rotation(turn.cos().to(torch.bfloat16), turn.sin().to(torch.bfloat16), False)
        scaling = torch.ones(HEADS, 1, HEAD_DIM, device=device), random(HEADS, 1, HEAD_DIM)
        matrix = random(HEADS, len(self.vectors.byte_idx), HEAD_DIM) / place**0.5
        self.value_map = dispatch.ValueMap(matrix.to(dtype), *scaling)
        self.slots = torch.randperm(num_tokens, generator=generator, device=device)[:SELECTED].sort().values[None].int()
        self.dense = [random(1, HEADS, num_tokens, HEAD_DIM).to(torch.bfloat16) for _ in range(2)]
        # sinks, recent window and pending tokens
        self.raw = [tuple(part[:, :, :count].clone() for part in self.dense) for count in RAW]
        self.half_angles = turn.cos(), turn.sin()
        self.wide = random(1, num_tokens, 2 * self.width)
        self.scaling = random(2 * self.width), torch.rand(2 * self.width, generator=generator, device=device)
        self.inverse = random(2 * self.width, len(self.vectors.byte_idx)).half()
        self.packed = dispatch.int4_encode(*self.dense)


def _timings(clock: _Clock, layer: _Layer, rates: dict[str, float], backend: str | None):
    n, components, num_bytes = layer.tokens.shape[1], layer.components, layer.book.num_bytes
    references = layer.tokens[:, ::REFERENCE_STRIDE].contiguous()

    def timing(op: str, what: str, run, size: int, flops: int, rate: str = "product_tflops") -> Timing:
        least = max(size / rates["copy_gb_s"] / 1e6, flops / rates[rate] / 1e9)
        return Timing(op, what, clock(run), size, flops, least)

    def search():
        return dispatch.nearest_references(layer.tokens, references, layer.visible, 1, backend=backend)

    pairs = int(layer.visible.sum())
    size = layer.tokens.nbytes + references.nbytes
    yield timing("nearest_references", f"{n:,} tokens", search, size, 2 * components * pairs, "int8_tops")

    book = layer.book

    turn = layer.half_angles

    def unrotate():
        return dispatch.unrotate(*layer.dense, turn, backend=backend)

    size = 2 * layer.dense[0].nbytes + sum(part.nbytes for part in turn) + 4 * layer.wide.numel()
    yield timing("unrotate", f"{n:,} tokens", unrotate, size, 0)

    def analyse():
        return dispatch.analyse(layer.wide, *layer.scaling, layer.inverse, backend=backend)

    size = layer.wide.nbytes + layer.inverse.nbytes + layer.tokens.nbytes
    yield timing("analyse", f"{n:,} tokens", analyse, size, 2 * layer.wide.numel() * layer.inverse.shape[1])

    def states():
        return dispatch.analyse_states(*layer.dense, turn, False, *layer.scaling, layer.inverse, backend=backend)

    size = 2 * layer.dense[0].nbytes + layer.inverse.nbytes + layer.tokens.nbytes
    yield timing("analyse_states", f"{n:,} tokens", states, size, 2 * layer.wide.numel() * layer.inverse.shape[1])
    others = (torch.arange(n, device=layer.tokens.device) % REFERENCE_STRIDE).nonzero()[:, 0]
    chosen = (layer.visible[:, others, None] - 1).to(torch.int16)

    def residuals():
        return dispatch.residuals(layer.tokens, others, references, chosen, layer.book.scale, backend)

    size = 2 * layer.tokens[0, others].nbytes + references.nbytes
    yield timing("residuals", f"{len(others):,} of {n:,} tokens", residuals, size, 0)

    def quantize():
        return dispatch.vector_quantize(layer.tokens, book.starts, book.tables, book.steps, book.groups, backend)

    size = layer.tokens.nbytes + layer.codes.nbytes
    yield timing("vector_quantize", f"{n:,} tokens", quantize, size, 2 * 256 * components * n)

    half_query = layer.query.to(layer.dense[0].dtype)

    def raw():
        return dispatch.attend(half_query, layer.raw, None, HEAD_DIM**-0.5, backend)

    before, count = raw(), sum(RAW)
    size, flops = 4 * count * layer.width, 4 * count * layer.width * QUERIES
    yield timing("attend", f"{count} raw tokens", raw, size, flops)
    for slots, count, what in ((None, n, f"all of {n:,}"), (layer.slots, SELECTED, f"{SELECTED:,} of {n:,}")):

        def attend(slots=slots):
            parts = layer.codes, layer.vectors, layer.key_map, layer.value_map, None, layer.rotation
            return dispatch.reconstruct_and_attend(
                half_query, *parts, slots=slots, before=before, dtype=half_query.dtype, backend=backend
            )

        flops = 2 * count * components * (layer.width + HEADS * QUERIES)
        yield timing("reconstruct_and_attend", what, attend, count * num_bytes, flops)

    def lead():
        parts = layer.codes, layer.leading, layer.leading_map, None, layer.rotation
        return dispatch.score_leading(half_query, *parts, backend=backend)

    size, flops = n * INDEX_BYTES, 2 * n * len(layer.leading.byte_idx) * layer.width
    yield timing("score_leading", f"{INDEX_BYTES} bytes of {n:,}", lead, size, flops)
    scores = lead()

    def choose():
        return dispatch.choose(scores, before.log_total, SELECTED, backend)

    yield timing("choose", f"{SELECTED:,} of {n:,}", choose, scores.nbytes, 0)
    query = layer.query.flatten(1, 2)[:, :, None].to(torch.bfloat16)

    def packed():
        return dispatch.int4_decode(half_query, *layer.packed, backend=backend)

    size, flops = sum(part.nbytes for part in layer.packed), 4 * n * layer.width * QUERIES
    yield timing("int4_decode", f"all of {n:,}", packed, size, flops)

    def dense():
        return F.scaled_dot_product_attention(query, *layer.dense, enable_gqa=True)

    size, flops = sum(part.nbytes for part in layer.dense), 4 * n * layer.width * QUERIES
    yield timing("(SDPA on a dense cache)", f"all of {n:,}", dense, size, flops)
