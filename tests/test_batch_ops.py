"""Beams, choices, crops, copies and resets on compressed storage."""

import copy

import pytest
import torch
from helpers import (
    LOSSLESS,
    SHAPES,
    TIGHT,
    assert_same_state,
    assert_same_tensors,
    cuts,
    dense,
    driven,
    feed,
    full_cache,
    greedy,
    left_padded,
    make_tokens,
    option_sets,
    prompt,
    row_records,
    state_tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import CacheStateError, DeltaKVCache, InvalidOptionError

FAMILIES = ["llama", "qwen3", "gemma3", "smollm3", "phi3-partial", "mistral-sliding", "cohere2"]
PADDED = torch.ones(3, 50, dtype=torch.long)
PADDED[0, :17], PADDED[2, 20:24] = 0, 0
# a prompt within a block waits, with its mask, for the next forward
SHORT = torch.ones(3, 4, dtype=torch.long)
SHORT[0, :2] = 0
MASKS = {"even": None, "padded": PADDED, "padded-short": SHORT}
OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select-bool": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "one-row": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


def tokens_of(mask, extra=20):
    """Tokens of a mask and `extra` columns that are real in every row."""
    if mask is None:
        return make_tokens(50 + extra, batch=3), 50
    longer = torch.cat([mask, torch.ones(len(mask), extra, dtype=torch.long)], dim=1)
    return make_tokens(longer.shape[1], batch=len(mask), mask=longer), mask.shape[1]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_stored_tensor_follows_the_rows(operation, mask):
    apply, rows = OPERATIONS[operation]
    tokens, length = tokens_of(MASKS[mask])
    cache = driven(tokens.columns(slice(0, length)), flush=False)
    before = [{k: v.clone() for k, v in state_tensors(layer).items()} for layer in cache.layers]
    apply(cache)
    for layer, held in zip(cache.layers, before, strict=True):
        assert_same_tensors(state_tensors(layer), {name: tensor[rows] for name, tensor in held.items()})


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "pending"])
def test_chosen_rows_go_on_as_if_alone(operation, mask, flush):
    """After the operation, tokens fed to the new rows are stored behind the right old ones."""
    apply, rows = OPERATIONS[operation]
    tokens, length = tokens_of(MASKS[mask])
    cache = driven(tokens.columns(slice(0, length)), flush=flush)
    apply(cache)
    chosen = tokens.rows(rows)
    feed(cache, chosen, [3, 1, 9, 1, 6], past=length)
    cache.flush()
    for place in range(len(rows)):
        assert_same_tensors(row_records(cache, 1, place), row_records(driven(chosen.alone(place)), 1, 0))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_chosen_rows_are_read_as_if_alone(operation, mask):
    apply, rows = OPERATIONS[operation]
    tokens, length = tokens_of(MASKS[mask], extra=1)
    cache = driven(tokens.columns(slice(0, length)), flush=False)
    apply(cache)
    chosen = tokens.rows(rows)
    keys, values = dense(feed(cache, chosen, [1], past=length)[1])
    for place in range(len(rows)):
        own = chosen.alone(place)
        expected = dense(feed(driven(own.columns(slice(0, len(own) - 1)), flush=False), own, [1], past=len(own) - 1)[1])
        real = slice(None) if chosen.mask is None else chosen.mask[place].bool()
        torch.testing.assert_close(keys[place][:, real], expected[0][0], rtol=0, atol=2e-6)
        torch.testing.assert_close(values[place][:, real], expected[1][0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("padding", ["even", "padded", "padded-short"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_beam_search_is_identical(family, padding):
    model = tiny_model(family)
    inputs = {"even": prompt(2), "padded": left_padded([48, 31]), "padded-short": left_padded([9, 5])}[padding]
    expected = greedy(model, inputs, full_cache(model), num_beams=3)
    assert torch.equal(greedy(model, inputs, DeltaKVCache(model, **LOSSLESS), num_beams=3), expected)


@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded([60, 41])], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_beam_search_is_near(family, inputs):
    """8 bits and a tiny vocabulary: scores of the best beams stay close to the full cache's."""
    model = tiny_model(family)
    options = dict(num_beams=3, return_dict_in_generate=True, output_scores=True)
    expected = greedy(model, inputs, full_cache(model), **options)
    cache = DeltaKVCache(model, **TIGHT, nbits=8)
    got = greedy(model, inputs, cache, **options)
    assert cache.get_seq_length() == 71
    assert (got.sequences_scores - expected.sequences_scores).abs().max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [LOSSLESS, TIGHT], ids=["lossless", "compressed"])
def test_warm_prefix_is_widened(family, options):
    """One prefilled prompt, three continuations: as three prompts in a batch."""
    model, ids = tiny_model(family), prompt(1, 48)
    tails = prompt(3, 12, seed=3)
    warm, cold = DeltaKVCache(model, **options), DeltaKVCache(model, **options)
    model(ids, past_key_values=warm)
    warm.batch_repeat_interleave(3)
    model(ids.expand(3, -1), past_key_values=cold)
    for i in range(12):
        got = model(tails[:, i : i + 1], past_key_values=warm).logits
        assert (got - model(tails[:, i : i + 1], past_key_values=cold).logits).abs().max() < 1e-4


@pytest.mark.parametrize("batched", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_prompt_lookup_is_identical(family, batched):
    model = tiny_model(family)
    ids = prompt(1, 12).repeat(1, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if batched:
        inputs["attention_mask"][:, :7] = 0
    options = dict(max_new_tokens=20, prompt_lookup_num_tokens=3)
    expected = greedy(model, inputs, full_cache(model), **options)
    assert torch.equal(greedy(model, inputs, DeltaKVCache(model, **LOSSLESS), **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_prompt_lookup_is_greedy_decoding(family):
    """Rejected drafts leave no trace, so drafting changes no token (bar ties: 8 bits, few steps)."""
    model, ids = tiny_model(family), prompt(1, 12).repeat(1, 4)
    expected = greedy(model, ids, DeltaKVCache(model, **TIGHT, nbits=8), max_new_tokens=12)
    cache = DeltaKVCache(model, **TIGHT, nbits=8)
    got = greedy(model, ids, cache, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got, expected)


@st.composite
def drafts(draw):
    """(tokens, chunks, options, draft length, accepted): a last short call of which only a part is accepted."""
    options = draw(option_sets())
    heads, head_dim = draw(st.sampled_from(SHAPES))
    length = draw(st.integers(1, 50))
    draft = draw(st.integers(1, options["block_size"]))
    batch = draw(st.integers(1, 3))
    mask = None
    if draw(st.booleans()):
        mask = torch.ones(batch, length + 40, dtype=torch.long)
        for row in range(batch):
            mask[row, : draw(st.integers(0, length - 1))] = 0
    tokens = make_tokens(length + 40, batch=batch, heads=heads, head_dim=head_dim, mask=mask)
    return tokens, length, draw(cuts(length)), options, draft, draw(st.integers(0, draft))


@given(drafts())
def test_rejected_drafts_leave_no_trace(draft_problem):
    tokens, length, chunks, options, draft, accepted = draft_problem
    cache = driven(tokens.columns(slice(0, length)), chunks, flush=False, **options)
    wrong = make_tokens(
        length + draft,
        batch=tokens.keys.shape[1],
        heads=tokens.keys.shape[2],
        head_dim=tokens.keys.shape[-1],
        mask=None if tokens.mask is None else tokens.mask[:, : length + draft],
        seed=1,
    )
    for part in ("keys", "values"):
        getattr(wrong, part)[..., : length + accepted, :] = getattr(tokens, part)[..., : length + accepted, :]
    feed(cache, wrong, [draft], past=length)
    cache.crop(accepted - draft)
    assert cache.get_seq_length() == length + accepted
    feed(cache, tokens, [1] * (40 - accepted), past=length + accepted)
    cache.flush()
    expected = driven(tokens, **options)
    for row in range(tokens.keys.shape[1]):
        assert_same_tensors(row_records(cache, 1, row), row_records(expected, 1, row))


@given(drafts())
def test_many_drafts_leave_no_trace(draft_problem):
    """Each call is cropped and the right tokens follow, as in assisted decoding; views are right at raw columns."""
    tokens, length, chunks, options, draft, accepted = draft_problem
    accepted = max(1, accepted)
    cache = driven(tokens.columns(slice(0, length)), chunks, flush=False, **options)
    past = length
    while past + draft <= len(tokens):
        views = feed(cache, tokens.columns(slice(0, past + draft)), [draft], past=past)
        assert torch.equal(dense(views[1])[0][:, :, past:], tokens.keys[1][:, :, past : past + draft])
        cache.crop(accepted - draft)
        past += accepted
    cache.flush()
    expected = driven(tokens.columns(slice(0, past)), **options)
    for row in range(tokens.keys.shape[1]):
        assert_same_tensors(row_records(cache, 1, row), row_records(expected, 1, row))


@pytest.mark.parametrize("mask", [None, PADDED], ids=["even", "padded"])
def test_crop_inside_the_tail_keeps_the_view(mask):
    tokens, length = tokens_of(mask)
    cache = driven(tokens.columns(slice(0, length)))
    cache.crop(-3)
    shorter = driven(tokens.columns(slice(0, length - 3)))
    replay = tokens.columns([*range(length - 3), *range(length, length + 5)])
    keys, _ = dense(feed(cache, replay, [5], past=length - 3)[1])
    expected, _ = dense(feed(shorter, replay, [5], past=length - 3)[1])
    # the longer one may have compressed a block more
    assert torch.equal(keys[:, :, -10:], expected[:, :, -10:]) and cache.get_seq_length() == length + 2


def test_crop_by_nothing_changes_nothing():
    tokens = make_tokens(50)
    cache = driven(tokens)
    cache.crop(0)
    assert_same_state(cache, driven(tokens))


def test_crop_of_a_whole_uncompressed_cache_empties_it():
    cache = driven(make_tokens(6), recent_window=50)
    cache.crop(-6)
    assert cache.get_seq_length() == 0
    feed(cache, make_tokens(30, seed=2), [30])
    cache.flush()
    assert_same_state(cache, driven(make_tokens(30, seed=2), recent_window=50))


def test_crop_with_a_positive_number_raises():
    with pytest.raises(InvalidOptionError, match="tokens_to_remove.*5"):
        driven(make_tokens(50)).crop(5)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["even", "padded"])
def test_a_copy_is_independent(mask):
    tokens, length = tokens_of(mask)
    cache = driven(tokens.columns(slice(0, length)), flush=False)
    other = copy.deepcopy(cache)
    feed(cache, tokens, [1] * 20, past=length)
    wrong = tokens.columns([*range(length), *range(len(tokens) - 1, length - 1, -1)])
    feed(other, wrong, [1] * 20, past=length)
    for held, fed in ((cache, tokens), (other, wrong)):
        held.flush()
        expected = driven(fed)
        for row in range(3):
            assert_same_tensors(row_records(held, 1, row), row_records(expected, 1, row))


def test_a_copy_shares_no_memory():
    cache = driven(make_tokens(50))
    other = copy.deepcopy(cache)
    pointers = [{t.data_ptr() for t in state_tensors(c.layers[0]).values() if t.numel()} for c in (cache, other)]
    assert not pointers[0] & pointers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_a_prefix_generate_alike(family):
    model = tiny_model(family)
    prefix = DeltaKVCache(model, **TIGHT)
    model(prompt(), past_key_values=prefix)
    ids = torch.cat([prompt(), prompt(1, 8, seed=9)], dim=1)
    assert torch.equal(greedy(model, ids, copy.deepcopy(prefix)), greedy(model, ids, copy.deepcopy(prefix)))


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_is_a_fresh_cache(family):
    model = tiny_model(family)
    cache = DeltaKVCache(model, **TIGHT)
    greedy(model, left_padded([40, 22, 31]), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = greedy(model, prompt(), DeltaKVCache(model, **TIGHT))
    assert torch.equal(greedy(model, prompt(), cache), expected)


def test_reset_frees_everything():
    cache = driven(tokens_of(PADDED)[0])
    cache.reset()
    assert cache.memory_report().stored_bytes == 0


def test_reset_gives_the_state_of_a_fresh_cache():
    cache = driven(tokens_of(PADDED)[0])
    cache.reset()
    feed(cache, make_tokens(50), [50])
    cache.flush()
    assert_same_state(cache, driven(make_tokens(50)))


def test_crop_takes_a_tensor():
    """transformers 5.17 counts rejected drafts in a tensor, which turned the cache's lengths into tensors."""
    cache = driven(make_tokens(40))
    cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 37 and type(cache.get_seq_length()) is int


@pytest.mark.parametrize("operation", ["select", "reorder"])
def test_only_rows_without_compressed_tokens_remain(operation):
    """Regression: the room for sinks stayed, and keys were read from it."""
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[1, :35] = 0
    tokens = make_tokens(41, batch=2, mask=mask)
    cache = driven(tokens.columns(slice(0, 40)))
    rows = [1] if operation == "select" else [1, 1]
    if operation == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        cache.reorder_cache(torch.tensor(rows))
    keys, values = dense(feed(cache, tokens.rows(rows), [1], past=40)[1])
    assert torch.equal(keys[:, :, 35:], tokens.rows(rows).keys[1][:, :, 35:])
    assert torch.equal(values[:, :, 35:], tokens.rows(rows).values[1][:, :, 35:])
    cache.flush()
    alone = driven(tokens.alone(1))
    assert_same_tensors(row_records(cache, 1, 0), row_records(alone, 1, 0))


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices"])
def test_rows_that_are_not_there(operation):
    cache = driven(make_tokens(40, batch=2))
    with pytest.raises(InvalidOptionError, match=f"`{operation}`.*0 to 1.*\\[1, 2\\]"):
        getattr(cache, operation)(torch.tensor([1, 2]))
    assert_same_state(cache, driven(make_tokens(40, batch=2)))


@pytest.mark.parametrize("operation", ["select", "crop", "flush"])
def test_an_operation_that_is_broken_off_leaves_a_cache_that_says_so(operation, monkeypatch):
    """As by running out of memory in the second layer."""
    tokens = make_tokens(50, batch=2)
    cache = driven(tokens, flush=False)
    feed(cache, make_tokens(52, batch=2), [2], past=50)

    def fail(*args):
        raise MemoryError

    calls = {
        "select": lambda: cache.batch_select_indices(torch.tensor([0])),
        "crop": lambda: cache.crop(-20),
        "flush": cache.flush,
    }
    for name in ("map", "crop_to", "flush"):
        monkeypatch.setattr(cache.layers[1], name, fail)
    with pytest.raises(MemoryError):
        calls[operation]()
    later = [*calls.values(), lambda: cache.dequantize(0), lambda: feed(cache, make_tokens(53, batch=2), [1], past=52)]
    for call in later:
        with pytest.raises(CacheStateError, match="broken off half-way.*reset"):
            call()
    monkeypatch.undo()
    cache.reset()
    feed(cache, tokens, [50])
    cache.flush()
    assert_same_state(cache, driven(tokens))
