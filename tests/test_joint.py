"""`JointEncodedCache` in a model: it says what `DynamicCache` says, and stores what rows have in common once."""

import pytest
import torch
from helpers import full_cache, greedy, prompt, teacher_forced
from models import new_model, tiny_model
from transformers import PreTrainedModel

from deltakv_hf import CacheStateError, InvalidOptionError, JointEncodedCache

BLOCK, SYSTEM = 4, 32
FAMILIES = ["llama", "llama-yarn", "qwen3", "gemma3", "gpt2"]


def joint(model: PreTrainedModel, **options) -> JointEncodedCache:
    return JointEncodedCache(model, **{"block_size": BLOCK} | options)


def num_whole(lengths: list[int]) -> int:
    """Blocks of rows that have nothing in common."""
    return sum(length // BLOCK for length in lengths)


def assert_stored_once(cache: JointEncodedCache, length: int, rows: slice = slice(None)) -> None:
    """The first `length` tokens of `rows` are in the same blocks."""
    cache.flush()
    slots = cache._ledger.block_table()[rows, : length // BLOCK]
    assert slots.shape[1] == length // BLOCK and (slots == slots[:1]).all()


# -- requests with a common system prompt ------------------------------------------------------------------------------


def requests(lengths: list[int], pads: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded rows of a common system prompt and, behind it, `lengths` tokens of their own."""
    system, width = prompt(1, SYSTEM)[0], SYSTEM + max(lengths) + pads
    ids, mask = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(2))
    for row, length in enumerate(lengths):
        own = prompt(1, length, seed=100 + row)[0]
        # no two of them begin alike
        own[0] = row + 1
        ids[row, width - SYSTEM - length :], mask[row, width - SYSTEM - length :] = torch.cat([system, own]), 1
    return {"input_ids": ids, "attention_mask": mask}


def continued(inputs: dict[str, torch.Tensor], extra: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with `extra` tokens more."""
    ids, mask = inputs.values()
    more = prompt(len(ids), extra, seed=9)
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


@pytest.mark.parametrize("pads", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_equal_padding_are_read_bit_for_bit(family, pads):
    model, inputs = tiny_model(family), requests([11] * 8, pads)
    assert torch.equal(greedy(model, inputs, joint(model)), greedy(model, inputs, full_cache(model)))
    (ids, mask), length = continued(inputs), inputs["input_ids"].shape[1]
    cache, full = joint(model), full_cache(model)
    logits = [teacher_forced(model, ids, held, length, attention_mask=mask) for held in (cache, full)]
    assert torch.equal(*logits)
    cache.flush()
    assert cache.num_blocks == num_whole([SYSTEM]) + 8 * num_whole([11 + 12])
    for layer in cache.own_layers:
        host = full.layers[layer.layer_idx]
        for states, expected in zip(cache.dequantize(layer.layer_idx), (host.keys, host.values), strict=True):
            assert torch.equal(states, expected.where(mask.bool()[:, None, :, None], 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_of_different_padding_say_the_same(family):
    model, lengths = tiny_model(family), [3, 11, 7, 20, 4, 1, 16, 9]
    inputs, cache = requests(lengths), joint(model)
    assert torch.equal(greedy(model, inputs, cache), greedy(model, inputs, full_cache(model)))
    # the last token that was said has not been fed
    assert_stored_once(cache, SYSTEM)
    assert cache.num_blocks == num_whole([SYSTEM]) + num_whole([length + 11 for length in lengths])
    (ids, mask), length = continued(inputs), inputs["input_ids"].shape[1]
    logits = [
        teacher_forced(model, ids, held, length, attention_mask=mask) for held in (joint(model), full_cache(model))
    ]
    assert (logits[0] - logits[1])[mask.bool()].abs().max() < 1e-4


def test_requests_take_the_bytes_of_what_is_different():
    model, lengths = tiny_model("llama"), [5] * 8
    cache = joint(model)
    model(**requests(lengths), past_key_values=cache)
    cache.flush()
    report = cache.memory_report()
    token_bytes = report.dense_bytes // (8 * (SYSTEM + 5))
    assert report.parts["blocks"] == (SYSTEM + 8 * 4) * token_bytes
    assert report.parts["recent window"] == 8 * token_bytes
    assert report.stored_bytes < report.dense_bytes / 2


# -- several continuations of one prompt -------------------------------------------------------------------------------


def sampled(model, inputs, cache, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return greedy(model, inputs, cache, do_sample=True, **options)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_sequences_of_one_prompt(family, batch):
    model, ids, cache = tiny_model(family), prompt(batch, 40), joint(tiny_model(family))
    options = dict(num_return_sequences=8, max_new_tokens=16)
    got = sampled(model, ids, cache, **options)
    assert torch.equal(got, sampled(model, ids, full_cache(model), **options))
    assert len(got.unique(dim=0)) == 8 * batch
    for row in range(batch):
        assert_stored_once(cache, 40, slice(8 * row, 8 * row + 8))
    # whole blocks of the prompt, and those of rows that have gone different ways
    heads = {tuple(row[:end].tolist()) for row in got for end in range(BLOCK, 40 + 15 + 1, BLOCK)}
    assert cache.num_blocks == len(heads)


@pytest.mark.parametrize("inputs", [prompt(2, 40), requests([3, 17])], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_one_prompt(family, inputs):
    model, cache = tiny_model(family), joint(tiny_model(family))
    options = dict(num_beams=4, num_return_sequences=4, max_new_tokens=16)
    assert torch.equal(greedy(model, inputs, cache, **options), greedy(model, inputs, full_cache(model), **options))
    assert cache._ledger.batch_size == 8
    for rows in (slice(0, 4), slice(4, 8)):
        assert_stored_once(cache, SYSTEM + 3, rows)
    assert cache.num_blocks <= 2 * 10 + 8 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_warm_prompt_is_repeated_without_a_copy(family):
    model, ids = tiny_model(family), prompt(1, 41)
    cache, cold = joint(model), full_cache(model)
    model(ids, past_key_values=cache)
    cache.flush()
    pools, before = [layer.state.store.blocks for layer in cache.own_layers], cache.memory_report()
    cache.batch_repeat_interleave(8)
    after = cache.memory_report()
    for layer, pool in zip(cache.own_layers, pools, strict=True):
        assert layer.state.store.blocks is pool
    assert after.parts["blocks"] == before.parts["blocks"] and cache.num_blocks == 10
    rows = "recent window", "block tables", "bookkeeping", "host layers"
    assert after.stored_bytes - before.stored_bytes <= 7 * sum(before.parts[name] for name in rows)
    model(ids.expand(8, -1), past_key_values=cold)
    for place in range(9):
        step = prompt(8, 1, seed=place)
        got, expected = (model(step, past_key_values=held).logits for held in (cache, cold))
        assert (got - expected).abs().max() < 1e-4
    assert_stored_once(cache, 40)
    assert cache.num_blocks == 10 + 8 * 2


def test_a_conversation_is_shared_as_far_as_its_turns_are_alike():
    """Two rounds of `generate` on one cache; rows say different things in between."""
    model, cache, full = tiny_model("llama"), joint(tiny_model("llama")), full_cache(tiny_model("llama"))
    ids = prompt(1, 24).expand(3, -1)
    for turn in range(2):
        mask = torch.ones_like(ids)
        said = [
            sampled(model, {"input_ids": ids, "attention_mask": mask}, held, max_new_tokens=10)
            for held in (cache, full)
        ]
        assert torch.equal(*said)
        ids = torch.cat([said[0], prompt(1, 6, seed=turn).expand(3, -1)], 1)
    assert_stored_once(cache, 24)
    rows = [row[: cache.get_seq_length()].tolist() for row in said[0]]
    assert cache.num_blocks == len({tuple(row[:end]) for row in rows for end in range(BLOCK, len(row) + 1, BLOCK)})


# -- what must not be shared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_group_does_not_depend_on_the_others(family):
    """Not a bit of it: without groups, rows would read what the model made of the first of them."""
    model, groups, results = tiny_model(family), [0, 1, 0, 1], []
    own = prompt(1, 40)
    for other in (own, prompt(1, 40, seed=1)):
        ids = torch.cat([other, own, other, own])
        cache = joint(model, groups=groups)
        logits = teacher_forced(model, torch.cat([ids, ids[:, :12]], 1), cache, 40)
        cache.flush()
        assert cache.num_blocks == 2 * num_whole([52])
        results.append([logits[1::2], *(part[1::2] for layer in cache.own_layers for part in layer.dequantize())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_groups_are_for_the_rows_of_the_first_call():
    model = tiny_model("llama")
    cache = joint(model, groups=[0, 1])
    with pytest.raises(CacheStateError, match="`groups` must have one number for each of the 6 rows.*got 2"):
        greedy(model, prompt(2), cache, num_beams=3)
    model(prompt(1).expand(2, -1), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    cache.flush()
    assert cache.num_blocks == 2 * num_whole([48])
    cache.reset()
    with pytest.raises(CacheStateError, match="`groups`"):
        model(prompt(3), past_key_values=cache)


def embedded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("inner", [False, True], ids=["model", "decoder"])
def test_embeddings_are_shared_with_nobody(family, inner):
    """Rows of different embeddings, whose ids nobody knows."""
    model = tiny_model(family)
    decoder = model.base_model if inner else model
    embeddings = embedded(model, prompt(1, 30).expand(3, -1)) + torch.arange(3)[:, None, None] * 0.1
    results = []
    for cache in (joint(model), full_cache(model)):
        decoder(inputs_embeds=embeddings, past_key_values=cache)
        text = prompt(1, 10, seed=1).expand(3, -1)
        results.append(torch.cat([model(text[:, i : i + 1], past_key_values=cache).logits for i in range(10)], 1))
        if isinstance(cache, JointEncodedCache):
            cache.flush()
            assert cache.num_blocks == 3 * num_whole([40]), "text behind them is not alike either"
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_generation_from_embeddings():
    model, embeddings = tiny_model("llama"), embedded(tiny_model("llama"), prompt(1, 30).expand(2, -1))
    cache = joint(model)
    got = greedy(model, {"inputs_embeds": embeddings}, cache)
    assert torch.equal(got, greedy(model, {"inputs_embeds": embeddings}, full_cache(model)))
    cache.flush()
    assert cache.num_blocks == 2 * num_whole([41])


def test_text_with_anything_beside_it_is_shared_with_nobody():
    """A tensor that the cache does not know may change the keys."""
    model, cache = tiny_model("llama"), joint(tiny_model("llama"))
    model(prompt(1, 16).expand(2, -1), past_key_values=cache, something=torch.zeros(2))
    cache.flush()
    assert cache.num_blocks == 2 * num_whole([16])


def test_rows_at_other_positions_are_others():
    """Left padding without `position_ids`: the model counts columns, so that equal tokens are rotated differently."""
    model, inputs, results = tiny_model("llama"), requests([4, 9]), []
    for cache in (joint(model), full_cache(model)):
        logits = [model(**inputs, past_key_values=cache).logits]
        mask = inputs["attention_mask"]
        for place in range(6):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            step = prompt(2, 1, seed=place)
            logits.append(model(step, attention_mask=mask, past_key_values=cache).logits)
        results.append(torch.cat(logits[1:], 1))
        if isinstance(cache, JointEncodedCache):
            cache.flush()
            assert cache.num_blocks == num_whole([SYSTEM + 4 + 6, SYSTEM + 9 + 6])
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_column_that_is_hidden_later_from_one_of_the_rows():
    model, ids, results = tiny_model("llama"), prompt(1, 24).expand(2, -1), []
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[1, 3] = 0
    for cache in (joint(model), full_cache(model)):
        model(ids[:, :12], attention_mask=torch.ones(2, 12), past_key_values=cache)
        model(ids[:, 12:], attention_mask=mask[:, :24], past_key_values=cache)
        results.append(model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_text_with_a_tensor_beside_it_that_is_passed_by_place():
    """GPT-2 adds embeddings of `token_type_ids`."""
    model, ids, results = tiny_model("gpt2"), prompt(1, 16).expand(2, -1), []
    for cache in (joint(model), full_cache(model)):
        model(ids, cache, torch.ones_like(ids), torch.tensor([[5], [9]]).expand(-1, 16))
        results.append(model(ids[:, :3], past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_equal_text_with_padding_in_other_places(family):
    model, text, results = tiny_model(family), prompt(1, 30)[0], []
    mask = torch.ones(2, 43, dtype=torch.long)
    mask[0, 10:20], mask[1, :10] = 0, 0
    ids = torch.zeros(2, 40, dtype=torch.long).masked_scatter(mask[:, :40].bool(), text.repeat(2))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for cache in (joint(model), full_cache(model)):
        model(ids, attention_mask=mask[:, :40], position_ids=positions[:, :40], past_key_values=cache)
        step = {"attention_mask": mask, "position_ids": positions[:, 40:]}
        results.append(model(ids[:, 30:33], **step, past_key_values=cache).logits)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_blocks_hold_what_the_model_made(dtype):
    model = new_model("llama").to(dtype)
    cache, full = joint(model), full_cache(model)
    for held in (cache, full):
        model(prompt(2, 30), past_key_values=held)
    for layer_idx, host in enumerate(full.layers):
        for states, expected in zip(cache.dequantize(layer_idx), (host.keys, host.values), strict=True):
            assert states.dtype == dtype and torch.equal(states, expected)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 0},
        {"block_size": -4},
        {"block_size": True},
        {"block_size": 4.0},
        {"block_size": None},
        {"groups": []},
        {"groups": [-1]},
        {"groups": [0, True]},
        {"groups": [0.5]},
        {"groups": 3},
        {"groups": "01"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InvalidOptionError, match=f"`{name}` must be"):
        JointEncodedCache(tiny_model("llama"), **options)


@pytest.mark.parametrize("name, near", [("blocksize", "block_size"), ("group", "groups"), ("nbits", None)])
def test_unknown_options_are_refused(name, near):
    with pytest.raises(InvalidOptionError, match=f"`{name}` is not an option") as caught:
        JointEncodedCache(tiny_model("llama"), **{name: 4})
    assert near is None or f"Did you mean `{near}`?" in str(caught.value)
