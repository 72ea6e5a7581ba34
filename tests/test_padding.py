"""Every row of a batch is stored and read as if it were alone and without padding."""

import pytest
import torch
from helpers import (
    SHAPES,
    TIGHT,
    assert_same_tensors,
    cuts,
    dense,
    driven,
    feed,
    left_padded,
    make_tokens,
    option_sets,
    prompt,
    row_records,
    teacher_forced,
)
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model

from deltakv_hf import DeltaKVCache


@st.composite
def masks(draw):
    """`[batch, columns]` of left padding, right padding, holes or anything; every row has a token."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(2, 50))
    kind = draw(st.sampled_from(["left", "right", "holes", "any"]))
    columns = torch.arange(length)
    rows = []
    for _ in range(batch):
        count = draw(st.integers(0, length - 1))
        if kind == "left":
            row = columns >= count
        elif kind == "right":
            row = columns < length - count
        else:
            seed = draw(st.integers(0, 999))
            share = draw(st.sampled_from([0.1, 0.5])) if kind == "holes" else 0.8
            row = torch.rand(length, generator=torch.Generator().manual_seed(seed)) > share
            row[draw(st.integers(0, length - 1))] = True
        rows.append(row)
    return torch.stack(rows).long()


@st.composite
def problems(draw):
    """(tokens, chunks, options)"""
    mask = draw(masks())
    heads, head_dim = draw(st.sampled_from(SHAPES))
    tokens = make_tokens(
        mask.shape[1], batch=len(mask), heads=heads, head_dim=head_dim, mask=mask, seed=draw(st.integers(0, 99))
    )
    return tokens, draw(cuts(mask.shape[1])), draw(option_sets())


def with_one_more(tokens):
    """`tokens` and one column that is real in every row."""
    mask = torch.cat([tokens.mask, torch.ones(len(tokens.mask), 1, dtype=torch.long)], dim=1)
    return make_tokens(
        len(tokens) + 1, batch=len(mask), heads=tokens.keys.shape[2], head_dim=tokens.keys.shape[-1], mask=mask, seed=7
    )


@given(problems())
def test_a_row_is_stored_as_if_alone(problem):
    tokens, chunks, options = problem
    together = driven(tokens, chunks, **options)
    for row in range(len(tokens.mask)):
        alone = driven(tokens.alone(row), **options)
        for layer_idx in range(len(together.layers)):
            assert_same_tensors(row_records(together, layer_idx, row), row_records(alone, layer_idx, 0))


@given(problems())
def test_a_row_is_read_as_if_alone(problem):
    tokens, chunks, options = problem
    tokens = with_one_more(tokens)
    length = len(tokens) - 1
    together = driven(tokens.columns(slice(0, length)), chunks, **options)
    views = feed(together, tokens, [1], past=length)
    for row in range(len(tokens.mask)):
        own = tokens.alone(row)
        alone = driven(own.columns(slice(0, len(own) - 1)), **options)
        for view, expected in zip(views, feed(alone, own, [1], past=len(own) - 1), strict=True):
            for got, states in zip(dense(view), dense(expected), strict=True):
                assert got.shape[2] == length + 1
                torch.testing.assert_close(got[row][:, tokens.mask[row].bool()], states[0], rtol=0, atol=2e-6)


@given(problems())
def test_a_view_in_the_middle_of_a_sequence_is_right(problem):
    """Every call's view holds, at raw columns, what was fed, whatever is pending and whatever was flushed."""
    tokens, chunks, options = problem
    options = options | {"recent_window": 100}
    cache = DeltaKVCache(tiny_model("llama"), **TIGHT | options)
    past = 0
    for length in chunks:
        views = feed(cache, tokens.columns(slice(0, past + length)), [length], past=past)
        past += length
        for layer_idx, view in enumerate(views):
            real = tokens.mask[:, :past].bool()[:, None, :, None]
            for got, fed in zip(dense(view), (tokens.keys, tokens.values), strict=True):
                assert torch.equal(got.where(real, 0), fed[layer_idx][:, :, :past].where(real, 0))


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(problem, random):
    tokens, chunks, options = problem
    order = list(range(len(tokens.mask)))
    random.shuffle(order)
    first, second = driven(tokens, chunks, **options), driven(tokens.rows(order), chunks, **options)
    for place, row in enumerate(order):
        assert_same_tensors(row_records(second, 0, place), row_records(first, 0, row))


