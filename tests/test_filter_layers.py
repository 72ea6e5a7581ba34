"""Filter layers: all tokens in four bits, read whole in each step, chosen from for the layers behind."""

import copy
from itertools import combinations

import pytest
import torch
from compressors import random_compressor
from helpers import greedy, left_padded, poisoned_memory, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from models import new_model, tiny_model

from deltakv_hf import DeltaKVCache, InvalidOptionError, KVCompressor, UnsupportedModelError, dispatch
from deltakv_hf.calibration.select_layers import best_places, kept_attention, select_filter_layers
from deltakv_hf.code_reading import CodeReader
from deltakv_hf.compressor import Int4Compressor, Int4Store
from deltakv_hf.filter_layers import KNOWN, find_filter_layers

FILTERED = dict(recent_window=8, block_size=32, num_sink_tokens=2, selection="filter_layers", keep=9)
LAYERS = 0, 2


def wide_model():
    model = tiny_model("llama-heads-of-32")
    model.set_attn_implementation("deltakv")
    return model


def make(model=None, **options) -> DeltaKVCache:
    model = model or wide_model()
    return DeltaKVCache(model, compressor=random_compressor(model), **(FILTERED | {"filter_layers": LAYERS} | options))


def inputs_of(padded: bool) -> dict:
    return left_padded([140, 93]) if padded else {"input_ids": prompt(2, 140)}


@torch.no_grad()
def after(inputs, **options) -> DeltaKVCache:
    cache = make(**options)
    wide_model()(**inputs, past_key_values=cache)
    return cache


@torch.no_grad()
def step(inputs, cache, length: int = 1, seed: int = 7) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    if mask is not None:
        more = cache.get_seq_length() + length - mask.shape[1]
        mask = torch.nn.functional.pad(mask, (0, more), value=1)
    tokens = prompt(len(inputs["input_ids"]), length, seed)
    return wide_model()(tokens, past_key_values=cache, attention_mask=mask).logits


# -- how tokens are stored ---------------------------------------------------------------------------------------------


def tokens_of(n: int, seed: int, heads: int = 2, key_dim: int = 32, value_dim: int = 64) -> torch.Tensor:
    return torch.randn(3, n, heads * (key_dim + value_dim), generator=torch.Generator().manual_seed(seed))


def filled(coder: Int4Compressor, store: Int4Store, rows, start: int, tokens: torch.Tensor) -> Int4Store:
    """`store` with tokens `start ..` of `tokens` `[rows, n, width]`."""
    return coder.append(store, rows, start, tokens.shape[1], lambda a, b: tokens[:, a:b])


def decoded(coder: Int4Compressor, store: Int4Store, start: int, stop: int) -> torch.Tensor:
    ((tokens, pick),) = coder.decode(store, coder.references(store), start, stop)
    assert pick(tokens) is tokens
    return tokens


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from([32, 70, 4096]),
    st.data(),
)
@settings(max_examples=25)
def test_tokens_come_back_within_half_a_step(blocks, seed, tile, data):
    """In whatever pieces they come, read from anywhere; bytes are what they should be."""
    coder = Int4Compressor(2, 32, 64)
    coder.encode_tile = tile
    count = 32 * sum(blocks)
    tokens, store = tokens_of(count, seed), coder.empty(3, torch.device("cpu"))
    place = 0
    for size in blocks:
        store = filled(coder, store, None, place, tokens[:, : place + 32 * size])
        place += 32 * size
    at_once = filled(coder, coder.empty(3, torch.device("cpu")), None, 0, tokens)
    assert all(torch.equal(getattr(store, name), getattr(at_once, name)) for name in store.names())
    assert sum(part.nbytes for part in vars(store).values()) == 3 * count * coder.bytes_per_token()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, count - 1), st.integers(1, count))))
    found = decoded(coder, store, start, max(stop, start + 1))
    exact = tokens[:, start : max(stop, start + 1)]
    # 15 steps from the smallest of 32 normal numbers to the largest, rounded levels
    assert (found - exact).abs().max() < 0.55 * 8 / 15
    keys = exact[..., :64].unflatten(1, (-1, 1))
    assert keys.shape[1] == found.shape[1]
    empty = coder.empty(3, torch.device("meta"), count)
    assert all(getattr(empty, name).shape == getattr(store, name).shape for name in store.names())


