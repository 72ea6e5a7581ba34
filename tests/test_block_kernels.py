"""`attend_blocks`: against attention written out, and its kernel against it."""

import math
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from helpers import poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakv_hf import dispatch
from deltakv_hf.dispatch import Attended, Fusion, Rotation
from deltakv_hf.kernels import reference

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": "cpu", "triton": DEVICE}


@st.composite
def readings(draw, most_tokens=200, widths=(1, 2, 7, 16, 40, 96, 256)):
    """Arguments of `attend_blocks` and options: what is not to be read is NaN, or a place that is not there."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch, heads, queries, block_size = draw(st.tuples(*[st.integers(1, most) for most in (3, 3, 20, 70)]))
    num_tokens = draw(st.integers(1, most_tokens))
    head_dim, value_dim = draw(st.sampled_from(widths)), draw(st.sampled_from(widths))
    width, n_blocks = heads * (head_dim + value_dim), math.ceil(num_tokens / block_size)
    num_slots, pool = batch * n_blocks + 1, draw(st.integers(1, batch * n_blocks))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator)

    options, lengths = {"scale": head_dim**-0.5}, torch.full((batch,), num_tokens)
    if draw(st.booleans()):
        lengths = integers(num_tokens + 1, batch)
        options["lengths"] = lengths.int()
    tokens = torch.arange(num_tokens)
    is_read = tokens < lengths[:, None]
    # of a wider table
    block_table = integers(num_slots, batch, n_blocks + 2)[:, : n_blocks + draw(st.integers(0, 1))]
    block_table[torch.arange(block_table.shape[1]) * block_size >= lengths[:, None]] = 0
    slots = block_table[:, tokens // block_size]
    leader = integers(pool, num_slots)
    if draw(st.booleans()):
        factors = 1 + random(num_slots, 2) / 4
        factors[::3] = 1
        is_slot = torch.zeros(num_slots, dtype=torch.bool).index_put_((slots[is_read],), torch.tensor(True))
        factors[~is_slot] = torch.nan
        places = leader[slots]
        # what the table names behind a row's last block is there, whatever it holds
        is_slot[0] = True
        mean = random(draw(st.sampled_from([1, batch])), width)
        options["fusion"] = Fusion(leader.int().masked_fill(~is_slot, 10**9), factors, mean)
    else:
        pool, places = num_slots, slots
    # tokens with room behind each
    blocks = random(pool, block_size, width + draw(st.sampled_from([0, 3])))
    is_known = torch.zeros(pool, block_size, dtype=torch.bool)
    is_known[places[is_read], (tokens % block_size).expand(batch, -1)[is_read]] = True
    blocks[~is_known] = torch.nan
    pairs = draw(st.sampled_from([0, 1, head_dim // 2, head_dim // 3]))
    if 0 < pairs <= head_dim // 2:
        room = num_tokens + draw(st.integers(0, 30))
        angles = random(draw(st.sampled_from([1, batch])), room, pairs)
        positions = integers(room, batch, num_tokens).int() if draw(st.booleans()) else None
        options["rotation"] = Rotation(1.3 * angles.cos(), 1.3 * angles.sin(), draw(st.booleans()), positions)
    if draw(st.booleans()):
        mask = random(*(draw(st.sampled_from([1, high])) for high in (batch, heads, queries)), num_tokens)
        options["mask"] = mask.masked_fill(mask > draw(st.sampled_from([-9.0, 1.0])), -torch.inf)
    if draw(st.booleans()):
        before = Attended(random(batch, heads, queries, value_dim), random(batch, heads, queries, 1))
        # a query that saw nothing before
        before.output[..., 0, :], before.log_total[..., 0, :] = 0, -torch.inf
        options["before"] = before
    query = random(batch, heads, queries, head_dim)
    block_table = block_table.to(draw(st.sampled_from([torch.int64, torch.int32])))
    return [query, blocks[..., :width], block_table, num_tokens, value_dim], options


def _place(part, device):
    """Tensors, in tuples too, on `device`, with the strides they have."""
    if isinstance(part, Attended):
        return Attended(part.output.to(device), part.log_total.to(device))
    if isinstance(part, tuple):
        return type(part)(*(_place(item, device) for item in part))
    return part.to(device) if isinstance(part, torch.Tensor) else part


def _read(arguments, options, backend):
    """Output and logarithm of the sum, on the CPU."""
    device = BACKENDS[backend]
    options = {name: _place(part, device) for name, part in options.items()}
    seen = dispatch.attend_blocks(*(_place(part, device) for part in arguments), **options, backend=backend)
    assert seen.log_total.dtype == torch.float32
    return seen.output.cpu(), seen.log_total.cpu()


def _by_hand(arguments, options):
    """The same in float64: token by token, keys turned by matrices, one softmax."""
    query, blocks, block_table, num_tokens, value_dim = arguments
    batch, heads, queries, head_dim = query.shape
    lengths, fusion, rotation, before = (options.get(name) for name in ("lengths", "fusion", "rotation", "before"))
    key_states = torch.zeros(batch, heads, num_tokens, head_dim, dtype=torch.float64)
    value_states = torch.zeros(batch, heads, num_tokens, value_dim, dtype=torch.float64)
    scores = torch.zeros(batch, heads, queries, num_tokens, dtype=torch.float64)
    scores += options.get("mask", torch.zeros(1))
    for row in range(batch):
        for token in range(num_tokens):
            if lengths is not None and token >= lengths[row]:
                scores[row, :, :, token] = -torch.inf
                continue
            slot = int(block_table[row, token // blocks.shape[1]])
            number = blocks[slot if fusion is None else int(fusion.leader[slot]), token % blocks.shape[1]].double()
            parts = [number[: heads * head_dim], number[heads * head_dim :]]
            if fusion is not None:
                mean = fusion.mean[row % len(fusion.mean)].double()
                means = mean[: heads * head_dim], mean[heads * head_dim :]
                factors = fusion.scale[slot].double()
                parts = [a * part + (1 - a) * mean for a, part, mean in zip(factors, parts, means, strict=True)]
            key = parts[0].view(heads, head_dim)
            key_states[row, :, token] = key if rotation is None else key @ _turn(rotation, row, token, head_dim).T
            value_states[row, :, token] = parts[1].view(heads, value_dim)
    scores += options["scale"] * query.double() @ key_states.mT
    if before is not None:
        # one more token, with the score and the value of all before
        scores = torch.cat([scores, before.log_total.double()], dim=-1)
    log_total = scores.logsumexp(-1, keepdim=True)
    weights = (scores - log_total).exp().nan_to_num(0.0)
    output = weights[..., :num_tokens] @ value_states
    return output if before is None else output + weights[..., num_tokens:] * before.output.double(), log_total


def _turn(rotation, row, token, head_dim):
    """The matrix that turns a key of a token."""
    matrix, pairs = torch.eye(head_dim, dtype=torch.float64), rotation.cos.shape[-1]
    position = token if rotation.positions is None else int(rotation.positions[row, token])
    cos, sin = (part[row % len(part), position].double() for part in rotation[:2])
    for pair in range(pairs):
        i, j = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + pairs)
        matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos[pair], -sin[pair], sin[pair], cos[pair]
    return matrix


def _check(found, expected, bound):
    """Within `bound` of numbers, and of the logarithms of sums where they are larger than 1."""
    for x, y in zip(found, expected, strict=True):
        finite = y[y.isfinite()]
        most = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=bound * most)


@contextmanager
def _spans_of(tokens):
    """The fewest tokens of a program, and memory that held anything."""
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(import_module("deltakv_hf.kernels.triton_ops.attend_blocks"), "SPAN", tokens)
        yield


@given(readings(most_tokens=40, widths=(1, 2, 7, 16)))
@settings(max_examples=40)
def test_the_reference_is_attention_written_out(reading):
    arguments, options = reading
    _check(_read(arguments, options, "reference"), _by_hand(arguments, options), 1e-5)


@given(readings(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from([32, 64, 512]))
@settings(max_examples=70)
def test_the_kernel_is_the_reference(reading, dtype, span):
    """In one span and in several, which may be behind a row's last token; in 16 bits but for rounding."""
    (query, blocks, *table), options = reading
    arguments = [query.to(dtype), blocks.to(dtype), *table]
    expected = _read(arguments, options, "reference")
    with _spans_of(span):
        found = _read(arguments, options | {"dtype": dtype}, "triton")
    assert found[0].dtype == dtype
    _check(found, expected, {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@given(readings(most_tokens=100, widths=(2, 16, 40)))
@settings(max_examples=10)
def test_a_factor_of_one_changes_no_bit(backend, reading):
    """Whatever the mean is; on a GPU a kernel that multiplies may sum in another order than one that does not."""
    (query, blocks, block_table, *sizes), options = reading
    options.pop("fusion", None)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(blocks.shape, generator=generator).half()
    places = torch.randint(0, len(blocks), (block_table.max() + 1,), generator=generator)
    seen = []
    for mean in (torch.zeros(1, blocks.shape[-1]), 1e3 * torch.randn(1, blocks.shape[-1], generator=generator)):
        fusion = Fusion(places.int(), torch.ones(len(places), 2), mean)
        seen.append(_read([query, blocks, block_table, *sizes], options | {"fusion": fusion}, backend))
    assert all(torch.equal(x, y) for x, y in zip(*seen, strict=True))
    expected = _read([query, blocks, places[block_table], *sizes], options, backend)
    _check(seen[0], expected, 0 if BACKENDS[backend] == "cpu" else 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing(backend):
    """Because all is masked, or because its row has no tokens: zeros, or what it saw before."""
    arguments = [torch.randn(2, 2, 3, 16), torch.randn(5, 8, 64), torch.randint(0, 5, (2, 6)), 45, 16]
    mask = torch.zeros(2, 1, 3, 45)
    mask[0, :, 1] = -torch.inf
    options = {"mask": mask, "lengths": torch.tensor([45, 0], dtype=torch.int32), "scale": 0.25}
    blind = torch.tensor([[False, True, False], [True] * 3])[:, None].expand(-1, 2, -1)
    with _spans_of(32):
        output, log_total = _read(arguments, options, backend)
    assert (output[blind] == 0).all() and log_total[blind].isneginf().all() and log_total[~blind].isfinite().all()
    before = Attended(torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 1))
    output, log_total = _read(arguments, options | {"before": before}, backend)
    torch.testing.assert_close(output[blind], before.output[blind])
    torch.testing.assert_close(log_total[blind], before.log_total[blind])


def test_a_row_is_read_alike_in_any_company():
    """By the kernel; on a GPU the same bits."""
    query, blocks, block_table = torch.randn(3, 2, 5, 24), torch.randn(9, 16, 96).half(), torch.randint(0, 9, (3, 12))
    with _spans_of(64):
        together = _read([query, blocks, block_table, 180, 24], {}, "triton")
        alone = _read([query[1:2], blocks, block_table[1:2], 180, 24], {}, "triton")
    bound = 0 if DEVICE == "cuda" else 1e-6
    for x, y in zip(together, alone, strict=True):
        torch.testing.assert_close(x[1:2], y, rtol=bound, atol=bound)


@st.composite
def pools(draw):
    """Blocks, places of some of them twice, a mean and the width of keys."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size, key_width, value_width = draw(st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    blocks = torch.randn(12, size, key_width + value_width, generator=generator).to(dtype)
    count = draw(st.integers(0, 20))
    members, leaders = (torch.randint(0, 12, (count,), generator=generator) for _ in range(2))
    return blocks, members, leaders, torch.randn(key_width + value_width, generator=generator), key_width


@given(pools(), st.sampled_from([16, 1024]))
@settings(max_examples=30)
def test_directions_and_errors_are_those_of_the_reference(pool, columns):
    blocks, members, leaders, mean, key_width = pool
    on_device = [part.to(DEVICE) for part in (blocks, members, leaders, mean)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("block_directions", "compare_blocks"):
            patch.setattr(import_module(f"deltakv_hf.kernels.triton_ops.{name}"), "COLUMNS", columns)
        found = dispatch.block_directions(*on_device[:2], on_device[3], key_width, torch.float32, "triton")
        scales, errors = dispatch.compare_blocks(*on_device, key_width, "triton")
    expected = reference.block_directions(blocks, members, mean, key_width, torch.float32)
    for part, known in zip(found, expected, strict=True):
        torch.testing.assert_close(part.cpu(), known, rtol=1e-4, atol=1e-5)
    for part, known in zip(
        (scales, errors), reference.compare_blocks(blocks, members, leaders, mean, key_width), strict=True
    ):
        torch.testing.assert_close(part.cpu(), known, rtol=1e-4, atol=1e-4)
    # by itself a block is read as it is
    assert (errors.cpu()[members == leaders] < 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_is_the_mean_has_no_direction(backend):
    token = torch.randn(10)
    held = token.expand(3, 4, -1).contiguous(), torch.arange(3), token
    held = [part.to(BACKENDS[backend]) for part in held]
    assert all((part == 0).all() for part in dispatch.block_directions(*held, 6, torch.float32, backend))