@given(problems())
def test_a_mask_of_ones_is_no_mask(problem):
    tokens, chunks, options = problem
    full = make_tokens(len(tokens), batch=2, mask=torch.ones(2, len(tokens), dtype=torch.long))
    plain = make_tokens(len(tokens), batch=2)
    for row in range(2):
        assert_same_tensors(
            row_records(driven(full, chunks, **options), 0, row), row_records(driven(plain, **options), 0, row)
        )


@given(problems())
def test_pads_are_never_stored(problem):
    """What stands in a pad column does not reach the store, the sinks or the tail."""
    tokens, chunks, options = problem
    poisoned = make_tokens(len(tokens), batch=len(tokens.mask), mask=tokens.mask)
    clean = make_tokens(len(tokens), batch=len(tokens.mask), mask=tokens.mask)
    for part in (poisoned.keys, poisoned.values):
        part.masked_fill_(~tokens.mask.bool()[None, :, None, :, None], torch.nan)
    for row in range(len(tokens.mask)):
        assert_same_tensors(
            row_records(driven(poisoned, chunks, **options), 0, row),
            row_records(driven(clean, chunks, **options), 0, row),
        )


def test_padding_may_begin_after_an_even_start():
    """Batched chat: the first turn is full, the second has a hole."""
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 30:41] = 0
    tokens = make_tokens(60, batch=2, mask=mask)
    together = driven(tokens, [20, 3, 7, 10, 1, 1, 18])
    for row in range(2):
        assert_same_tensors(row_records(together, 0, row), row_records(driven(tokens.alone(row)), 0, 0))


def test_calls_without_a_mask_after_padding_are_real():
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :11] = 0
    tokens = make_tokens(60, batch=2, mask=mask)
    cache = driven(tokens.columns(slice(0, 40)))
    for column in range(40, 60):
        part = tokens.columns(slice(column, column + 1))
        cache._ledger.note_mask(None, outermost=True)
        for layer_idx, layer in enumerate(cache.layers):
            layer.receive_tables(part.cos, part.sin)
            cache.update(part.keys[layer_idx], part.values[layer_idx], layer_idx)
    cache.flush()
    for row in range(2):
        assert_same_tensors(row_records(cache, 0, row), row_records(driven(tokens.alone(row)), 0, 0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_masks_of_any_type_are_read(dtype):
    model, ids, mask = tiny_model("llama"), prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    cache, expected = DeltaKVCache(model, **TIGHT), DeltaKVCache(model, **TIGHT)
    model(ids, attention_mask=mask.to(dtype), past_key_values=cache)
    model(ids, attention_mask=mask, past_key_values=expected)
    for row in range(2):
        assert_same_tensors(row_records(cache, 0, row), row_records(expected, 0, row))


@pytest.mark.parametrize("entry", ["keyword", "positional", "inner-model"])
def test_the_mask_is_seen_however_the_model_is_called(entry):
    model, inputs = tiny_model("llama"), left_padded([40, 27])
    cache = DeltaKVCache(model, **TIGHT)
    if entry == "keyword":
        model(**inputs, past_key_values=cache)
    elif entry == "positional":
        model(inputs["input_ids"], inputs["attention_mask"], None, cache)
    else:
        model.model(**inputs, past_key_values=cache)
    assert cache.memory_report().tokens == 67


@pytest.mark.parametrize("family", ["llama", "glm4", "smollm3", "gemma3"])
def test_row_order_in_a_model_does_not_matter(family):
    model, ids, mask = tiny_model(family), prompt(3, 64), torch.ones(3, 64, dtype=torch.long)
    mask[0, :13], mask[2, :30] = 0, 0
    order = torch.tensor([2, 0, 1])
    first = teacher_forced(model, ids, DeltaKVCache(model, **TIGHT), 50, attention_mask=mask)
    second = teacher_forced(model, ids[order], DeltaKVCache(model, **TIGHT), 50, attention_mask=mask[order])
    assert (first[order] - second)[:, 50:].abs().max() < 1e-3


def test_custom_positions_are_used():
    """A row that begins at position 1000 is compressed and read with the tables of these positions."""
    model, ids = tiny_model("llama"), prompt(2, 64)
    positions = torch.stack([torch.arange(64), torch.arange(1000, 1064)])

    def logits(cache):
        steps = [model(ids[:, :50], position_ids=positions[:, :50], past_key_values=cache).logits]
        for i in range(50, 64):
            now = {"position_ids": positions[:, i : i + 1]}
            steps.append(model(ids[:, i : i + 1], past_key_values=cache, **now).logits)
        return torch.cat(steps, 1)[:, 50:]

    got, expected = logits(DeltaKVCache(model, **TIGHT, nbits=8)), logits(DeltaKVCache(model, recent_window=4096))
    assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 0.1