@given(st.integers(1, 95), st.integers(0, 99))
@settings(max_examples=25)
def test_a_cut_inside_of_a_block_keeps_its_tokens(count, seed):
    """They read back as before, and almost as before once others stand beside them."""
    coder = Int4Compressor(2, 32, 64)
    tokens = tokens_of(96, seed)
    store = filled(coder, coder.empty(3, torch.device("cpu")), None, 0, tokens)
    cut = coder.cut(store, count)
    before = decoded(coder, store, 0, count)
    assert torch.equal(decoded(coder, cut, 0, count), before)
    others = torch.cat([tokens[:, :count], tokens_of(96, seed + 1)[:, count:]], 1)
    again = filled(coder, cut, None, count, others)
    assert (decoded(coder, again, 0, 96) - others).abs().max() < 2 * 0.55 * 8 / 15
    # the same tokens again: on the levels of before, but for their rounding, which moves a few to the next one
    same = decoded(coder, filled(coder, cut, None, count, tokens), 0, 96)
    assert ((same - decoded(coder, store, 0, 96)).abs() > 0.05).float().mean() < 0.02


def test_rows_are_written_by_themselves():
    coder, tokens = Int4Compressor(2, 32, 64), tokens_of(96, 0)
    store = filled(coder, coder.empty(3, torch.device("cpu")), None, 0, tokens[:, :32])
    store = filled(coder, store, [0, 2], 32, tokens[[0, 2], :96])
    store = filled(coder, store, [1], 32, tokens[[1], :64])
    whole = filled(coder, coder.empty(3, torch.device("cpu")), None, 0, tokens)
    found, expected = decoded(coder, store, 0, 96), decoded(coder, whole, 0, 96)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and torch.equal(found[1, :64], expected[1, :64])


