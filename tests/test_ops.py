"""The reference kernels and the lattice against plain arithmetic."""

import pytest
import torch
from deltakv_hf.kernels.reference import dequantize, nearest_references, pack, predict, quantize, reconstruct, unpack
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deltakv_hf.references import Lattice

NBITS = [2, 4, 8]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("width", [4, 20, 64, 120])
def test_unpack_undoes_pack(nbits, width):
    codes = torch.randint(0, 2**nbits, (3, 5, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, nbits)
    assert packed.shape == (3, 5, width * nbits // 8)
    assert torch.equal(torch.cat(unpack(packed, nbits), -1), codes)


@pytest.mark.parametrize(
    "nbits, codes, packed",
    [
        (8, [1, 2, 255], [1, 2, 255]),
        (4, [1, 2, 3, 4], [0x31, 0x42]),
        (4, [15, 0, 0, 15], [0x0F, 0xF0]),
        (2, [0, 1, 2, 3], [0b11100100]),
        (2, [1, 3, 0, 0, 2, 0, 3, 1], [0b11_10_00_01, 0b01_00_00_11]),
    ],
    ids=str,
)
def test_byte_layout(nbits, codes, packed):
    """The layout is part of the stored format: segment 0 in the lowest bits."""
    assert pack(torch.tensor(codes, dtype=torch.uint8), nbits).tolist() == packed


def test_quantize_literal_bytes():
    codes, levels = quantize(torch.tensor([0.0, 1.0, 15.0, 30.0, -2.0, -1.75, 1.75, 0.0]), 4, 4)
    # steps 2 and 0.25 from minima 0 and -2: codes 0 0 8 15 (0.5 rounds to even) and 0 1 15 8
    assert levels.tolist() == [[2.0, 0.0], [0.25, -2.0]]
    assert codes.tolist() == [0x00, 0x10, 0xF8, 0x8F]


# -- quantisation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("group_size", [1, 4, 20])
@pytest.mark.parametrize("spread, offset", [(1, 0), (100, 0), (1e-3, 0), (1, 50), (1e-6, 0), (1e4, 0)])
def test_error_is_at_most_half_a_step(nbits, group_size, spread, offset):
    x = random(40, 20) * spread + offset
    codes, levels = quantize(x, nbits, group_size)
    error = (dequantize(codes, levels, nbits) - x).unflatten(-1, (-1, group_size)).abs().amax(-1)
    groups = x.unflatten(-1, (-1, group_size))
    scale, low = (groups.amax(-1) - groups.amin(-1)) / (2**nbits - 1), groups.amin(-1)
    # scale and minimum are rounded to fp16, whose numbers near 0 are 2**-24 apart
    slack = 2**nbits * (scale * 2.0**-11 + 2.0**-24) + low.abs() * 2.0**-11 + 2.0**-24
    assert (error <= 0.5001 * scale + slack + 1e-6 * x.abs().max()).all()


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1024.0])
def test_constant_groups_are_exact(nbits, value):
    x = torch.full((3, 8), value)
    assert torch.equal(dequantize(*quantize(x, nbits, 4), nbits), x)


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_a_group_that_is_not_finite_reads_back_nan(nbits, bad, place):
    """A number that is not finite must never come back as a plausible finite one."""
    x = random(2, 8)
    clean = dequantize(*quantize(x, nbits, 4), nbits)
    x[0, place] = bad
    read = dequantize(*quantize(x, nbits, 4), nbits)
    assert read[0, :4].isnan().all()
    assert torch.equal(read[0, 4:], clean[0, 4:]) and torch.equal(read[1], clean[1])


@pytest.mark.parametrize("nbits", NBITS)
def test_a_whole_group_of_infinities_reads_back_nan(nbits):
    assert dequantize(*quantize(torch.full((1, 4), torch.inf), nbits, 4), nbits).isnan().all()


@pytest.mark.parametrize("nbits", NBITS)
def test_numbers_beyond_fp16_do_not_come_back_small(nbits):
    """bf16 models reach 1e5 and more; a minimum cut to 65504 would be a wrong number, not a rounded one."""
    x = torch.tensor([[-3e5, -2e5, -1e5, -2.5e5]])
    read = dequantize(*quantize(x, nbits, 4), nbits)
    assert (read.isnan() | ((read - x).abs() <= 2e5 / (2**nbits - 1))).all()


@pytest.mark.parametrize("nbits", NBITS)
def test_zero_tokens_are_quantized_to_zero_records(nbits):
    codes, levels = quantize(torch.empty(2, 0, 8), nbits, 4)
    assert codes.shape == (2, 0, nbits) and levels.shape == (2, 0, 2, 2)
    assert dequantize(codes, levels, nbits).shape == (2, 0, 8)


