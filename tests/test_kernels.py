"""Triton kernels against the reference: on a GPU, or in Triton's interpreter; and compiled for cards not here."""

import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakv_hf import InvalidOptionError, KVCompressor, dispatch
from deltakv_hf.compressor.codebook import Codebook
from deltakv_hf.compressor.vectors import token_vectors
from deltakv_hf.hub import bundled
from deltakv_hf.kernels import reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# shared memory of a block, in KiB
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@st.composite
def searches(draw):
    """(tokens, references, num_visible, top_k): numbers of all sizes, or small integers with many ties."""
    batch, num_tokens, num_references = draw(st.tuples(*[st.integers(1, high) for high in (3, 150, 150)]))
    width, generator = draw(st.sampled_from([1, 8, 40, 130])), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shapes = (batch, num_tokens, width), (batch, num_references, width)
    if draw(st.booleans()):
        tokens, references = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    else:
        tokens, references = (
            torch.randn(shape, generator=generator) * 10 ** draw(st.integers(-6, 6)) for shape in shapes
        )
    if draw(st.booleans()):
        tokens[:, ::4], references[:, ::3], references[:, 1::7] = torch.nan, torch.nan, torch.inf
    visible = torch.randint(1, num_references + 1, (draw(st.sampled_from([1, batch])), num_tokens), generator=generator)
    return tokens, references, visible.expand(batch, -1), draw(st.sampled_from([1, 2, 4]))


@contextmanager
def setting(module: str, **values):
    """Constants of a kernel's module for a while."""
    module = import_module(f"deltakv_hf.kernels.triton_ops.{module}")
    kept = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(kept)


@given(searches(), st.sampled_from([1, 256]))
@settings(max_examples=40)
def test_nearest_references_are_those_of_the_reference(search, least_part):
    """Searched whole and in parts."""
    *tensors, top_k = search
    expected = dispatch.nearest_references(*tensors, top_k, backend="reference")
    tokens, *others = (part.to(DEVICE) for part in tensors)
    # the same tokens, picked out of more
    places = 2 * torch.arange(tokens.shape[1], device=DEVICE).flip(0) + 1
    more = tokens.new_full((tokens.shape[0], 2 * tokens.shape[1] + 3, tokens.shape[2]), torch.nan)
    more[:, places] = tokens
    with setting("nearest_references", LEAST_PART=least_part):
        found = dispatch.nearest_references(tokens, *others, top_k, backend="triton")
        picked = dispatch.nearest_references(more, *others, top_k, places, backend="triton")
    assert found.dtype == expected.dtype and torch.equal(found.cpu(), expected)
    assert torch.equal(picked.cpu(), expected)
    assert torch.equal(dispatch.nearest_references(more, *others, top_k, places, backend="reference").cpu(), expected)


