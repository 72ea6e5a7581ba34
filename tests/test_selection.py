"""Decode steps that read only the compressed tokens that their beginnings speak for."""

import copy
import os

import pytest
import torch
from compressors import TIGHT_WINDOW, learned_compressor, random_compressor
from families import BY_NAME
from helpers import greedy, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import DeltaKVCache, InvalidOptionError, dispatch, reading
from deltakv_hf.code_reading import CodeReader
from deltakv_hf.config import DeltaKVConfig
from deltakv_hf.dispatch import Attended
from deltakv_hf.evaluation.prefill import feed_behind
from deltakv_hf.selection import Choice, Selector

CHOOSING = TIGHT_WINDOW | {"selection": "coarse_to_fine", "keep": 5, "index_bytes": 3}


def make(model, **options) -> DeltaKVCache:
    return DeltaKVCache(model, compressor=random_compressor(model), **(CHOOSING | options))


def inputs_of(padded: bool) -> dict:
    return left_padded([48, 31]) if padded else {"input_ids": prompt(2)}


@torch.no_grad()
def after(model, inputs, **options) -> DeltaKVCache:
    cache = make(model, **options)
    model(**inputs, past_key_values=cache)
    return cache


@torch.no_grad()
def step(model, inputs, cache, length: int = 1, seed: int = 7) -> torch.Tensor:
    """Logits of some more tokens."""
    batch = len(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    more = cache.get_seq_length() + length - inputs["input_ids"].shape[1]
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, more), value=1)
    return model(prompt(batch, length, seed), past_key_values=cache, attention_mask=mask).logits


def reader_of(cache: DeltaKVCache, layer_idx: int):
    layer = cache.layers[layer_idx]
    return layer._reader(layer.state, cache._ledger.layout)._codes(1.0, fuses=False)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama-mqa", "phi3-partial", "cohere", "gpt2"])
