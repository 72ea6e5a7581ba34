"""Six kinds of contexts with questions whose answers a small model knows only from the context.

The forms follow the literature where it has them: `passkey` Mohtashami & Jaggi (arXiv 2305.16300), `niah4` and
`variable_tracking` RULER (arXiv 2404.06654, its multi-key needles and its chains, here without hops). The answer is
always begun for the model, which is what lets one of 135M parameters find it; its digits are tokens of their own.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Container, Iterator

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidOptionError
from .haystack import Sources, bury, fill
from .items import Item, TaskContext, encode, first_ids, make_item
from .snippets import Snippet

KEYS = """amber anchor apple arrow autumn badger bamboo banner barrel basket beacon blossom bridge bronze button cactus
camel candle canyon carpet castle cedar cherry circle clover cobalt copper coral cotton crystal dolphin dragon eagle
ember falcon feather fiddle flame forest fountain galaxy garden ginger glacier granite hammer harbor hazel helmet heron
honey island ivory jacket jasmine jungle kettle ladder lantern lemon lizard magnet maple marble meadow mirror monkey
mountain needle nickel ocean olive orange orchid otter panther parrot pebble pepper pillow planet pocket prairie quartz
rabbit raven ribbon river rocket saddle salmon sapphire silver sparrow spider spruce tiger timber tulip turtle valley
velvet violet walnut whistle willow window winter zebra""".split()
FIRST_NAMES = "Alice Brian Carla David Emily Frank Grace Henry Irene James Karen Louis".split()
SYLLABLES = "bra kel dov min tor var sil gos hur pen zol wic".split()
JOBS = "baker pilot doctor farmer lawyer painter sailor teacher tailor miner".split()
LABELS = "Foo Bar Zed Qux Lim Tor Wug Dax".split()

NEEDLES = 4
PEOPLE = 8
QUESTIONS = 8
COPIED_TOKENS = 16
# examples that are drawn anew before a class is called too small
MOST_DRAWS = 1000


def passkey(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> TaskContext:
    """One five-digit key in a text."""
    key = _numbers(rng, 1)[0]
    introduction = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    ids, places = bury(tokenizer, num_tokens, rng, sources, introduction, [needle], [rng.random()])
    return TaskContext(
        ids, [make_item(tokenizer, "\n\nWhat is the pass key?\nThe pass key is ", key, place) for place in places]
    )


def niah4(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> TaskContext:
    """Four numbers, each bound to a word; all are asked, so that three compete with each."""
    keys, numbers = rng.sample(KEYS, NEEDLES), _numbers(rng, NEEDLES)
    introduction = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards.\n\n"
    )
    needles = [
        f"One of the special magic numbers for {key} is: {number}." for key, number in zip(keys, numbers, strict=True)
    ]
    ids, places = bury(tokenizer, num_tokens, rng, sources, introduction, needles, _spread(rng, NEEDLES))
    named = "special magic number for {} mentioned in the provided text"
    questions = [f"\n\nWhat is the {named.format(key)}?\nThe {named.format(key)} is: " for key in keys]
    return TaskContext(ids, _items(tokenizer, questions, numbers, places))


def variable_tracking(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources
) -> TaskContext:
    """Four assignments of numbers to variables; the value of each is asked."""
    names = _different(NEEDLES, lambda: "".join(rng.choices(string.ascii_uppercase, k=3)))
    numbers = _numbers(rng, NEEDLES)
    introduction = "Memorize the chains of variable assignments hidden in the following text.\n\n"
    needles = [f"VAR {name} = {number}." for name, number in zip(names, numbers, strict=True)]
    ids, places = bury(tokenizer, num_tokens, rng, sources, introduction, needles, _spread(rng, NEEDLES))
    questions = [f"\n\nWhat is the number assigned to VAR {name}?\nVAR {name} = " for name in names]
    return TaskContext(ids, _items(tokenizer, questions, numbers, places))


def cloze(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> TaskContext:
    """Eight invented full names, each bound to a job; a sentence is to be completed with the name."""
    jobs, first_names = rng.sample(JOBS, PEOPLE), rng.sample(FIRST_NAMES, PEOPLE)
    last_names = _different(PEOPLE, lambda: "".join(rng.sample(SYLLABLES, 3)).capitalize())
    names = [f" {first} {last}" for first, last in zip(first_names, last_names, strict=True)]
    begun = [f"The {job} of the town was called" for job in jobs]
    needles = [f"{begin}{name}." for begin, name in zip(begun, names, strict=True)]
    ids, places = bury(tokenizer, num_tokens, rng, sources, "", needles, _spread(rng, PEOPLE))
    return TaskContext(ids, _items(tokenizer, [f"\n\n{begin}" for begin in begun], names, places))


def copy(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> TaskContext:
    """Plain text; 16 tokens from each eighth of it are to be continued with the 16 that follow them there."""
    ids, size = first_ids(tokenizer), COPIED_TOKENS
    start = len(ids)
    ids += [token for piece in fill(tokenizer, num_tokens - start, rng, sources) for token in piece]
    followers: dict[tuple, set[tuple]] = {}
    for place in range(start, len(ids) - 2 * size + 1):
        cue, answer = tuple(ids[place : place + size]), tuple(ids[place + size : place + 2 * size])
        followers.setdefault(cue, set()).add(answer)
    question, items = encode(tokenizer, "\n\n"), []
    for part in range(QUESTIONS):
        bounds = [start + (len(ids) - 2 * size + 1 - start) * i // QUESTIONS for i in (part, part + 1)]
        # a cue that goes on in two ways has no right answer
        clear = [place for place in range(*bounds) if len(followers[tuple(ids[place : place + size])]) == 1]
        if clear:
            place = rng.choice(clear)
            answer = place + size, place + 2 * size
            items.append(Item(question + ids[place : place + size], ids[slice(*answer)], answer))
    if not items:
        raise InvalidOptionError(
            f"`text` must have runs of {size} tokens that go on in one way only, it has none: take another."
        )
    return TaskContext(ids, items)


def few_shot(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> TaskContext:
    """Short texts of several classes, each with the word that stands for its class here; new texts are asked."""
    if len(sources.classes) > len(LABELS):
        raise InvalidOptionError(f"`classes` must be {len(LABELS)} at most, got {len(sources.classes)}.")
    classes = list(zip(sources.classes, rng.sample(LABELS, len(sources.classes)), strict=True))
    asked: dict[str, str] = {}
    for number in range(QUESTIONS):
        make, label = classes[number % len(classes)]
        asked[_new(rng, make, asked)] = label
    items = [make_item(tokenizer, f"Text: {text}\nLabel:", f" {label}") for text, label in asked.items()]
    ids = first_ids(tokenizer) + encode(tokenizer, "Classify each text.\n\n")
    shown = 0
    for make, label in _in_turns(rng, classes):
        example = encode(tokenizer, f"Text: {_new(rng, make, asked)}\nLabel: {label}\n\n")
        if len(ids) + len(example) > num_tokens:
            break
        ids += example
        shown += 1
    if shown < len(classes):
        raise InvalidOptionError(
            f"`num_tokens` must leave room for an example of each of {len(classes)} classes, got {num_tokens}, which "
            f"holds {shown}: ask for more."
        )
    return TaskContext(ids, items)


def _items(tokenizer, questions: list[str], answers: list[str], places: list[tuple[int, int]]) -> list[Item]:
    return [make_item(tokenizer, *parts) for parts in zip(questions, answers, places, strict=True)]


def _spread(rng: random.Random, count: int) -> list[float]:
    """Depths of `count` needles, one in each equal part of the text."""
    return [(i + rng.random()) / count for i in range(count)]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Five-digit numbers without zeros, all different."""
    return _different(count, lambda: "".join(rng.choices(string.digits[1:], k=5)))


def _different(count: int, draw: Callable[[], str]) -> list[str]:
    # a dict keeps the order, which a set does not from one process to the next
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _in_turns(rng: random.Random, classes: list) -> Iterator:
    """All classes in a random order, again and again."""
    while True:
        yield from rng.sample(classes, len(classes))


def _new(rng: random.Random, make: Snippet, taken: Container[str]) -> str:
    for _ in range(MOST_DRAWS):
        text = make(rng)
        if text not in taken:
            return text
    raise InvalidOptionError(f"`classes` must hold texts beside the {QUESTIONS} that are asked, one holds fewer.")
