"""What transformers' own tests ask of a cache in `generate`, asked of every kind of cache of ours.

The checks of its `tests/utils/test_cache_utils.py` and `tests/generation/test_utils.py` that are about a growing cache,
in our words. A lossless cache must do exactly what `DynamicCache` does; a lossy one must do by a detour (a copy, a
second call, a batch) what it does straight.
"""

import copy

import pytest
import torch
from helpers import full_cache, greedy, left_padded, prompt
from kinds import after_prompt, full_inputs, next_logits
from models import new_model, tiny_model
from transformers import Cache
from transformers.generation.streamers import BaseStreamer

NEW = 12


# -- what comes out of generate ----------------------------------------------------------------------------------------


def test_the_cache_given_is_the_cache_returned(kind, model):
    cache = kind.make(model)
    assert isinstance(cache, Cache) and cache, "models ask `if past_key_values:`, also of an empty one"
    assert model(prompt(), past_key_values=cache).past_key_values is cache
    out = greedy(
        model, full_inputs(torch.cat([prompt(), prompt(1, 4, seed=1)], 1)), cache, return_dict_in_generate=True
    )
    assert out.past_key_values is cache
    # the last token was never fed
    assert cache.get_seq_length() == out.sequences.shape[1] - 1
    assert next_logits(model, cache).isfinite().all()


ASKED = {
    "greedy": {},
    "3-sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled-beams": {"num_beams": 3, "do_sample": True},
    "chunked-prefill": {"prefill_chunk_size": 10},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "guidance": {"guidance_scale": 1.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("asked", ASKED)
def test_generate_does_what_it_does_with_the_hosts_cache(kind, model, asked):
    """Tokens and scores of a lossless cache; of a lossy one the shapes, and a cache that is fit to go on."""
    ids = prompt(1, 12).repeat(1, 4) if asked == "prompt-lookup" else prompt()
    results = []
    for cache in (full_cache(model), kind.make(model)):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            out = greedy(model, ids, cache, return_dict_in_generate=True, output_scores=True, **ASKED[asked])
        results.append((out.sequences, torch.stack(out.scores), torch.tensor(int(cache.get_seq_length()))))
    for expected, got in zip(*results, strict=True):
        if kind.lossless:
            kind.check_same(got, expected)
        assert got.shape == expected.shape


def test_a_finished_row_does_not_disturb_the_others(kind, model):
    """A row that met its end goes on with padding tokens; each row is what it is alone."""
    inputs = left_padded([48, 37, 48])
    eos = int(greedy(model, inputs, kind.make(model))[1, 48 + 3])
    together = greedy(model, inputs, kind.make(model), eos_token_id=eos)[:, 48:]
    assert (together[1] == 0).any() and (together[1] != 0).any(), "a row ends early"
    for row in range(3):
        own = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].argmax() :]
        alone = greedy(model, own, kind.make(model), eos_token_id=eos)[:, own.shape[1] :]
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_more_padding_on_the_left_changes_no_token(kind, model):
    expected = greedy(model, prompt(1, 40), kind.make(model))[:, 40:]
    padded = torch.nn.functional.pad(prompt(1, 40), (24, 0))
    mask = (torch.arange(64) >= 24).long()[None]
    got = greedy(model, {"input_ids": padded, "attention_mask": mask}, kind.make(model))[:, 64:]
    assert torch.equal(got, expected)


def test_tokens_are_streamed_as_they_come(kind, model):
    class Streamer(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens = self.tokens + value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    out = greedy(model, prompt(), kind.make(model), streamer=streamer)
    assert streamer.ended and streamer.tokens == out[0].tolist()


def test_an_assistant_drafts_for_the_model(kind):
    """The assistant keeps its own host cache; rejected drafts are cropped out of ours."""
    model, assistant = tiny_model("llama"), new_model("llama")
    for number, parameter in enumerate(assistant.parameters()):
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
    assistant.generation_config.num_assistant_tokens = 4
    options = {"max_new_tokens": 24, "assistant_model": assistant}
    cache = kind.make(model)
    got = greedy(model, prompt(), cache, **options)
    assert got.shape[1] == cache.get_seq_length() + 1 == 72
    if kind.lossless:
        assert torch.equal(got, greedy(model, prompt(), full_cache(model), **options))


def test_attentions_are_over_all_columns(kind):
    model = tiny_model("llama", "eager")
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    got = greedy(model, prompt(2), kind.make(model), **options)
    assert [attention[0].shape for attention in got.attentions] == [(2, 4, 48, 48)] + [
        (2, 4, 1, n) for n in (49, 50, 51)
    ]
    assert (got.attentions[-1][1].sum(-1) - 1).abs().max() < 1e-5


# -- in several calls what was done in one -----------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("first", [1, 5, 11])
def test_generating_in_two_calls_is_generating_in_one(kind, model, first, padded):
    inputs = left_padded([48, 31]) if padded else full_inputs(prompt(2))
    expected = greedy(model, inputs, kind.make(model))
    cache = kind.make(model)
    ids = greedy(model, inputs, cache, max_new_tokens=first)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, first), value=1)
    assert torch.equal(greedy(model, {"input_ids": ids, "attention_mask": mask}, cache, NEW - first), expected)


