"""What the tasks hide and ask: the same items in any process, within the tokens asked for, answers where they say."""

import hashlib
import json
import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from deltakv_hf import InvalidOptionError
from deltakv_hf.evaluation import generators
from deltakv_hf.evaluation.generators import LABELS
from deltakv_hf.evaluation.haystack import LONGEST_PIECE, Sources, read_sources
from deltakv_hf.evaluation.items import make_item
from deltakv_hf.evaluation.tasks import TASKS, pick_tasks

TOKENIZER = byte_tokenizer()
SOURCES = read_sources()
HIDDEN = ["passkey", "niah4", "variable_tracking", "cloze"]
# of the items below, so that they stay what they were when something was measured
ITEMS = "109004d5ccb9337a733a861833fe78d2a136317be083710a0c4ddd4a743c98ac"

lengths, seeds = st.integers(1200, 9000), st.integers(0, 2**40)


def context(name, num_tokens, seed, sources=SOURCES, tokenizer=TOKENIZER):
    return TASKS[name].context(tokenizer, num_tokens, seed, sources)


def text(ids):
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize("name", TASKS)
@given(num_tokens=lengths, seed=seeds)
def test_a_context_has_the_tokens_asked_for_or_few_less(name, num_tokens, seed):
    made = context(name, num_tokens, seed)
    # one token a byte: an example of few_shot is longer than a piece of text
    assert num_tokens - 2 * LONGEST_PIECE < len(made.ids) <= num_tokens
    assert made == context(name, num_tokens, seed) != context(name, num_tokens, seed + 1)
    assert all(item.question and item.answer for item in made.items)
    assert len({tuple(item.question) for item in made.items}) == len(made.items)


@pytest.mark.parametrize("name", HIDDEN)
@given(num_tokens=lengths, seed=seeds)
def test_a_hidden_answer_stands_where_the_item_says_and_nowhere_else(name, num_tokens, seed):
    made = context(name, num_tokens, seed)
    answers = [text(item.answer) for item in made.items]
    assert len(set(answers)) == len(answers)
    # taken out from the end, so that the places before stay right
    rest = list(made.ids)
    for answer, item in sorted(zip(answers, made.items, strict=True), key=lambda pair: -pair[1].place[0]):
        assert answer in text(made.ids[slice(*item.place)])
        del rest[slice(*item.place)]
    assert not any(answer in text(rest) for answer in answers)


@pytest.mark.parametrize("name", ["niah4", "variable_tracking", "cloze"])
@given(num_tokens=lengths, seed=seeds)
def test_several_needles_are_spread_over_the_context(name, num_tokens, seed):
    made = context(name, num_tokens, seed)
    count = len(made.items)
    for number, (start, stop) in enumerate(item.place for item in made.items):
        assert (number - 1) / count <= start / len(made.ids) <= stop / len(made.ids) <= (number + 2) / count


@given(num_tokens=lengths, seed=seeds)
def test_copy_asks_for_what_follows_the_cue_wherever_it_stands(num_tokens, seed):
    made = context("copy", num_tokens, seed)
    read = text(made.ids)
    for item in made.items:
        start, stop = item.place
        assert made.ids[start:stop] == item.answer and len(item.answer) == 16
        cue = text(item.question).removeprefix("\n\n")
        assert made.ids[start - 16 : start] == item.question[-16:]
        follows = {read[i + 16 : i + 32] for i in range(len(read)) if read.startswith(cue, i)}
        assert follows <= {text(item.answer)} | {f for f in follows if len(f) < 16}


@given(num_tokens=lengths, seed=seeds)
def test_few_shot_shows_all_labels_and_asks_new_texts(num_tokens, seed):
    made = context("few_shot", num_tokens, seed)
    shown = text(made.ids).removeprefix("Classify each text.\n\n").split("\n\n")[:-1]
    examples = [example.removeprefix("Text: ").split("\nLabel: ") for example in shown]
    counts = [sum(label == known for _, label in examples) for known in LABELS]
    assert sum(count > 0 for count in counts) == 4
    assert max(counts) - min(count for count in counts if count) <= 1
    for item in made.items:
        asked = text(item.question).removeprefix("Text: ").removesuffix("\nLabel:")
        assert asked not in dict(examples) and text(item.answer).strip() in dict(examples).values()
    assert len({text(item.answer) for item in made.items}) == 4


