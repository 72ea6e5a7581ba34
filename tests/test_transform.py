"""Calibrated compressors: codes, stores, chunks, crops, devices' promises."""

import copy

import pytest
import torch
from compressors import TIGHT_WINDOW, append, decode, random_codebook, random_compressor, random_transform
from deltakv_hf.kernels.reference import grid_limit, unrotate, vector_dequantize, vector_quantize
from helpers import prompt
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import CacheStateError, CompressorError, DeltaKVCache, InvalidOptionError, KVCompressor
from deltakv_hf.compressor import TransformCompressor, project
from deltakv_hf.compressor.folder import read_folder, write_folder
from deltakv_hf.compressor.transform_tensors import read_transform
from deltakv_hf.memory import held_bytes
from deltakv_hf.references import Lattice, check_num_references


def compressor(stride=4, splits=1, widths=(16, 16)):
    return TransformCompressor(read_transform(*random_transform(*widths, stride, splits), 0, "a test"))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@given(st.integers(1, 96), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_search_finds_the_nearest_vector_and_the_first_of_equals(size, groups, count, seed):
    generator = torch.Generator().manual_seed(seed)
    limit = grid_limit(size)
    table = torch.randint(-limit, limit + 1, (groups, 256, size), generator=generator).float()
    table[:, 200:] = table[:, :56]
    step = torch.rand(groups, generator=generator) + 0.1
    x = torch.randn(1, count, groups * size + 3, generator=generator) * step.max() * limit / 2
    codes = vector_quantize(x, [1], [table], [step])
    grid = (x[..., 1 : 1 + groups * size].unflatten(-1, (groups, size)) / step[:, None]).round()
    exact = (grid.clamp(-limit, limit).double()[..., None, :] - table.double()).square().sum(-1)
    assert torch.equal(codes.long(), exact.argmin(-1))
    assert codes.numel() == 0 or codes.max() < 200
    scale = torch.nn.functional.pad(step.repeat_interleave(size), (1, 2))
    back = vector_dequantize(codes, [1], [table], scale)
    assert back[..., 0].eq(0).all() and back[..., 1 + groups * size :].eq(0).all()
    picked = (table * step[:, None, None]).gather(1, codes[0].T.long().unsqueeze(-1).expand(-1, -1, size))
    assert torch.equal(back[0, :, 1 : 1 + groups * size], picked.transpose(0, 1).flatten(1))


@given(st.integers(1, 60), st.lists(st.integers(1, 60)), st.sampled_from([1, 4, 7]), st.sampled_from([1, 2]))
def test_codes_do_not_depend_on_how_tokens_came(count, edges, stride, splits):
    coder = compressor(stride, splits)
    tokens = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(count))
    whole = append(coder, tokens, [])
    assert equal(whole, append(coder, tokens, sorted({edge for edge in edges if edge < count})))
    alone = append(coder, tokens[1:], [])
    assert equal(whole.map(lambda part: part[1:]), alone)
    assert all(part.shape == other.shape for part, other in zip(
        vars(whole).values(), vars(coder.empty(2, torch.device("meta"), count)).values(), strict=True
    ))  # fmt: skip


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 4]))
def test_a_cut_store_is_that_of_the_first_tokens(count, kept, stride):
    coder, kept = compressor(stride), min(kept, count)
    tokens = torch.randn(1, count, 32, generator=torch.Generator().manual_seed(count))
    assert equal(coder.cut(append(coder, tokens, []), kept), append(coder, tokens[:, :kept], []))