def test_generating_from_embeddings_is_generating_from_ids(kind, model):
    expected = greedy(model, prompt(2), kind.make(model))[:, 48:]
    embed = model.get_input_embeddings()
    assert torch.equal(greedy(model, {"inputs_embeds": embed(prompt(2))}, kind.make(model)), expected)
    cache = kind.make(model)
    first = greedy(model, {"inputs_embeds": embed(prompt(2))}, cache, max_new_tokens=5)
    longer = {"inputs_embeds": embed(torch.cat([prompt(2), first], dim=1))}
    assert torch.equal(torch.cat([first, greedy(model, longer, cache, NEW - 5)], dim=1), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
def test_only_the_new_ids_need_be_given(kind, model, padded):
    """With the mask of the whole sequence: as giving all ids again."""
    inputs = left_padded([40, 23]) if padded else full_inputs(prompt(2, 40))
    more = prompt(2, 8, seed=4)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)
    outputs = []
    for ids in (torch.cat([inputs["input_ids"], more], dim=1), more):
        cache = kind.make(model)
        model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        outputs.append(greedy(model, {"input_ids": ids, "attention_mask": mask}, cache)[:, -NEW:])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("size", [7, 16, 47, 48, 100])
def test_chunked_prefill_is_calls_of_that_size(kind, model, size):
    ids = prompt(2)
    cache, by_hand = kind.make(model), kind.make(model)
    out = greedy(model, ids, cache, 1, prefill_chunk_size=size, output_logits=True, return_dict_in_generate=True)
    for chunk in ids.split(size, dim=1):
        logits = model(chunk, past_key_values=by_hand, logits_to_keep=1).logits
    assert torch.equal(out.logits[0], logits[:, -1])
    assert torch.equal(next_logits(model, cache, 2), next_logits(model, by_hand, 2))


def test_one_prompt_is_continued_several_ways_by_copies(kind, model):
    """Each copy goes on as the original would have; the original stays what it was."""
    start = after_prompt(kind, model)
    for seed in (4, 5):
        ids = torch.cat([prompt(), prompt(1, 9, seed=seed)], dim=1)
        expected = greedy(model, full_inputs(ids), after_prompt(kind, model))
        assert torch.equal(greedy(model, full_inputs(ids), copy.deepcopy(start)), expected)
    assert start.get_seq_length() == 48
    assert torch.equal(next_logits(model, start), next_logits(model, after_prompt(kind, model)))


def test_a_prefix_made_in_inference_mode_serves_outside_of_it(kind, model):
    """Tensors made there may not be written outside: a cache must make new ones."""
    ids = torch.cat([prompt(), prompt(1, 9, seed=4)], dim=1)
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = kind.make(model)
        with mode():
            model(prompt(), past_key_values=cache)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        outputs.append(greedy(model, full_inputs(ids.expand(2, -1)), cache))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_search_on_from_a_widened_prefix(kind, model, beams):
    """As if every beam had read the prefix itself."""
    ids = torch.cat([prompt(), prompt(1, 4, seed=4)], dim=1)
    outputs = []
    for widened in (True, False):
        cache = kind.make(model)
        model(prompt() if widened else prompt().expand(beams, -1), past_key_values=cache)
        if widened:
            cache.batch_repeat_interleave(beams)
        outputs.append(greedy(model, full_inputs(ids), cache, num_beams=beams))
    assert torch.equal(*outputs)


# -- rows and columns --------------------------------------------------------------------------------------------------


def test_repeated_rows_are_equal_and_selecting_undoes_it(kind, model):
    cache = after_prompt(kind, model, batch=2)
    expected = next_logits(model, copy.deepcopy(cache), rows=2)
    cache.batch_repeat_interleave(3)
    wide = next_logits(model, copy.deepcopy(cache), rows=6)
    torch.testing.assert_close(wide, expected.repeat_interleave(3, dim=0), rtol=0, atol=1e-5)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(next_logits(model, cache, rows=2), expected)


def test_reordering_moves_rows_and_back(kind, model):
    cache = after_prompt(kind, model, batch=3)
    expected = next_logits(model, copy.deepcopy(cache), rows=3)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    moved = next_logits(model, copy.deepcopy(cache), rows=3)
    torch.testing.assert_close(moved, expected[[2, 0, 1]], rtol=0, atol=1e-5)
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert torch.equal(next_logits(model, cache, rows=3), expected)


@pytest.mark.parametrize("drop", [1, 3, 4])
def test_cropped_tokens_are_forgotten(kind, model, drop):
    """A short call, rolled back as assisted decoding does it, and other tokens instead: no trace of the first ones."""
    cache, expected = after_prompt(kind, model), after_prompt(kind, model)
    cache.activate_past_recording()
    kept, wrong, right = prompt(1, 4 - drop, seed=4), prompt(1, drop, seed=5), prompt(1, drop, seed=6)
    model(torch.cat([kept, wrong], dim=1), past_key_values=cache)
    cache.crop(-drop)
    assert cache.get_seq_length() == 48 + 4 - drop
    if drop < 4:
        model(kept, past_key_values=expected)
    for each in (lambda c: model(right, past_key_values=c).logits, lambda c: next_logits(model, c)):
        # a row of a longer product of matrices is rounded otherwise
        torch.testing.assert_close(each(cache), each(expected), rtol=0, atol=1e-5)
        # sliding layers of transformers 5.17 need a crop after every call, which assisted decoding gives them
        cache.crop(0)


def test_a_positive_crop_is_refused(kind, model):
    """It once meant a length to crop to: code written for that must not lose tokens quietly."""
    cache = after_prompt(kind, model)
    with pytest.raises((ValueError, RuntimeError)):
        cache.crop(20)
    assert cache.get_seq_length() == 48


def test_reset_is_a_fresh_cache(kind, model):
    cache = kind.make(model)
    for _ in range(2):
        assert torch.equal(greedy(model, prompt(2), cache), greedy(model, prompt(2), kind.make(model)))
        cache.reset()
        assert cache.get_seq_length() == 0
