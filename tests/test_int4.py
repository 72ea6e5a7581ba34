"""Keys and values in four bits: what they hold, and attention straight from them."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from helpers import poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakv_hf import InvalidOptionError, dispatch
from deltakv_hf.dispatch import Attended

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def readings(draw):
    """Arguments of `int4_decode` and options: tables, masks, lengths; what is not to be read is NaN."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch, heads, queries, num_blocks = draw(
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 20), st.integers(1, 9))
    )
    head_dim, value_dim = (32 * draw(st.integers(1, 4)) for _ in range(2))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # channels of keys that differ by orders of magnitude, as they do in models
    size = 10.0 ** draw(st.integers(-3, 2))
    keys = random(batch, heads, 32 * num_blocks, head_dim) + 3 * random(heads, 1, head_dim)
    keys = keys * random(heads, 1, head_dim).exp() * size
    values = random(batch, heads, 32 * num_blocks, value_dim) * random(batch, heads, 32 * num_blocks, 1).exp()
    values *= 10.0 ** draw(st.integers(-3, 2))
    query = random(batch, heads, queries, head_dim) * (0.3 / head_dim**0.5 / size)
    encoded = list(dispatch.int4_encode(keys, values))
    options, n = {}, 32 * num_blocks
    if draw(st.booleans()):
        blocks = draw(st.integers(1, 9))
        n = 32 * blocks
        options["block_table"] = torch.randint(0, num_blocks, (batch, blocks), generator=generator).int()
    if draw(st.booleans()):
        shape = (draw(st.sampled_from([1, high])) for high in (batch, heads, queries))
        mask = random(*shape, n)
        options["mask"] = mask.masked_fill(mask > draw(st.sampled_from([-9.0, 1.0])), -torch.inf)
    if draw(st.booleans()):
        lengths = options["lengths"] = torch.randint(0, n + 1, (batch,), generator=generator).int()
        if "block_table" not in options:
            for row, length in enumerate(lengths):
                encoded[1][row, :, -(-length // 32) :] = torch.nan
                encoded[3][row, :, length:] = torch.nan
    return [query, *encoded], options


def _read(arguments, options, backend, device, dtype=torch.float32):
    """What `int4_decode` returns for what `readings` drew, with queries of `dtype`, on the CPU."""
    query, *encoded = (part.to(device) for part in arguments)
    options = {name: part.to(device) for name, part in options.items()}
    seen = dispatch.int4_decode(query.to(dtype), *encoded, **options, backend=backend)
    return Attended(seen.output.cpu(), seen.log_total.cpu())


def _numbers(codes):
    """Of every byte the low bits, then the high ones."""
    return torch.cat([codes & 15, codes >> 4], -1)


def _by_hand(arguments, options, dtype):
    """The same in plain PyTorch of `dtype`: output and logarithm of the sum."""
    query, key_codes, key_levels, value_codes, value_levels = arguments

    key_levels = key_levels.to(dtype).repeat_interleave(32, 2)
    value_levels = value_levels.to(dtype).repeat_interleave(32, 3)
    keys = _numbers(key_codes).to(dtype) * key_levels[..., 0] + key_levels[..., 1]
    values = _numbers(value_codes).mT.flatten(2, 3).to(dtype) * value_levels[..., 0] + value_levels[..., 1]
    if "block_table" in options:
        slots = (options["block_table"][..., None] * 32 + torch.arange(32)).flatten(1).long()
        keys, values = (torch.stack([p[:, s] for p, s in zip(part, slots, strict=True)]) for part in (keys, values))
    lengths = options.get("lengths", torch.full((len(query),), keys.shape[2]))
    is_behind = (torch.arange(keys.shape[2]) >= lengths[:, None])[:, None, None]
    keys, values = (part.masked_fill(is_behind.mT, 0) for part in (keys, values))
    scores = query.to(dtype) @ keys.mT + options.get("mask", torch.zeros(1)).to(dtype)
    scores = scores.masked_fill(is_behind, -torch.inf)
    return (scores.softmax(-1) @ values).nan_to_num(0.0), scores.logsumexp(-1, keepdim=True)


def _check(seen, exact, bounds):
    """Output and sum within bounds of the exact ones; zero for queries that may see nothing."""
    for x, y, bound in zip((seen.output, seen.log_total), exact, bounds, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=bound)


def _most(x):
    finite = x[x.isfinite()]
    return max(1e-30, finite.abs().max().item()) if finite.numel() else 1.0


@pytest.mark.parametrize("backend", ["triton", "reference"])
@given(readings(), st.sampled_from([1, 5, 132]))
@settings(max_examples=8)
def test_attention_in_float32_is_that_of_float64(backend, reading, processors):
    """But for 1e-5 of the largest number, with few splits and many, in memory that held anything."""
    exact = _by_hand(*reading, torch.float64)
    with _poisoned(processors):
        seen = _read(*reading, backend, DEVICE)
    _check(seen, exact, (1e-5 * _most(exact[0]), 1e-5 * max(1.0, _most(exact[1]))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@given(readings(), st.sampled_from([1, 5, 132]))
@settings(max_examples=8)
def test_attention_in_16_bits_errs_no_more_than_pytorch(dtype, reading, processors):
    """Than twice what PyTorch errs in the same dtype."""
    (query, *encoded), options = reading
    arguments = [query.to(dtype).float(), *encoded]
    exact, plain = (_by_hand(arguments, options, kind) for kind in (torch.float64, dtype))
    # of few numbers PyTorch may be right by accident: no less than a unit of float16
    units = _most(exact[0]), max(1.0, _most(exact[1]))
    bounds = [
        max(2 * _most((x - y).nan_to_num(0.0)), 2**-10 * unit) for x, y, unit in zip(plain, exact, units, strict=True)
    ]
    with _poisoned(processors):
        seen = _read(arguments, options, "triton", DEVICE, dtype)
    _check(seen, exact, bounds)


@contextmanager
def _poisoned(processors):
    """The number of processors, which decides the splits, and memory that held anything."""
    module = import_module("deltakv_hf.kernels.triton_ops.int4_decode")
    with pytest.MonkeyPatch.context() as patch, poisoned_memory():
        patch.setattr(module, "_processors", lambda device: processors)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_within_half_a_step(dtype):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 64, width, generator=generator).mul(9).to(dtype) for width in (96, 32))
    key_codes, key_levels, value_codes, value_levels = dispatch.int4_encode(keys, values)
    assert key_codes.shape == (2, 3, 64, 48) and key_levels.shape == (2, 3, 2, 96, 2)
    assert value_codes.shape == (2, 3, 2, 32, 16) and value_levels.shape == (2, 3, 64, 1, 2)
    assert {key_codes.dtype, value_codes.dtype} == {torch.uint8}
    assert {key_levels.dtype, value_levels.dtype} == {torch.float16}
    key_levels, value_levels = (
        key_levels.float().repeat_interleave(32, 2),
        value_levels.float().repeat_interleave(32, 3),
    )
    for x, codes, (scale, low) in (
        (keys, _numbers(key_codes), key_levels.unbind(-1)),
        (values, _numbers(value_codes).mT.flatten(2, 3), value_levels.unbind(-1)),
    ):
        error = codes * scale + low - x.float()
        # levels are rounded to float16, the largest by 15 steps and a minimum
        assert (error.abs() <= scale * 0.5 + (15 * scale + low.abs()) * 2**-10).all()


def test_numbers_beyond_float16_products_are_read():
    """Scales that no query could be multiplied by in float16, and ones that are lost there."""
    generator = torch.Generator().manual_seed(0)
    for size in (2e4, 1e-4):
        keys, values = (torch.rand(1, 2, 64, 64, generator=generator) * size for _ in range(2))
        query = (torch.randn(1, 2, 3, 64, generator=generator) * 4 / size / 8).half().float()
        arguments = [query, *dispatch.int4_encode(keys, values)]
        exact = _by_hand(arguments, {}, torch.float64)
        seen = _read(arguments, {}, "triton", DEVICE, torch.float16)
        _check(seen, exact, (2e-3 * _most(exact[0]), 5e-3))


def test_a_preallocated_cache_is_read_without_a_copy():
    keys, values = torch.randn(2, 2, 96, 32), torch.randn(2, 2, 96, 64)
    encoded, query = dispatch.int4_encode(keys, values), torch.randn(2, 2, 1, 32)
    part = [encoded[0][:, :, :64], encoded[1][:, :, :2], encoded[2][:, :, :2], encoded[3][:, :, :64]]
    expected = dispatch.int4_decode(query, *(x.contiguous() for x in part), backend="reference").output
    seen = dispatch.int4_decode(*(x.to(DEVICE) for x in (query, *part)), backend="triton").output
    torch.testing.assert_close(seen.cpu(), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_cut_into_groups_is_refused():
    x = torch.zeros(1, 1, 32, 32)
    for keys, values, message in (
        (x[:, :, :31], x[:, :, :31], "tokens .* got 31"),
        (x[..., :16], x, "channels of keys .* got 16"),
        (x, x[..., :8], "channels of values .* got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            dispatch.int4_encode(keys, values)
    with pytest.raises(InvalidOptionError, match="backend"):
        dispatch.int4_decode(x, *dispatch.int4_encode(x, x), backend="cuda")