@given(st.integers(1, 40), st.integers(0, 39), st.sampled_from([1, 4]))
def test_any_range_reads_back_the_same(count, start, stride):
    coder, start = compressor(stride), min(start, count - 1)
    tokens = torch.randn(2, count, 32, generator=torch.Generator().manual_seed(count))
    store = append(coder, tokens, [])
    everything, part = decode(coder, store, count), torch.full((2, count - start, 32), torch.nan)
    for piece, pick in coder.decode(store, coder.references(store), start, count):
        pick(part).copy_(piece)
    torch.testing.assert_close(part, everything[:, start:], rtol=1e-5, atol=1e-5)
    scratch = torch.empty(2, 2 * count * 32)
    again = [(x.clone(), pick) for x, pick in coder.decode(store, coder.references(store), 0, count, scratch)]
    out = torch.empty_like(everything)
    for piece, pick in again:
        pick(out).copy_(piece)
    torch.testing.assert_close(out, everything, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_components_are_what_the_basis_says(splits):
    transform = compressor(stride=1, splits=splits).transform
    components = torch.randn(1, 64, transform.basis.shape[0], generator=torch.Generator().manual_seed(0))
    tokens = project(components, transform.mean, transform.decoder())
    torch.testing.assert_close(transform.analyse(tokens), components, rtol=1e-3, atol=4e-3)
    # a split never looks at another's heads
    assert transform.inverse.ne(0).float().mean() <= 1 / splits


@given(st.integers(1, 40), st.sampled_from([torch.float16, torch.bfloat16]), st.integers(0, 2**32 - 1))
def test_components_of_16_bits_are_rounded_by_no_more_than_the_states_were(count, dtype, seed):
    """And those of float32 are not; what a token's are depends on that token alone."""
    coder, generator = compressor(), torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, count, 8, generator=generator).to(dtype) for _ in range(2))
    angle = torch.rand(2, count, 4, generator=generator)
    angles = angle.cos(), angle.sin()
    transform, got = coder.transform, coder.prepare(keys, values, angles)
    exact = coder.prepare(keys.float(), values.float(), angles)
    tokens = unrotate(keys, values, angles)
    assert torch.equal(exact, transform.analyse(tokens))
    moved = ((tokens - transform.mean) * transform.weights).abs() @ transform.inverse.float().abs()
    assert ((got - exact).abs() <= 2**-11 * moved + 1e-6).all()
    alone = coder.prepare(keys[1:, :, -1:], values[1:, :, -1:], tuple(part[1:, -1:] for part in angles))
    assert torch.equal(alone, got[1:, -1:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3-partial"])
def test_a_cache_with_a_compressor_holds_what_it_says(family):
    model = tiny_model(family)
    cache = DeltaKVCache(model, compressor=random_compressor(model), **TIGHT_WINDOW)
    model(prompt(2, 60), past_key_values=cache)
    report = cache.memory_report()
    assert report.compressed_tokens > 0 and report.parts["references"] > 0
    per_token = sum(layer.compressor.bytes_per_token() for layer in cache.own_layers)
    held = report.compressed_share * report.compressed_dense_bytes
    assert held == pytest.approx(per_token * report.compressed_tokens, rel=0.1)
    assert report.compressor_bytes > 0 and report.break_even_tokens > 0
    assert "compressor, shared by all caches" in str(report)


def test_copies_of_a_cache_share_the_compressor():
    model = tiny_model("llama")
    made = random_compressor(model)
    cache = DeltaKVCache(model, compressor=made, **TIGHT_WINDOW)
    model(prompt(1, 60), past_key_values=cache)
    branch = copy.deepcopy(cache)
    assert branch.compressor is made
    assert branch.layers[0].compressor is cache.layers[0].compressor


def test_a_folder_gives_the_compressor_back(tmp_path):
    model = tiny_model("llama")
    made = random_compressor(model)
    made.save_pretrained(tmp_path / "c")
    loaded = KVCompressor.from_pretrained(tmp_path / "c")
    assert loaded.fingerprint == made.fingerprint
    caches = [DeltaKVCache(model, compressor=c, **TIGHT_WINDOW) for c in (made, loaded)]
    caches.append(DeltaKVCache.from_pretrained(tmp_path / "c", model=model, **TIGHT_WINDOW))
    logits = [
        (model(prompt(1, 60), past_key_values=cache), model(prompt(1, 4), past_key_values=cache).logits)[1]
        for cache in caches
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_only_what_is_used_is_held():
    """Regression: a view of the basis kept all of it."""
    tensors, record = random_transform(16, 16, 4)
    record = record | {name: record[name][:5] for name in ("reference_starts", "residual_starts")}
    transform = read_transform(tensors, record, 0, "a test")
    assert transform.basis.shape[0] < 32
    assert held_bytes(transform.tensors()) == sum(part.nbytes for part in transform.tensors())


def test_statistics_are_no_part_of_what_codes_mean():
    made = random_compressor(tiny_model("llama"))
    more = KVCompressor(made.config, made.tensors | {"layers.0.statistics.covariance": torch.eye(32)[None]})
    assert (more.fingerprint, more.nbytes) == (made.fingerprint, made.nbytes)
    assert "layers.0.statistics.covariance" in more.tensors
    assert repr(KVCompressor(made.config | {"model": None}, made.tensors))


def test_tokens_that_are_all_references_have_no_limit():
    """Regression: 65,536 tokens were too many for a compressor without references."""
    check_num_references(Lattice(1), 10**6)
    for lattice in (Lattice(2), Lattice(1, 1e-9)):
        with pytest.raises(CacheStateError, match="65536 references"):
            check_num_references(lattice, 10**6)


def test_a_saved_cache_asks_for_its_compressor(tmp_path):
    model = tiny_model("llama")
    made = random_compressor(model)
    cache = DeltaKVCache(model, compressor=made, **TIGHT_WINDOW)
    model(prompt(1, 60), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", model, compressor=made)
    more = [model(prompt(1, 30, seed=5), past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*more)
    for other in (None, random_compressor(model, stride=3)):
        with pytest.raises(CacheStateError, match="`compressor` must be the one of the saved cache"):
            DeltaKVCache.load(tmp_path / "cache", model, compressor=other)


def test_options_that_a_compressor_fixes_are_refused():
    model = tiny_model("llama")
    made = random_compressor(model)
    assert DeltaKVCache(model, compressor=made).options.recent_window == 64
    for name in ("nbits", "reference_stride", "top_k"):
        with pytest.raises(InvalidOptionError, match=f"`{name}` must be left out with a compressor"):
            DeltaKVCache(model, compressor=made, **{name: 4})
    with pytest.raises(InvalidOptionError, match="KVCompressor.from_pretrained"):
        DeltaKVCache(model, compressor="org/name")


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(CompressorError, match="num_key_value_heads"):
        DeltaKVCache(tiny_model("llama-mha"), compressor=random_compressor(tiny_model("llama")))


def broken(change):
    """What a folder's config and tensors become by `change(config, tensors)`."""
    made = random_compressor(tiny_model("llama"))
    config, tensors = copy.deepcopy(made.config), dict(made.tensors)
    change(config, tensors)
    return config, tensors


def replace_tensor(name, change):
    return lambda config, tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "change",
    [
        lambda config, tensors: tensors.pop("layers.0.mean"),
        lambda config, tensors: config["layers"][0].pop("widths"),
        lambda config, tensors: config["layers"][0].update(widths=[16, "x"]),
        lambda config, tensors: config["layers"][0].update(reference_stride=0),
        lambda config, tensors: config["layers"][0].update(reference_starts=[0, 0]),
        lambda config, tensors: config["layers"][0].update(reference_starts=[-1]),
        lambda config, tensors: config["layers"][0].update(reference_starts=[], residual_starts=[]),
        lambda config, tensors: config["layers"][0]["reference_starts"].reverse(),
        lambda config, tensors: config["layers"][1].update(residual_starts=[0]),
        replace_tensor("layers.0.mean", lambda t: t[:-1]),
        replace_tensor("layers.0.mean", lambda t: t * torch.nan),
        replace_tensor("layers.0.basis", lambda t: t * 0),
        replace_tensor("layers.0.basis", lambda t: t[:, :-1]),
        replace_tensor("layers.0.basis", lambda t: t.float()),
        replace_tensor("layers.0.reference.0.table", lambda t: t * 0 + torch.iinfo(t.dtype).max),
        replace_tensor("layers.0.reference.0.table", lambda t: t[:, :-1]),
        replace_tensor("layers.0.reference.0.table", lambda t: t[:, :, :0]),
        replace_tensor("layers.0.reference.0.step", lambda t: -t),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, tmp_path):
    config, tensors = broken(change)
    write_folder(tmp_path / "c", config, tensors)
    with pytest.raises(CompressorError, match="download it again or make it again"):
        KVCompressor(*read_folder(tmp_path / "c"))


def test_codebooks_round_to_their_grids():
    book = random_codebook(40, [1, 2, 3, 4, 30], 3.0, torch.Generator().manual_seed(0))
    for table, size in zip(book.tables, book.sizes, strict=True):
        assert table.abs().max() == grid_limit(size)
        assert table.dtype == (torch.int8 if grid_limit(size) <= 127 else torch.int16)