@given(
    batch=st.integers(1, 3),
    counts=st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 300)),
    width=st.sampled_from([1, 40, 1030]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_residuals_are_those_of_the_reference(batch, counts, width, seed):
    generator, (num_tokens, num_places, num_references) = torch.Generator().manual_seed(seed), counts
    tokens = torch.randn(batch, num_tokens, width, generator=generator)
    references = torch.randn(batch, num_references, width, generator=generator)
    references[:, ::5] = torch.nan
    places = torch.randint(num_tokens, (num_places,), generator=generator)
    idx = torch.randint(num_references, (batch, num_places, 1), generator=generator).to(torch.int16)
    arguments = tokens, places, references, idx, torch.rand(width, generator=generator)
    expected = dispatch.residuals(*arguments, backend="reference")
    got = dispatch.residuals(*(part.to(DEVICE) for part in arguments), backend="triton")
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_residuals_of_more_references_than_a_signed_number_counts():
    references = torch.arange(2**16).float()[None, :, None]
    idx = torch.tensor([0, 2**15 - 1, 2**15, 2**16 - 1]).to(torch.int16)[None, :, None]
    arguments = torch.zeros(1, 9, 1), torch.arange(4), references, idx, torch.ones(1)
    got = dispatch.residuals(*(part.to(DEVICE) for part in arguments), backend="triton")
    assert got.flatten().tolist() == [0, 1 - 2**15, -(2**15), 1 - 2**16]


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65])
def test_nearest_references_at_the_edges_of_tiles(num_tokens):
    generator = torch.Generator().manual_seed(0)
    tokens, references = (torch.randn(1, n, 16, generator=generator) for n in (num_tokens, 64))
    visible = torch.full((1, num_tokens), 64)
    expected = dispatch.nearest_references(tokens, references, visible, 3)
    found = dispatch.nearest_references(
        *(part.to(DEVICE) for part in (tokens, references, visible)), 3, backend="triton"
    )
    assert torch.equal(found.cpu(), expected)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(0, 150)),
    width=st.sampled_from([1, 40, 1030]),
    components=st.integers(1, 140),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_components_are_those_of_the_reference_in_any_company(shape, width, components, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*shape, width, generator=generator) * 10.0**exponent
    mean, weights = torch.randn(width, generator=generator) * 10.0**exponent, torch.rand(width, generator=generator)
    inverse = torch.randn(width, components + 3, generator=generator).half()[:, :components]
    if shape[1]:
        tokens[:, 0] = mean
    tokens[:, 1:2] = torch.nan
    arguments = [part.to(DEVICE) for part in (tokens, mean, weights, inverse)]
    got = dispatch.analyse(*arguments, backend="triton")
    expected = dispatch.analyse(tokens, mean, weights, inverse, backend="reference")
    # of what is summed up
    sizes = (((tokens - mean) * weights).norm(dim=-1, keepdim=True) * inverse.float().norm(dim=0)).clamp_(min=1e-30)
    error = (got.cpu() - expected) / sizes
    torch.testing.assert_close(error, expected * 0, rtol=0, atol=1e-6, equal_nan=True)
    some = dispatch.analyse(arguments[0][:1, 1::2].contiguous(), *arguments[1:], backend="triton")
    # on a GPU the same bits; the interpreter multiplies by NumPy, which sums rows of a matrix in orders of its own
    difference = (some - got[:1, 1::2]).cpu() / sizes[:1, 1::2]
    bound = 0 if DEVICE == "cuda" else 1e-6
    torch.testing.assert_close(difference, expected[:1, 1::2] * 0, rtol=0, atol=bound, equal_nan=True)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 40)),
    sizes=st.tuples(st.sampled_from([2, 6, 32]), st.sampled_from([1, 6, 40])),
    turned=st.sampled_from(["not", "one pair", "all", "all of one row"]),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_unrotated_tokens_are_those_of_the_reference(shape, sizes, turned, interleaved, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, heads, num_tokens = shape
    # as a model holds them, and cut out of more
    states = [torch.randn(rows, num_tokens + 3, heads, size, generator=generator).bfloat16() for size in sizes]
    states, angles = [part.transpose(1, 2)[:, :, 3:] for part in states], None
    if turned != "not":
        count = 1 if turned == "one pair" else sizes[0] // 2
        angle = torch.randn(1 if turned == "all of one row" else rows, num_tokens, count, generator=generator)
        angles = 1.3 * angle.cos(), 1.3 * angle.sin()
    expected = dispatch.unrotate(*states, angles, interleaved, backend="reference")
    placed = angles and tuple(part.to(DEVICE) for part in angles)
    got = dispatch.unrotate(*(part.to(DEVICE) for part in states), placed, interleaved, backend="triton")
    assert torch.equal(got.cpu(), expected)


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(0, 40)),
    sizes=st.tuples(st.sampled_from([2, 6, 32]), st.sampled_from([0, 1, 6, 40])),
    turned=st.sampled_from(["not", "one pair", "all", "all of one row"]),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    components=st.integers(1, 140),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_components_of_states_are_those_of_the_reference_in_any_company(
    shape, sizes, turned, interleaved, dtype, components, seed
):
    generator = torch.Generator().manual_seed(seed)
    rows, heads, num_tokens = shape
    width, scale = heads * sum(sizes), 10.0 ** (seed % 9 - 4)
    # as a model holds them, and cut out of more
    states = [scale * torch.randn(rows, num_tokens + 3, heads, size, generator=generator) for size in sizes]
    states, angles = [part.to(dtype).transpose(1, 2)[:, :, 3:] for part in states], None
    if turned != "not":
        count = 1 if turned == "one pair" else sizes[0] // 2
        angle = torch.randn(1 if turned == "all of one row" else rows, num_tokens, count, generator=generator)
        angles = 1.3 * angle.cos(), 1.3 * angle.sin()
    mean, weights = scale * torch.randn(width, generator=generator), torch.rand(width, generator=generator)
    states[0][:, :, 1:2] = torch.nan
    inverse = torch.randn(width, components, generator=generator).half()
    expected = dispatch.analyse_states(*states, angles, interleaved, mean, weights, inverse, backend="reference")

    def placed(pick):
        return angles and tuple(part[: pick[0].stop, pick[2]].to(DEVICE) for part in angles)

    def maps_of(matrix):
        return tuple(part.to(DEVICE) for part in (mean, weights, matrix))

    def run(pick):
        held = *(part[pick].to(DEVICE) for part in states), placed(pick), interleaved
        return dispatch.analyse_states(*held, *maps_of(inverse), backend="triton").cpu()

    everything, some = (slice(None), slice(None), slice(None)), (slice(0, 1), slice(None), slice(1, None, 2))
    tokens = (dispatch.unrotate(*states, angles, interleaved) - mean) * weights
    sizes = (tokens.norm(dim=-1, keepdim=True) * inverse.float().norm(dim=0)).clamp_(min=1e-30)
    got, others = run(everything), run(some)
    torch.testing.assert_close((got - expected) / sizes, expected * 0, rtol=0, atol=1e-6, equal_nan=True)
    # on a GPU the same bits; the interpreter multiplies by NumPy, which sums rows of a matrix in orders of its own
    bound = 0 if DEVICE == "cuda" else 1e-6
    difference = (others - got[:1, 1::2]) / sizes[:1, 1::2]
    torch.testing.assert_close(difference, expected[:1, 1::2] * 0, rtol=0, atol=bound, equal_nan=True)
    if dtype != torch.float32:
        # numbers alone: what is multiplied has the bits of the reference
        alone = (
            *(part.to(DEVICE) for part in states),
            placed(everything),
            interleaved,
            *maps_of(torch.eye(width).half()),
        )
        numbers = [dispatch.analyse_states(*alone, backend=backend) for backend in ("reference", "triton")]
        torch.testing.assert_close(*numbers, rtol=0, atol=0, equal_nan=True)