def test_items_stay_what_they_are():
    """In any process, on any machine: they come from names and numbers alone."""
    made = [vars(item) for name in TASKS for seed in range(2) for item in context(name, 3000, seed).items]
    ids = [context(name, 3000, seed).ids for name in TASKS for seed in range(2)]
    assert hashlib.sha256(json.dumps([made, ids]).encode()).hexdigest() == ITEMS


@pytest.mark.parametrize("name", [*HIDDEN, "copy"])
def test_a_context_too_short_is_refused(name):
    with pytest.raises(InvalidOptionError, match=r"`num_tokens` must leave 96 tokens .* ask for \d+ more"):
        context(name, 90, 0)
    with pytest.raises(InvalidOptionError, match="`num_tokens` must leave room for an example of each of 4 classes"):
        context("few_shot", 150, 0)


def test_a_text_is_read_from_another_place_when_all_of_it_has_been_read():
    sources = Sources(("One. Two.\nThree!", "Four? Five"))
    assert sources.sentences == ["One.", "Two.", "Three!", "Four?", "Five"]
    run = list(islice(sources.run(random.Random(1)), 20))
    rounds = [run[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(part) == sorted(sources.sentences) for part in rounds)
    assert len({part[0] for part in rounds}) > 1


def test_a_text_without_sentences_is_cut():
    made = context("niah4", 2000, 0, Sources(("x" * 5000,)))
    assert 2000 - LONGEST_PIECE < len(made.ids) <= 2000


def test_copy_refuses_a_text_where_every_cue_goes_on_in_two_ways(monkeypatch):
    monkeypatch.setattr(generators, "COPIED_TOKENS", 1)
    with pytest.raises(InvalidOptionError, match="`text` must have runs of 1 tokens that go on in one way"):
        context("copy", 300, 0, Sources(("aabb" * 100,)))


def test_the_beginning_is_what_the_tokenizer_puts_there():
    plain = byte_tokenizer()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for name in TASKS:
        begun, bare = (context(name, 1500, 3, tokenizer=t) for t in (tokenizer, plain))
        assert begun.ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in begun.ids[1:]
        assert len(begun.ids) <= 1500 and bare.ids[0] != tokenizer.bos_token_id
        assert all(tokenizer.bos_token_id not in item.question + item.answer for item in begun.items)


def test_a_token_across_the_seam_belongs_to_the_answer():
    model = BPE(vocab={"a": 0, "1": 1, "2": 2, "12": 3}, merges=[("1", "2")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    item = make_item(tokenizer, "a1", "2")
    assert (item.question, item.answer) == ([0], [3])


def test_classes_come_from_files(tmp_path):
    paths = [tmp_path / "loud.txt", tmp_path / "soft.txt"]
    for path in paths:
        word = path.stem
        path.write_text("\n".join(f"{word} text number {i} of its kind" for i in range(30)) + "\nshort\n" + "w " * 200)
    made = context("few_shot", 3000, 0, read_sources(None, paths))
    labels = {}
    for example in text(made.ids).removeprefix("Classify each text.\n\n").split("\n\n")[:-1]:
        shown, label = example.removeprefix("Text: ").split("\nLabel: ")
        assert 25 <= len(shown) <= 110
        if not shown.startswith("w "):
            labels.setdefault(shown.split()[0], set()).add(label)
    assert all(len(found) == 1 for found in labels.values()) and labels["loud"] != labels["soft"]


def test_sources_that_hold_too_little_are_refused(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    with pytest.raises(InvalidOptionError, match="`text` must be a text file"):
        read_sources(path)
    path.write_text("one line that is long enough for a class\n")
    other.write_text("short\n")
    with pytest.raises(InvalidOptionError, match="`classes` must be two files or more"):
        read_sources(None, [path])
    with pytest.raises(InvalidOptionError, match="`classes` must hold lines of 25 characters or more"):
        read_sources(None, [path, other])
    with pytest.raises(InvalidOptionError, match="`classes` must hold texts beside the 8 that are asked"):
        context("few_shot", 2000, 0, read_sources(None, [path, path]))
    with pytest.raises(InvalidOptionError, match="`classes` must be 8 at most, got 9"):
        context("few_shot", 2000, 0, read_sources(None, [path] * 9))


def test_tasks_are_picked_by_name():
    assert [task.name for task in pick_tasks()] == list(TASKS)
    assert [task.name for task in pick_tasks(["copy", "cloze", "copy"])] == ["copy", "cloze"]
    with pytest.raises(InvalidOptionError, match="`task` must be one of passkey, .* got 'niah'. Did you mean `niah4`?"):
        pick_tasks(["niah"])