def test_a_list_is_read_as_if_all_else_were_masked(family, padded):
    """In a layer with references and in one without, tokens in any order of kinds, none of a kind too."""
    model = BY_NAME[family].model()
    cache = after(model, inputs_of(padded))
    generator = torch.Generator().manual_seed(0)
    for layer_idx, layer in enumerate(cache.layers):
        codes, (_, heads, _, head_dim) = reader_of(cache, layer_idx), layer.state.tail_keys.shape
        compressed = codes.layout.compressed
        query = torch.randn(2, heads, 3, head_dim, generator=generator)
        seen = torch.zeros(2, 1, 1, compressed)
        raw = dispatch.attend(query, [(layer.state.tail_keys, layer.state.tail_values)])
        view = codes.layout.view(codes.device)
        if view is not None:
            span = slice(codes.num_sink_tokens, codes.num_sink_tokens + compressed)
            seen.masked_fill_(view.unused[:, None, None, span], -torch.inf)
        for slots in (torch.tensor([[0, 2, 4, 5], [1, 3, 4, 7]]), torch.tensor([[0], [4]]), torch.tensor([[1], [2]])):
            mask = torch.full_like(seen, -torch.inf).scatter(-1, slots[:, None, None], 0.0) + seen
            got, expected = codes.attend(query, seen, raw, slots), codes.attend(query, mask, raw)
            torch.testing.assert_close(got.output, expected.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_idx", [0, 1], ids=["references", "no references"])
def test_scores_by_all_bytes_are_those_of_attention(layer_idx):
    """And by fewer bytes those of keys whose other components are zero."""
    model = tiny_model("llama")
    cache = after(model, inputs_of(False))
    codes, layer = reader_of(cache, layer_idx), cache.layers[layer_idx]
    num_sinks, compressed = layer.state.sink_keys.shape[2], codes.layout.compressed
    batch, heads, _, head_dim = layer.state.tail_keys.shape
    query = torch.randn(batch, heads, 3, head_dim, generator=torch.Generator().manual_seed(0))
    exact = query @ layer.dequantize()[0][:, :, num_sinks : num_sinks + compressed].mT
    # tables are in float16
    bound = 1e-3 * exact.abs().max().item()
    torch.testing.assert_close(codes.score(query, None, 999), exact, rtol=0, atol=bound)
    coder, store = layer.compressor, layer.state.store
    transform, references = coder.transform, coder.references(store)
    components = torch.zeros(batch, compressed, len(transform.basis))
    for piece, pick in coder.components(store, references, 0, compressed):
        pick(components).copy_(piece)
    angles = codes.tables.rows(slice(None), num_sinks, num_sinks + compressed)
    for size in (1, 4):
        count = (transform.residual_codebook if layer_idx == 0 else transform.reference_codebook).components_in(size)
        assert 0 < count <= 3 * size
        leading = components.clone()
        leading[..., count:] = 0
        keys = (leading @ references[1] + transform.mean)[..., : heads * head_dim].unflatten(-1, (heads, -1))
        rotated = torch.empty_like(keys)
        codes.form.apply(keys, *(table.unsqueeze(-2) for table in angles), rotated)
        expected = query @ rotated.permute(0, 2, 3, 1)
        torch.testing.assert_close(codes.score(query, None, size), expected, rtol=0, atol=bound)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30)),
    seed=st.integers(0, 99),
    blind=st.booleans(),
)
@settings(max_examples=30)
def test_what_is_chosen_has_the_largest_weight_of_any_head(sizes, seed, blind):
    batch, heads, queries, n = sizes
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(sizes, generator=generator)
    if blind:
        # a row of padding, a head that may see nothing at all, and a token that nobody may see
        scores[0] = -torch.inf
        scores[..., n // 2] = -torch.inf
    log_total = torch.randn(batch, heads, queries, 1, generator=generator)
    if blind:
        log_total.fill_(-torch.inf)
    everything = torch.cat([scores, log_total], -1).softmax(-1).nan_to_num(0.0)
    weights = everything[..., :n].amax((1, 2))
    for budget in {1, n // 2 + 1, n}:
        slots = dispatch.choose(scores.clone(), log_total, budget).long()
        assert slots.shape == (batch, budget)
        assert all(len(set(row)) == budget and row == sorted(row) for row in slots.tolist())
        least, others = weights.gather(1, slots).amin(1), weights.scatter(1, slots, -1.0).amax(1)
        assert (least >= others * (1 - 1.1 / 1024) - 1e-6).all()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("options", [{"keep": 999}, {"keep": 1.0}, {"index_bytes": 999}], ids=str)
def test_a_budget_that_all_fit_into_and_short_codes_read_all(options, padded):
    """And so does a call of several tokens, whatever the budget."""
    model, inputs = tiny_model("llama"), inputs_of(padded)
    model.set_attn_implementation("deltakv")
    every = DeltaKVCache(model, compressor=random_compressor(model), **TIGHT_WINDOW)
    with torch.no_grad():
        model(**inputs, past_key_values=every)
    expected = step(model, inputs, every)
    cache = after(model, inputs, **options)
    torch.testing.assert_close(step(model, inputs, cache), expected, rtol=0, atol=0)
    assert cache.stats().selection.layer_steps == 0
    expected = step(model, inputs, every, 2)
    cache = after(model, inputs)
    step(model, inputs, cache)
    assert cache.stats().selection.layer_steps == 2
    fresh = after(model, inputs)
    step(model, inputs, fresh, 2)
    assert fresh.stats().selection.layer_steps == 0


def test_rows_choose_as_if_alone():
    model, inputs = tiny_model("llama"), left_padded([48, 31])
    model.set_attn_implementation("deltakv")
    together = after(model, inputs)
    both = torch.cat([step(model, inputs, together, seed=seed) for seed in range(3)], 1)
    for row, length in enumerate([48, 31]):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, -length:]}
        cache = make(model)
        with torch.no_grad():
            model(**alone, past_key_values=cache)
            tokens = [prompt(2, 1, seed)[row : row + 1] for seed in range(3)]
            single = torch.cat([model(token, past_key_values=cache).logits for token in tokens], 1)
        torch.testing.assert_close(both[row : row + 1], single, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_layers_in_a_row_share_a_choice(padded, monkeypatch):
    """The first of them scores; each step anew, also after a step was taken back."""
    model, inputs = tiny_model("llama-4-layers"), inputs_of(padded)
    model.set_attn_implementation("deltakv")
    scored, read = [], []
    score, attend = CodeReader.score, CodeReader.attend

    def watched(self, query, mask, raw, slots=None):
        read.append(slots)
        return attend(self, query, mask, raw, slots)

    monkeypatch.setattr(CodeReader, "score", lambda self, *args: scored.append(1) or score(self, *args))
    monkeypatch.setattr(CodeReader, "attend", watched)
    cache = after(model, inputs, layers_per_choice=3)
    first = step(model, inputs, cache)
    assert len(scored) == 2 and len(read) == 4
    assert read[0] is read[1] is read[2] and read[3] is not read[2]
    step(model, inputs, cache, seed=8)
    assert len(scored) == 4 and read[4] is not read[0]
    cache.crop(-2)
    torch.testing.assert_close(step(model, inputs, cache), first, rtol=1e-4, atol=1e-4)
    assert len(scored) == 6 and cache.stats().selection.layer_steps == 12


def test_layers_may_have_budgets_of_their_own():
    model, inputs = tiny_model("llama"), inputs_of(False)
    model.set_attn_implementation("deltakv")
    cache = after(model, inputs, keep=[3, 0.5])
    compressed = cache._ledger.layout.compressed
    step(model, inputs, cache)
    assert [layer.selector.tokens_read for layer in cache.layers] == [2 * 3, 2 * (compressed // 2)]


def test_selection_goes_on_after_batch_operations_and_crops():
    model, inputs = tiny_model("llama"), {"input_ids": prompt(2, 60)}
    model.set_attn_implementation("deltakv")
    cache = after(model, inputs)
    once = step(model, inputs, cache)
    cache.crop(-1)
    torch.testing.assert_close(step(model, inputs, cache), once, rtol=1e-4, atol=1e-4)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(prompt(2, 1, 7).flip(0), past_key_values=cache).logits
    torch.testing.assert_close(swapped.flip(0), once, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_generate_chooses(options):
    model = tiny_model("llama")
    cache = make(model)
    out = greedy(model, left_padded([48, 31]), cache, **options)
    assert out is not None and cache.stats().selection.layer_steps > 10


@torch.no_grad()
def test_it_is_measured_in_steps():
    model = tiny_model("llama")
    model.set_attn_implementation("deltakv")
    inputs, ids = {"input_ids": prompt(1)}, prompt(1, 5, 3)[0]
    cache, other = after(model, inputs), after(model, inputs)
    logits = feed_behind(model, ids, cache, 3)
    expected = [model(token[None, None], past_key_values=other).logits[0] for token in ids]
    assert torch.equal(logits, torch.cat(expected[-3:]))
    assert cache.stats().selection.layer_steps == 10
    every = DeltaKVCache.from_dynamic(cache.to_dynamic_cache(), model)
    assert feed_behind(model, ids, every, 5).shape == (5, logits.shape[1]) and every.stats().forwards == 2


def test_stats_tell_what_was_read_and_missed():
    model, inputs = tiny_model("llama"), inputs_of(False)
    model.set_attn_implementation("deltakv")
    cache = after(model, inputs, sample_every=2)
    compressed = cache.memory_report().compressed_tokens
    for seed in range(4):
        step(model, inputs, cache, seed=seed)
    found = cache.stats().selection
    assert found.layer_steps == 8 and found.tokens_read == 8 * 2 * 5 and found.tokens_held >= 8 * compressed
    assert [len(layer.selector.recalls) for layer in cache.layers] == [2, 2]
    assert 0.1 < found.recall < 1
    # a copy counts for itself, a reset begins anew
    other = copy.deepcopy(cache)
    step(model, inputs, other)
    assert cache.stats().selection == found != other.stats().selection
    other.reset()
    assert other.stats().selection.layer_steps == 0 and other.stats().selection.recall is None
    assert after(model, inputs).stats().selection.recall is None
    assert DeltaKVCache(model).stats().selection is None


def test_recall_is_the_share_of_attention():
    """Of a head that looks only at what is read all, of one that looks elsewhere nothing."""
    scores = torch.full((1, 2, 1, 4), -30.0)
    scores[0, 0, 0, 1] = scores[0, 1, 0, 2] = 30.0
    raw = Attended(torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), -torch.inf))

    class Codes:
        backend = None

        class layout:
            compressed = 4

        class state:
            columns = 5

        @staticmethod
        def score(query, mask, num_bytes):
            return torch.where(torch.arange(4) == 1, scores, scores - 60)

        @staticmethod
        def attend(query, mask, raw, slots=None):
            part = scores if slots is None else scores[..., slots[0]]
            return dispatch.weigh(part.clone(), torch.zeros(1, part.shape[-1], 1), None)

    options = DeltaKVConfig(selection="coarse_to_fine", keep=1, sample_every=1)
    selector = Selector(options, 1, Choice())
    selector.attend(Codes, torch.zeros(1, 2, 1, 1), None, raw)
    assert selector.recalls == [pytest.approx(0.5)]


def test_options_are_saved(tmp_path):
    model, inputs = tiny_model("llama"), inputs_of(False)
    cache = after(model, inputs)
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor)
    assert loaded.options == cache.options
    torch.testing.assert_close(step(model, inputs, loaded), step(model, inputs, cache), rtol=0, atol=0)


def test_the_kernels_choose_and_read_the_same(monkeypatch):
    """What a GPU does for a model in 16 bits, here in Triton's interpreter."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are on the GPU, these models are not: see test_gpu.py")
    model, inputs = tiny_model("llama"), left_padded([48, 31])
    model.set_attn_implementation("deltakv")
    expected = step(model, inputs, after(model, inputs))
    cache = after(model, inputs)
    monkeypatch.setattr(dispatch, "has_kernels", lambda device: True)
    monkeypatch.setattr(reading, "HALVES", (torch.float32,))
    got = step(model, inputs, cache)
    assert cache.stats().selection.layer_steps == 2
    assert (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "top"}, "`selection` must be one of all, coarse_to_fine, filter_layers, got 'top'"),
        ({"keep": 0}, "`keep` must be a number of tokens .* got 0"),
        ({"keep": 1.5}, "`keep` .* got 1.5"),
        ({"keep": True}, "`keep` .* got True"),
        ({"keep": (5, 0)}, "`keep` .* got 0"),
        ({"keep": (5, 5, 5)}, "`keep` must be one number, or one for each of the 2 compressed layers, got 3"),
        ({"index_bytes": 0}, "`index_bytes` must be an integer >= 1, got 0"),
        ({"layers_per_choice": 0}, "`layers_per_choice` must be an integer >= 1, got 0"),
        ({"sample_every": -1}, "`sample_every` must be an integer >= 0, got -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        make(tiny_model("llama"), **options)


@pytest.mark.parametrize("compressor", [None, learned_compressor], ids=["none", "learned"])
def test_tokens_without_leading_components_are_refused(compressor):
    model = tiny_model("llama")
    compressor = compressor and compressor(model)
    with pytest.raises(InvalidOptionError, match='`selection` must be "all" without a calibrated compressor'):
        DeltaKVCache(model, compressor=compressor, selection="coarse_to_fine")