@st.composite
def assignments(draw):
    """(x, starts, tables, steps): runs of groups of several sizes with components before, between and behind them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    starts, tables, steps, components = [], [], [], draw(st.integers(0, 2))
    for size in draw(
        st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 24, 25, 40, 120, 121, 260]), min_size=1, max_size=3, unique=True)
    ):
        groups, limit = draw(st.integers(1, 3)), dispatch.grid_limit(size)
        # few integers: many ties
        most = draw(st.sampled_from([2, limit]))
        table = torch.randint(-most, most + 1, (groups, 256, size), generator=generator)
        starts.append(components)
        tables.append(table.to(torch.int8 if limit <= 127 else torch.int16))
        steps.append(torch.rand(groups, generator=generator) + 0.1)
        components += groups * size + draw(st.integers(0, 2))
    shape = draw(st.integers(1, 2)), draw(st.integers(0, 70)), components
    x = torch.randn(shape, generator=generator) * 10 ** draw(st.integers(-2, 3))
    if draw(st.booleans()):
        x[:, ::5], x[:, 1::7] = torch.nan, torch.inf
    return x, starts, tables, steps


@given(assignments())
@settings(max_examples=40)
def test_vectors_are_those_of_the_reference(assignment):
    x, starts, tables, steps = assignment
    expected = dispatch.vector_quantize(x, starts, tables, steps, backend="reference")
    placed = x.to(DEVICE), starts, *([part.to(DEVICE) for part in parts] for parts in (tables, steps))
    assert torch.equal(dispatch.vector_quantize(*placed, backend="triton").cpu(), expected)
    scale = torch.zeros(x.shape[-1])
    for start, table, step in zip(starts, tables, steps, strict=True):
        scale[start : start + len(step) * table.shape[2]] = step.repeat_interleave(table.shape[2])
    # codes with any axes, into memory that held anything
    codes, scratch = expected.unsqueeze(1), torch.full((x.numel() + 3,), torch.nan)
    back = dispatch.vector_dequantize(codes, starts, tables, scale, backend="reference")
    placed = codes.to(DEVICE), *placed[1:3], scale.to(DEVICE)
    for memory in (None, scratch.to(DEVICE)):
        assert torch.equal(dispatch.vector_dequantize(*placed, memory, backend="triton").cpu(), back)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("most, is_near", [(100, True), (0, True), (None, False)])
def test_vectors_that_are_far_from_part_of_the_grid_are_found_too(size, most, is_near):
    """A kernel orders distances by 24 bits, which those to vectors at one corner of the grid alone do not fit."""
    limit = dispatch.grid_limit(size)
    table = torch.randint(limit - 3, limit + 1, (2, 256, size), generator=torch.Generator().manual_seed(0))
    if most is not None:
        table[:, 17] = most
    steps, starts = [torch.full((2,), 0.5)], [1]
    x = torch.randn(1, 50, 2 * size + 1, generator=torch.Generator().manual_seed(1)) * limit / 2
    assert dispatch.group_runs(starts, [table], steps).is_near == is_near
    expected = dispatch.vector_quantize(x, starts, [table], steps, backend="reference")
    placed = x.to(DEVICE), starts, [table.to(DEVICE)], [steps[0].to(DEVICE)]
    assert torch.equal(dispatch.vector_quantize(*placed, backend="triton").cpu(), expected)


@pytest.mark.parametrize("folder", bundled(), ids=lambda folder: folder.name)
def test_all_vectors_of_the_bundled_compressors_are_near(folder):
    """None of their layers is quantized without the kernel."""
    compressor = KVCompressor.from_pretrained(folder)
    for layer_idx, layer in enumerate(compressor.config["layers"]):
        transform = compressor.layer(layer_idx, *layer["widths"], torch.device("cpu")).transform
        assert transform.reference_codebook.groups.is_near and transform.residual_codebook.groups.is_near


def random_book(draw, generator: torch.Generator, components: int) -> Codebook:
    """Runs of vectors of several sizes with components outside of them."""
    starts, tables, steps, place = [], [], [], draw(st.integers(0, 3))
    for size in draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 20]), max_size=4)):
        groups = draw(st.integers(1, 3))
        if place + groups * size > components:
            break
        starts.append(place)
        tables.append(torch.randint(-100, 101, (groups, 256, size), generator=generator).to(torch.int8))
        steps.append((torch.rand(groups, generator=generator) + 0.1) / 50)
        place += groups * size + draw(st.integers(0, 2))
    return Codebook(starts, tables, steps, components)


def random_codes(generator: torch.Generator, batch: int, num_tokens: int, book: Codebook) -> torch.Tensor:
    return torch.randint(0, 256, (batch, num_tokens, book.num_bytes), generator=generator).to(torch.uint8)


@st.composite
def readings(draw):
    """Arguments of `reconstruct_and_attend`: RoPE of whole heads, of a part or none; references, lists, masks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = [st.integers(1, 2), st.integers(1, 5), st.integers(1, 20), st.integers(1, 300), st.integers(1, 90)]
    batch, heads, queries, num_slots, components = draw(st.tuples(*sizes))
    head_dim, n = 2 * draw(st.sampled_from([1, 5, 16, 32])), num_slots

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator).int()

    book, options = random_book(draw, generator, components), {}
    pool = draw(st.integers(1, 400)) if draw(st.booleans()) else None

    def held(num_records: int, book: Codebook) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes of every row, and where in them its records stand, if that is a pool."""
        if pool is None:
            return random_codes(generator, batch, num_records, book), None
        codes = random_codes(generator, 1, pool, book).expand(batch, -1, -1)
        return codes, integers(pool, batch, num_records + 5)[:, :num_records]

    codes, options["slot_map"] = held(num_slots, book)
    if draw(st.booleans()):
        num_references, added = draw(st.integers(1, 40)), random_book(draw, generator, components)
        coded = token_vectors(book, added, torch.rand(components, generator=generator))
        idx = integers(num_references, *codes.shape[:2]).to(torch.int16)
        idx = idx if pool is None else idx[:1].expand(batch, -1)
        own, slot_map = held(num_references, added)
        options["references"] = dispatch.References(own, idx, *coded.added, slot_map)
    else:
        coded = token_vectors(book)
    vectors = coded.vectors._replace(table=coded.vectors.table.float())
    places = len(coded.order)
    matrix = random(places, heads * head_dim + 3)[:, : heads * head_dim] / (places + 1) ** 0.5
    key_map = dispatch.KeyMap(matrix, random(heads * head_dim), random(heads * head_dim))
    value_dim = draw(st.sampled_from([1, 24, 80]))
    scaling = random(heads, 1, value_dim), random(heads, 1, value_dim)
    value_map = dispatch.ValueMap(random(heads, places, value_dim) / (places + 1) ** 0.5, *scaling)
    arguments = random(batch, heads, queries, head_dim), codes, vectors
    pairs = draw(st.sampled_from([0, 1, head_dim // 2]))
    if draw(st.booleans()):
        n = draw(st.integers(1, 200))
        options["slots"] = integers(num_slots, batch, n)
    if pairs:
        turn = random(draw(st.sampled_from([1, batch])), num_slots, pairs)
        positions = integers(num_slots, batch, n) if draw(st.booleans()) else None
        options["rotation"] = dispatch.Rotation(turn.cos(), turn.sin(), draw(st.booleans()), positions)
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, high])) for high in (batch, heads, queries))
        mask = random(*shape, n)
        options["mask"] = mask.masked_fill(mask > 1, -torch.inf)
    if draw(st.booleans()):
        options["lengths"] = integers(n + 1, batch)
    if draw(st.booleans()):
        log_total = random(batch, heads, queries, 1)
        before = dispatch.Attended(random(batch, heads, queries, value_dim), log_total)
        # a query that saw nothing before
        log_total[..., 0, :], before.output[..., 0, :] = -torch.inf, 0
        options["before"] = before
    options["scale"] = draw(st.sampled_from([1.0, 0.3]))
    return [*arguments, key_map, value_map], options


def _place(part, device, dtype):
    """Tensors, in named tuples too, on `device`; tables and maps in `dtype`."""
    if isinstance(part, dispatch.Vectors):
        part = part._replace(table=part.table.to(dtype))
    if isinstance(part, (dispatch.KeyMap, dispatch.ValueMap)):
        part = part._replace(matrix=part.matrix.to(dtype))
    if isinstance(part, dispatch.Attended):
        return dispatch.Attended(part.output.to(device), part.log_total.to(device))
    if isinstance(part, tuple):
        placed = [_place(item, device, dtype) for item in part]
        return type(part)(*placed) if hasattr(part, "_fields") else tuple(placed)
    return part.to(device) if isinstance(part, torch.Tensor) else part


def _read(arguments, options, backend, device, dtype=torch.float32):
    """Output and logarithm of the sum of what `readings` drew, with tables of `dtype`, on the CPU."""
    arguments = [_place(part, device, dtype) for part in arguments]
    options = {name: _place(part, device, dtype) for name, part in options.items()}
    seen = dispatch.reconstruct_and_attend(*arguments, **options, backend=backend)
    return seen.output.cpu(), seen.log_total.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@given(readings(), st.sampled_from([1, 2**25]), st.sampled_from([0, 2**20]))
@settings(max_examples=25)
def test_what_is_read_from_codes_is_that_of_the_reference(dtype, reading, chunk_bytes, few):
    """But for the order of sums; in float16 for the rounding of queries, keys and weights.

    Chunks of any size; components scored at once or in parts.
    """
    expected = _read(*reading, "reference", "cpu")
    with setting("decoding", CHUNK_BYTES=chunk_bytes), setting("scoring", FEW=few), poisoned_memory():
        found = _read(*reading, "triton", DEVICE, dtype)
    for x, y in zip(found, expected, strict=True):
        least = 1e-5 if dtype == torch.float32 else 2e-2
        finite = y[y.isfinite()]
        most = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=least * most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@given(readings(), st.sampled_from([1, 2**25]))
@settings(max_examples=15)
def test_scores_by_codes_are_those_of_the_reference(dtype, reading, chunk_bytes):
    """Likewise."""
    arguments = reading[0][:-1]
    options = {name: part for name, part in reading[1].items() if name not in ("mask", "before")}
    expected = dispatch.score_leading(*arguments, **options, backend="reference")
    arguments = [_place(part, DEVICE, dtype) for part in arguments]
    options = {name: _place(part, DEVICE, dtype) for name, part in options.items()}
    with setting("decoding", CHUNK_BYTES=chunk_bytes), poisoned_memory():
        found = dispatch.score_leading(*arguments, **options, backend="triton").cpu()
    finite = expected[expected.isfinite()]
    most = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=(1e-5 if dtype == torch.float32 else 2e-2) * most)


@st.composite
def raw_parts(draw):
    """Arguments of `attend`: up to three parts, some empty."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = [st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)]
    batch, heads, queries, head_dim, value_dim = draw(st.tuples(*sizes))
    counts = draw(st.lists(st.sampled_from([0, 1, 3, 64, 150]), min_size=1, max_size=3))
    counts[-1] = max(1, counts[-1])

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    parts = [(random(batch, heads, n, head_dim), random(batch, heads, n, value_dim)) for n in counts]
    mask = None
    if draw(st.booleans()):
        mask = random(*(draw(st.sampled_from([1, high])) for high in (batch, heads, queries)), sum(counts))
        mask = mask.masked_fill(mask > draw(st.sampled_from([-9.0, 1.0])), -torch.inf)
    return random(batch, heads, queries, head_dim), parts, mask, 1 / head_dim**0.5


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
@given(raw_parts(), st.sampled_from([128, 1024]))
@settings(max_examples=15)
def test_raw_tokens_are_attended_to_as_in_the_reference(dtype, arguments, span):
    """In one span and in several, whose tokens may all be masked."""
    query, parts, mask, scale = arguments
    query, parts = query.to(dtype), [tuple(states.to(dtype) for states in part) for part in parts]
    expected = dispatch.attend(query, parts, mask, scale, backend="reference")
    placed = [tuple(states.to(DEVICE) for states in part) for part in parts]
    with setting("attend", SPAN=span), poisoned_memory():
        mask = None if mask is None else mask.to(DEVICE)
        seen = dispatch.attend(query.to(DEVICE), placed, mask, scale, backend="triton")
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(seen.output.cpu(), expected.output, rtol=0, atol=4 * bound)
    torch.testing.assert_close(seen.log_total.cpu(), expected.log_total, rtol=0, atol=bound)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 40, 1030, 2500])),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 0.01, 3.0, 60.0]),
    seed=st.integers(0, 99),
    blind=st.booleans(),
    rows=st.sampled_from([2, 32]),
)
@settings(max_examples=30)
def test_what_is_chosen_is_what_the_reference_chooses(sizes, share, spread, seed, blind, rows):
    """But for weights that rounding may put on the other side of a step; ties go to the earlier token."""
    generator, n = torch.Generator().manual_seed(seed), sizes[-1]
    # room behind the last token, as blocks of four bits leave it
    scores = (spread * torch.randn(*sizes[:-1], n + 3, generator=generator))[..., :n]
    log_total = torch.randn(*sizes[:-1], 1, generator=generator)
    if blind:
        scores[0], log_total[0], scores[..., n // 2] = -torch.inf, -torch.inf, -torch.inf
    budget = max(1, round(share * n))
    with setting("choose", KEY_ROWS=rows), poisoned_memory():
        got = dispatch.choose(scores.to(DEVICE), log_total.to(DEVICE), budget, backend="triton").cpu().long()
    expected = dispatch.choose(scores, log_total, budget, backend="reference").long()
    assert got.shape == expected.shape and (got.diff(dim=-1) > 0).all()
    everything = torch.logaddexp(scores.logsumexp(-1, keepdim=True), log_total)
    weights = (scores - everywhere_or_nowhere(everything)).amax((1, 2)).clamp(min=-64.0)
    for row in range(len(got)):
        missed = weights[row][[slot for slot in expected[row].tolist() if slot not in set(got[row].tolist())]]
        taken = weights[row][[slot for slot in got[row].tolist() if slot not in set(expected[row].tolist())]]
        assert not len(missed) or missed.amax() - taken.amin() < 1.1 / 1024 + 1e-5 * spread


def everywhere_or_nowhere(log_total):
    return torch.where(log_total.isneginf(), torch.inf, log_total)


def test_every_kernel_compiles_for_every_card():
    """In the shared memory that each has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert {capability for _, capability, _ in made} == SHARED.keys()
    assert all(size <= 1024 * SHARED[capability] for _, capability, size in made)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    arguments = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), torch.ones(1, 1, dtype=torch.int64), 1
    with pytest.raises(InvalidOptionError, match="backend"):
        dispatch.nearest_references(*arguments, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InvalidOptionError, match="device"):
        dispatch.nearest_references(*arguments, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "deltakv_hf.kernels.triton_ops.nearest_references", None)
    with pytest.raises(InvalidOptionError, match="Install triton"):
        dispatch.nearest_references(*arguments, backend="triton")


def test_a_gpu_that_cannot_run_kernels_is_warned_about_once(monkeypatch):
    """And the reference serves: an op that was not asked for a backend does not fail."""
    device = torch.device("cuda", 99)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.warns(UserWarning, match=r"without its kernels on cuda:99.*below \(7, 5\)"):
        assert not dispatch.has_kernels(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch.has_kernels(device)
        assert dispatch._op("vector_quantize", None, device) is reference.vector_quantize
    dispatch._runs_triton.cache_clear()
