"""Blocks of a pool that rows share: who holds which, how many there are, and what is given back."""

import pytest
import torch
import torch.nn.functional as F
from compressors import TIGHT_WINDOW, random_compressor
from helpers import TIGHT, left_padded, prompt
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from test_static import COARSE, WAYS, generated, go_on, model_of

from deltakv_hf import CacheStateError, DeltaKVCache, InvalidOptionError, ReleaseFinished
from deltakv_hf.block_table import BlockPool, BlockTable


@given(
    st.integers(1, 4).flatmap(lambda rows: st.lists(st.lists(st.integers(0, 90), min_size=rows, max_size=rows))),
    st.integers(1, 16),
    st.integers(1, 7),
)
def test_every_block_is_of_one_row_or_free(histories, num_blocks, block_size):
    table = BlockTable.empty(len(histories[0]) if histories else 1, num_blocks, block_size)
    for counts in histories:
        before, table = table, table.fitted(counts)
        assert before.fitted(counts) is table
        held = [block for row in table.rows for block in row]
        assert sorted([*held, *table.free]) == list(range(table.num_blocks))
        assert [len(row) for row in table.rows] == [-(-count // block_size) for count in counts]
        # what a row keeps stays where it is
        assert all(new[: len(old)] == old[: len(new)] for new, old in zip(table.rows, before.rows, strict=True))
        assert table.num_blocks in (before.num_blocks, len(held))
        # a single row's tokens stand in order
        assert len(table.rows) > 1 or table.rows[0] == tuple(range(len(held)))
        slots = table.slots(3, torch.device("cpu"))
        for row, blocks in enumerate(table.rows):
            assert slots[row, : 3 * len(blocks)].tolist() == [3 * block + at for block in blocks for at in range(3)]


def test_room_is_of_real_tokens():
    model, lengths = model_of("llama"), [400, 90, 30, 30]
    inputs, sizes = left_padded(lengths), {}
    for name, given_inputs in {"ragged": inputs, "even": {"input_ids": inputs["input_ids"]}}.items():
        cache = DeltaKVCache(model, max_cache_len=480, **WAYS["coarse"](model))
        model(**given_inputs, past_key_values=cache)
        sizes[name] = sum(part.nbytes for part in vars(cache.layers[0].pool).values())
    # 80 more columns for each; a block is not shared
    assert sizes["ragged"] < 0.55 * sizes["even"] and sum(lengths) + 4 * 80 < 0.5 * 4 * 480


def steps(model, cache, mask, count, seed=0):
    return go_on(model, cache, mask, [1] * count, seed)


@pytest.mark.parametrize("lengths", [[48, 40, 31], [48, 48, 48]], ids=["padded", "even"])
@pytest.mark.parametrize("size", [None, 160])
@pytest.mark.parametrize("way", ["coarse", "direct", "filter"])
def test_a_released_row_leaves_the_others_as_they_were(way, size, lengths):
    """In a batch without padding, too, whose steps come without a mask."""
    model = model_of("wide" if way == "filter" else "llama")
    inputs, options = left_padded(lengths), WAYS[way](model) | {"max_cache_len": size}
    mask, said = inputs["attention_mask"], []
    positions, later = (mask.cumsum(-1) - 1).clamp(min=0), F.pad(mask, (0, 3), value=1)
    for releases in (False, True):
        cache = DeltaKVCache(model, **options)
        model(**inputs, position_ids=positions, past_key_values=cache)
        steps(model, cache, mask, 3)
        if releases:
            cache.release_rows(torch.tensor([False, True, False]))
            assert cache._ledger.compressed[1] == 0 and len(cache.dequantize(0)[0][1].nonzero()) == 0
            if size:
                assert len(cache.layers[0].table.rows[1]) == 0 < len(cache.layers[0].table.rows[0])
        said.append(go_on(model, cache, later, [*[1] * 20, 9, 1], 2))
        assert said[-1].isfinite().all()
    torch.testing.assert_close(*(logits[[0, 2]] for logits in said), rtol=0, atol=1e-4)


def test_a_pool_that_is_too_small_says_so_and_goes_on_when_rows_are_released():
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=300, max_pool_tokens=192, **WAYS["coarse"](model))
    mask = torch.ones(2, 80, dtype=torch.int64)
    model(prompt(2, 80), attention_mask=mask, past_key_values=cache)
    shape = cache.layers[0].pool.reference_codes.shape
    with pytest.raises(CacheStateError, match="`max_pool_tokens` must be at least .*got 192: call `cache.resize"):
        for _ in range(100):
            model(prompt(2, 1), past_key_values=cache)
    fed = cache.get_seq_length() - 80
    assert 20 < fed < 99
    cache.release_rows([0])
    steps(model, cache, F.pad(mask, (0, fed), value=1), 40)
    assert cache.layers[0].pool.reference_codes.shape == shape
    cache.resize(300, 64 * 9)
    steps(model, cache, F.pad(mask, (0, fed + 40), value=1), 40)
    with pytest.raises(InvalidOptionError, match="`max_pool_tokens` must be at least"):
        cache.resize(300, 32)
    steps(model, cache, F.pad(mask, (0, fed + 80), value=1), 1)


def test_a_prompt_that_the_pool_has_no_room_for_leaves_an_empty_cache():
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=300, max_pool_tokens=32, **WAYS["all"](model))
    with pytest.raises(CacheStateError, match="`max_pool_tokens` must be at least"):
        model(prompt(2, 80), past_key_values=cache)
    model(prompt(1, 40), past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_generate_releases_rows_that_have_ended():
    model, inputs = model_of("llama"), left_padded([48, 40, 31])
    options = {"compressor": random_compressor(model)} | TIGHT_WINDOW | COARSE
    free_run, _ = generated(model, DeltaKVCache(model, max_cache_len=160, **options), inputs, 60)
    said = free_run[:, 48:]
    end = next(token for token in said[0, :20].tolist() if token not in said[1, :50] and token not in said[2, :50])
    cache = DeltaKVCache(model, max_cache_len=160, **options)
    ended, most = ReleaseFinished(cache, end, every=7), []
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
        stopping_criteria=[
            ended,
            lambda ids, scores: most.append(cache._ledger.compressed[0]) or torch.zeros(3).bool(),
        ],
    )
    length = min(out.shape[1], 48 + 50)
    assert torch.equal(out[1:, :length], free_run[1:, :length]) and end in out[0, 48:68]
    assert max(most) > 0 and most[-1] == 0
    # the next text begins anew
    cache.reset()
    model.generate(**inputs, past_key_values=cache, max_new_tokens=10, eos_token_id=end, stopping_criteria=[ended])