@given(st.integers(1, 5), st.integers(0, 99), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_scores_are_those_of_what_reads_back(num_blocks, seed, has_mask, has_lengths):
    """By the specification and by the kernel, with what is not there at -inf."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, 32 * num_blocks, 32, generator=generator) for _ in range(2))
    query, encoded = torch.randn(2, 2, 3, 32, generator=generator) / 4, dispatch.int4_encode(keys, values)
    expected, n = query @ dispatch.int4_dense(*encoded)[0].mT, keys.shape[2]
    mask = lengths = None
    if has_mask:
        mask = torch.zeros(2, 1, 1, n).masked_fill(torch.rand(2, 1, 1, n, generator=generator) > 0.7, -torch.inf)
        expected = expected + mask
    if has_lengths:
        lengths = torch.randint(0, n + 1, (2,), generator=generator).int()
        expected = expected.masked_fill((torch.arange(n) >= lengths[:, None])[:, None, None], -torch.inf)
    for backend in ("reference", "triton"):
        scores = torch.full((2, 2, 3, n), torch.nan, device=device)
        given = [part if part is None else part.to(device) for part in (query, *encoded, mask, None, lengths)]
        with poisoned_memory():
            dispatch.int4_decode(*given, scores, backend=backend)
        torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-5)


# -- how they are read and chosen from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("length", [1, 3, 60])
def test_four_bits_are_read_as_their_dense_keys(padded, length):
    """With everything kept, in steps and in chunks: another attention gets them dense."""
    inputs = inputs_of(padded)
    cache, other = after(inputs, keep=1.0), after(inputs, keep=1.0)
    found = step(inputs, cache, length)
    wide_model().set_attn_implementation("eager")
    torch.testing.assert_close(found, step_as_it_is(inputs, other, length), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def step_as_it_is(inputs, cache, length: int) -> torch.Tensor:
    model, mask = tiny_model("llama-heads-of-32"), inputs.get("attention_mask")
    mask = mask if mask is None else torch.nn.functional.pad(mask, (0, length), value=1)
    return model(prompt(2, length, 7), past_key_values=cache, attention_mask=mask).logits


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_layers_read_what_the_filter_layer_before_them_has_chosen(padded, monkeypatch):
    """By the softmax weights of its own tokens, the largest of any head."""
    inputs, read, chosen = inputs_of(padded), [], []
    cache, attend, ask = after(inputs), CodeReader.attend, dispatch.int4_decode

    def watched(self, query, mask, raw, slots=None):
        read.append(slots)
        return attend(self, query, mask, raw, slots)

    def watched_decode(query, *args):
        seen, scores, scale = ask(query, *args), args[7], args[9]
        assert scores.isfinite().any()
        keys = dispatch.int4_dense(*args[:4])[0]
        exact = query @ keys.mT * scale + (0 if args[4] is None else args[4])
        chosen.append(exact)
        return seen

    monkeypatch.setattr(CodeReader, "attend", watched)
    monkeypatch.setattr(dispatch, "int4_decode", watched_decode)
    raws = watch_raw(monkeypatch)
    for seed in range(3):
        read.clear(), chosen.clear(), raws.clear()
        step(inputs, cache, seed=seed)
        assert len(read) == len(chosen) == 2
        for place in (0, 1):
            # layers 0 and 2 choose, 1 and 3 read
            expected = dispatch.choose(chosen[place], raws[2 * place].log_total, 9)
            assert torch.equal(read[place], expected)
    stats = cache.stats().selection
    assert stats.layer_steps == 6 and stats.tokens_read == 6 * 2 * 9 and stats.recall is None


def watch_raw(monkeypatch) -> list:
    """What every layer of a step sees in raw tokens."""
    raws, attend = [], dispatch.attend

    def watched(*args):
        raws.append(attend(*args))
        return raws[-1]

    monkeypatch.setattr(dispatch, "attend", watched)
    return raws


def test_filter_layers_side_by_side_choose_nothing():
    cache = make(filter_layers=(0, 1, 3))
    assert [layer.selector is None for layer in cache.layers] == [True, False, False, True]
    assert [isinstance(layer.form, type(None)) for layer in cache.layers] == [True, True, False, True]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_crops_batch_operations_and_new_tokens(padded):
    """A choice is never used in another step than its own."""
    inputs = inputs_of(padded)
    cache = after(inputs)
    once = step(inputs, cache)
    cache.crop(-1)
    step(inputs, cache, seed=9)
    cache.crop(-1)
    torch.testing.assert_close(step(inputs, cache), once, rtol=1e-4, atol=1e-4)
    cache.crop(-1)
    # several tokens read all, then a choice is made anew
    step(inputs, cache, 2)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    flipped = {name: part.flip(0) for name, part in inputs.items()}
    mask = flipped.get("attention_mask")
    mask = mask if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    with torch.no_grad():
        swapped = wide_model()(prompt(2, 1, 7).flip(0), past_key_values=cache, attention_mask=mask).logits
    torch.testing.assert_close(swapped.flip(0), once, rtol=1e-4, atol=1e-4)


@given(st.integers(3, 139), st.booleans())
@settings(max_examples=12)
def test_a_crop_at_any_token_reads_on(keep, padded):
    """Inside of a block too: what stays reads as it did, and the cache grows on."""
    inputs = inputs_of(padded)
    cache = after(inputs)
    before = [layer.dequantize() for layer in cache.layers]
    cache.crop(keep - 140)
    for layer, states in zip(cache.layers, before, strict=True):
        for found, expected in zip(layer.dequantize(), states, strict=True):
            torch.testing.assert_close(found, expected[:, :, :keep], rtol=1e-4, atol=1e-5)
    cut = {name: part[:, :keep] for name, part in inputs.items()}
    for seed in range(2):
        assert step(cut, cache, 40, seed).isfinite().all()
        assert step(cut, cache, 1, seed).isfinite().all()
    assert all(len(part) == 2 for layer in cache.layers for part in vars(layer.state.store).values())


@torch.no_grad()
def test_rows_are_read_as_if_alone():
    """At the same positions, as `generate` gives them: keys are coded as they are rotated."""
    model, inputs, steps = wide_model(), left_padded([140, 93]), 40
    together, mask = make(), torch.nn.functional.pad(inputs["attention_mask"], (0, steps), value=1)
    tokens = torch.cat([inputs["input_ids"], prompt(2, steps, 7)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    spans = [slice(0, 140), *(slice(place, place + 1) for place in range(140, 140 + steps))]

    def fed(cache, rows: slice, first: int, span: slice):
        part = slice(max(span.start, first), span.stop)
        places = {"position_ids": positions[rows, part], "attention_mask": mask[rows, first : span.stop]}
        return model(tokens[rows, part], past_key_values=cache, **places).logits[:, -1]

    both = torch.stack([fed(together, slice(None), 0, span) for span in spans], 1)
    for row, length in enumerate([140, 93]):
        cache = make()
        single = torch.stack([fed(cache, slice(row, row + 1), 140 - length, span) for span in spans], 1)
        torch.testing.assert_close(both[row : row + 1], single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_chooses(options):
    cache = make()
    assert greedy(wide_model(), left_padded([140, 93]), cache, **options) is not None
    assert cache.stats().selection.layer_steps > 10


def test_memory_is_counted_and_caches_are_saved_and_copied(tmp_path):
    inputs = inputs_of(True)
    cache = after(inputs)
    report = cache.memory_report()
    blocks = sum(128 if layer_idx in LAYERS else 0 for layer_idx in range(4))
    token_bytes = cache.layers[0].compressor.bytes_per_token()
    # 32 + 32 numbers of two heads, half a byte each, and 4 bytes of levels for 32 numbers
    assert token_bytes == 2 * (32 + 2 * 4)
    assert report.parts["filter layers"] == 2 * blocks * token_bytes
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", wide_model(), compressor=cache.compressor)
    assert loaded.options == cache.options and loaded.memory_report().parts == report.parts
    other = copy.deepcopy(cache)
    expected = step(inputs, cache)
    for same in (loaded, other):
        torch.testing.assert_close(step(inputs, same), expected, rtol=0, atol=0)
    cache.reset()
    with torch.no_grad():
        wide_model()(**inputs, past_key_values=cache)
    torch.testing.assert_close(step(inputs, cache), expected, rtol=0, atol=0)


# -- which layers ------------------------------------------------------------------------------------------------------


def test_layers_come_from_the_user_the_compressor_or_what_is_known():
    model = wide_model()
    compressor, config = random_compressor(model), model.config
    assert find_filter_layers((0, 3), compressor, config, [0, 1, 2, 3]) == (0, 3)
    compressor.config["filter_layers"] = [0, 1]
    assert find_filter_layers(None, compressor, config, [0, 1, 2, 3]) == (0, 1)
    assert make(filter_layers=(0, 2)).options.filter_layers == (0, 2)
    for (kind, layers, hidden), known in KNOWN.items():
        del compressor.config["filter_layers"]
        same = type(config)(num_hidden_layers=layers, hidden_size=hidden)
        same.model_type = kind
        assert find_filter_layers(None, compressor, same, list(range(layers))) == known
        compressor.config["filter_layers"] = []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_layers": None}, "`filter_layers` must be given: none are known for 'llama' of 4 layers"),
        ({"filter_layers": (1, 2)}, "`filter_layers` must begin with the first compressed layer, 0"),
        ({"filter_layers": (0, 4)}, "`filter_layers` must be compressed layers, got 4; these are 0, 1, 2, 3"),
        ({"filter_layers": (2, 0)}, "`filter_layers` must be numbers of layers, ascending, got"),
        ({"filter_layers": 2}, "`filter_layers` must be numbers of layers, ascending, got 2"),
        ({"filter_layers": ()}, "`filter_layers` must be numbers of layers, ascending"),
        ({"block_size": 48}, "`block_size` must be a multiple of 32"),
        ({"selection": "all"}, "`filter_layers` must be left out unless"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        make(**options)


def test_heads_that_are_no_groups_of_32_are_refused():
    model = tiny_model("llama")
    cache = make(model, filter_layers=(0,))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="a multiple of 32 numbers, got 8 for keys"):
        model(prompt(1, 8), past_key_values=cache)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=50)
def test_the_best_places_are_those_of_all_tries(count, number, seed):
    number = min(count, number)
    overlap = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def gain(places) -> float:
        ends = *places[1:], count
        return sum(overlap[a, a:b].sum().item() for a, b in zip(places, ends, strict=True))

    tries = [(0, *others) for others in combinations(range(1, count), number - 1)]
    assert gain(best_places(overlap, number)) == pytest.approx(max(map(gain, tries)))
    assert len(best_places(overlap, number)) == number and best_places(overlap, number)[0] == 0


def test_attention_is_kept_where_top_tokens_are_shared():
    model = new_model("llama-4-layers", "eager")
    ids = prompt(1, 120)
    found = kept_attention(model, ids, [0, 1, 2, 3], 4)
    with torch.no_grad():
        seen = model(ids, output_attentions=True).attentions
    # 120 - 8 last ones - 64 in a window - 4 sinks = 44 candidates, of which 5 are chosen
    kept = torch.zeros(4, 4, dtype=torch.float64)
    for place in range(112, 120):
        weights = [part[0, :, place, :48] for part in seen]
        tops = [part[:, 4:].amax(0).topk(5).indices + 4 for part in weights]
        kept += torch.tensor(
            [[1 - part[:, 4:].sum(1).mean() + part[:, top].sum(1).mean() for part in weights] for top in tops]
        )
    torch.testing.assert_close(found, (kept / 8).fill_diagonal_(1.0), rtol=0, atol=1e-6)
    assert model.config._attn_implementation == "eager"


def test_a_calibration_chooses_filter_layers():
    """As many as it is told to; they are saved, and caches take them."""
    model = new_model("llama-4-layers")
    ids = torch.randint(1, 64, (16, 200), generator=torch.Generator().manual_seed(0))
    made = KVCompressor.calibrate(model, ids, ratio=3, measured_windows=0, select_layers=2)
    chosen = made.config["filter_layers"]
    assert chosen == select_filter_layers(model, ids[:8], 2) and len(chosen) == 2 and chosen[0] == 0
    assert model.config._attn_implementation == "sdpa" and "filter layers" in made.config["calibration"]["seconds"]
    cache = DeltaKVCache(model, compressor=made, selection="filter_layers")
    assert [idx for idx, layer in enumerate(cache.layers) if layer.form is None] == chosen
    with pytest.raises(InvalidOptionError, match="`select_layers` must be an integer from 1 to 4, got 5"):
        KVCompressor.calibrate(model, ids, ratio=3, select_layers=5)
    with pytest.raises(InvalidOptionError, match="`windows` must hold 84 tokens or more, got 80"):
        select_filter_layers(model, ids[:, :80], 2)