@given(st.sampled_from(NBITS), hnp.arrays("float32", (6, 20), elements=st.floats(-1e4, 1e4, width=32)))
def test_a_token_is_quantized_by_itself(nbits, x):
    x = torch.from_numpy(x)
    codes, levels = quantize(x, nbits, 5)
    for i in range(len(x)):
        alone = quantize(x[i : i + 1], nbits, 5)
        assert torch.equal(alone[0][0], codes[i]) and torch.equal(alone[1][0], levels[i])


# -- nearest references ------------------------------------------------------------------------------------------------


def brute_force(tokens, references, num_visible, top_k):
    """float64 distances, one token after another; stable among equals."""
    found = torch.empty(*tokens.shape[:2], top_k, dtype=torch.int64)
    for row in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            visible = references[row, : num_visible[row, t]].double()
            order = (visible - tokens[row, t].double()).square().sum(-1).sort(stable=True).indices[:top_k]
            found[row, t] = order[0]
            found[row, t, : len(order)] = order
    return found


def integer_problem(batch=2, num_tokens=37, num_references=23, width=8, low=0, seed=0):
    """Numbers whose largest is the same in every token, so that rounding to 127 levels is exact."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-5, 6, (batch, num_tokens, width), generator=generator).float()
    references = torch.randint(-5, 6, (batch, num_references, width), generator=generator).float()
    tokens[..., 0], references[..., 0] = 127, 127
    visible = torch.randint(1, num_references + 1, (batch, num_tokens), generator=generator)
    return tokens, references, visible


@pytest.mark.parametrize("top_k", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 37, 23, 8), (3, 50, 5, 20), (1, 9, 200, 64)], ids=str)
def test_nearest_are_those_of_brute_force(top_k, shape):
    tokens, references, visible = integer_problem(*shape)
    expected = brute_force(tokens, references, visible, top_k)
    assert torch.equal(nearest_references(tokens, references, visible, top_k), expected)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nearest_of_real_numbers_are_nearly_nearest(top_k, scale):
    """Rounding to 8 bits may swap near-equals; what is chosen is at most a few per cent farther."""
    tokens, references = random(2, 60, 64) * scale, random(2, 40, 64, seed=1) * scale
    visible = torch.full((2, 60), 40)
    distance = torch.cdist(tokens, references)
    chosen = distance.gather(2, nearest_references(tokens, references, visible, top_k))
    best = distance.topk(top_k, largest=False).values
    assert (chosen <= best * 1.03).all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_no_reference_of_the_future_is_chosen(top_k):
    tokens, references, visible = integer_problem()
    tokens = references[:, visible.clamp(max=22)[0], :]
    chosen = nearest_references(tokens, references, visible, top_k)
    assert (chosen < visible[..., None]).all() and (chosen >= 0).all()


@pytest.mark.parametrize("num_visible", [1, 2])
def test_few_visible_repeat_the_nearest(num_visible):
    references = torch.tensor([[[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]]])
    chosen = nearest_references(torch.tensor([[[1.0, 9.0]]]), references, torch.tensor([[num_visible]]), 4)
    assert chosen.tolist() == [[[0, 0, 0, 0]]] if num_visible == 1 else [[[1, 0, 1, 1]]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("tile", [2, 3, 1024])
def test_among_equals_the_earlier_wins(monkeypatch, top_k, tile):
    set_tiles(monkeypatch, 1024, tile)
    references = torch.ones(1, 9, 4)
    chosen = nearest_references(torch.ones(1, 3, 4), references, torch.full((1, 3), 9), top_k)
    assert chosen.tolist() == [[list(range(top_k))] * 3]


def set_tiles(monkeypatch, token_tile, reference_tile):
    namespace = nearest_references.__globals__
    monkeypatch.setitem(namespace, "TOKEN_TILE", token_tile)
    monkeypatch.setitem(namespace, "REFERENCE_TILE", reference_tile)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("tiles", [(1, 1), (1024, 2), (5, 7), (37, 23), (36, 22)], ids=str)
def test_tiles_leave_no_trace(monkeypatch, top_k, tiles):
    tokens, references, visible = random(2, 37, 20), random(2, 23, 20, seed=1), integer_problem()[2]
    expected = nearest_references(tokens, references, visible, top_k)
    set_tiles(monkeypatch, *tiles)
    assert torch.equal(nearest_references(tokens, references, visible, top_k), expected)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("width", [6, 20, 64, 768, 2048])
def test_a_token_chooses_alone_as_in_a_batch(top_k, width):
    tokens, references = random(3, 30, width), random(3, 17, width, seed=1)
    visible = torch.randint(1, 18, (3, 30), generator=torch.Generator().manual_seed(2))
    together = nearest_references(tokens, references, visible, top_k)
    for row in range(3):
        for t in range(0, 30, 7):
            pick = slice(row, row + 1), slice(t, t + 1)
            # references that are not visible may not be there yet
            there = references[pick[0], : visible[row, t]]
            assert torch.equal(nearest_references(tokens[pick], there, visible[pick], top_k)[0, 0], together[row, t])


@pytest.mark.parametrize("top_k", [1, 2])
def test_zero_tokens_choose_nothing(top_k):
    assert nearest_references(
        torch.empty(2, 0, 8), random(2, 3, 8), torch.empty(2, 0, dtype=torch.int64), top_k
    ).shape == (2, 0, top_k)


def test_zero_vectors_are_compared():
    references = torch.stack([torch.full((4,), 3.0), torch.zeros(4), torch.full((4,), -2.0)])[None]
    chosen = nearest_references(torch.zeros(1, 1, 4), references, torch.tensor([[3]]), 3)
    assert chosen.tolist() == [[[1, 2, 0]]]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_not_finite_reference_is_never_nearest(top_k, bad):
    """One bad token in a long text may not cost every token behind it its references."""
    tokens, references, _ = integer_problem()
    visible = torch.full((2, 37), 23)
    expected = nearest_references(tokens, references, visible, top_k)
    references[0, 20, 3] = bad
    chosen = nearest_references(tokens, references, visible, top_k)
    unaffected = ~(expected == 20).any(-1)
    assert torch.equal(chosen[unaffected], expected[unaffected])
    assert not (chosen[0] == 20).any()


# -- reading back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_prediction_is_the_mean_of_each_rows_references(top_k):
    references = random(2, 9, 8)
    idx = torch.randint(0, 9, (2, 5, top_k), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([references[row][idx[row]].mean(1) for row in range(2)])
    torch.testing.assert_close(predict(references, idx.to(torch.int16)), expected)


@pytest.mark.parametrize("number", [32767, 32768, 40000, 65535])
def test_reference_numbers_are_unsigned_16_bits(number):
    references = torch.zeros(1, 65536, 4)
    references[0, number] = 7
    idx = torch.tensor([[[number]]]).to(torch.int16)
    assert predict(references, idx).tolist() == [[[7, 7, 7, 7]]]


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("given", [False, True], ids=["new-memory", "given-memory"])
def test_reconstruct_is_prediction_plus_residual(nbits, top_k, given):
    references, residual = random(2, 9, 20), random(2, 6, 20, seed=1)
    idx = torch.randint(0, 9, (2, 6, top_k), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    codes, levels = quantize(residual, nbits, 5)
    memory = torch.empty(2, 400) if given else None
    got = reconstruct(codes, levels, idx, references, nbits, memory)
    torch.testing.assert_close(got, predict(references, idx) + dequantize(codes, levels, nbits))
    assert not given or got.data_ptr() == memory.data_ptr()


# -- lattice -----------------------------------------------------------------------------------------------------------


def positions_of(stride, growth, limit):
    """The definition, as a loop."""
    found, p = [], 0
    while p < limit:
        found.append(p)
        p += stride + int(growth * p)
    return found


lattices = st.tuples(st.integers(1, 40), st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0, 3.7]))


@given(lattices, st.integers(0, 5000))
def test_count_is_that_of_the_loop(lattice, num_tokens):
    assert Lattice(*lattice).count(num_tokens) == len(positions_of(*lattice, num_tokens))


@given(lattices, st.integers(0, 3000), st.integers(0, 200))
def test_span_is_that_of_the_loop(lattice, start, length):
    positions = positions_of(*lattice, start + length)
    span = Lattice(*lattice).span(start, start + length)
    assert span.reference_offsets.tolist() == [p - start for p in positions if p >= start]
    others = [t for t in range(start, start + length) if t not in positions]
    assert span.residual_offsets.tolist() == [t - start for t in others]
    assert span.num_visible.tolist() == [sum(p < t for p in positions) for t in others]


@given(lattices, st.integers(0, 500), st.integers(1, 100), st.integers(1, 100))
def test_spans_join(lattice, start, first, second):
    lattice = Lattice(*lattice)
    whole, left = lattice.span(start, start + first + second), lattice.span(start, start + first)
    right = lattice.span(start + first, start + first + second)
    joined = left.reference_offsets.tolist() + (right.reference_offsets + first).tolist()
    assert whole.reference_offsets.tolist() == joined
    assert whole.num_visible.tolist() == left.num_visible.tolist() + right.num_visible.tolist()


@given(lattices, st.integers(1, 3000))
def test_the_first_token_is_a_reference_and_all_others_see_one(lattice, length):
    span = Lattice(*lattice).span(0, length)
    assert span.reference_offsets[0] == 0 and (span.num_visible >= 1).all()