def test_released_rows_are_saved(tmp_path):
    model = model_of("llama")
    cache = DeltaKVCache(model, max_cache_len=160, **WAYS["coarse"](model))
    model(prompt(2), past_key_values=cache)
    cache.release_rows([0])
    cache.save(tmp_path / "cache")
    loaded = DeltaKVCache.load(tmp_path / "cache", model, compressor=cache.compressor, max_cache_len=200)
    mask = torch.ones(2, 48, dtype=torch.int64)
    said = [go_on(model, each, mask, [1, 20, 1, 1], 3) for each in (cache, loaded)]
    torch.testing.assert_close(*said, rtol=0, atol=1e-4)


def test_wrong_rows_and_sizes():
    model = tiny_model("llama")
    cache = DeltaKVCache(model, **TIGHT)
    model(prompt(2), past_key_values=cache)
    with pytest.raises(InvalidOptionError, match="`rows` must be from 0 to 1, got \\[2\\]"):
        cache.release_rows([2])
    with pytest.raises(InvalidOptionError, match="`max_pool_tokens` must be None without `max_cache_len`"):
        DeltaKVCache(model, max_pool_tokens=64)
    with pytest.raises(InvalidOptionError, match="`max_pool_tokens` must be an integer >= 1"):
        DeltaKVCache(model, max_cache_len=64, max_pool_tokens=0)
    with pytest.raises(InvalidOptionError, match="`every`"):
        ReleaseFinished(cache, 2, every=0)
    with pytest.raises(InvalidOptionError, match="`eos_token_id` must be a token"):
        ReleaseFinished(cache, None)
    assert BlockPool(32, 100).num_blocks([]) == 4
