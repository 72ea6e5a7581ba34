"""Short texts of four kinds, made from templates: what `few_shot` classifies when no files are given."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

# makes one text of a class
Snippet = Callable[[random.Random], str]

WORDS = {
    "name": "account block buffer client column cursor event folder frame image label order packet record report score",
    "verb": "append check clear close count fetch merge parse print reset round score split store trim update",
    "number": "2 3 4 5 6 7 8 9 10 12 16 20 24 32 40 50 64 90 100 128",
    "person": "Anna Ben Clara Dan Ella Finn Gina Hugo Iris Jack Kate Leo Mia Nick Olga Paul Rosa Sam Tina Will",
    "thing": "bike book cake camera coat concert guitar kitten laptop movie pizza puzzle recipe sandwich song ticket",
    "mood": "amazing awful boring funny great lovely scary strange sweet terrible tiring weird",
    "day": "yesterday|today|tonight|this morning|last week|on Sunday|on Friday|next weekend",
    "place": "city desert field garden gate hill house mountain pasture river temple tower valley vineyard well",
    "people": "brethren captains children daughters elders fathers kings priests prophets servants shepherds sons",
    "deed": "bowed down|cried aloud|departed|gave thanks|gathered stones|kept silence|rejoiced|wept",
    "gift": "barley bread cattle corn gold honey linen myrrh oil oxen salt sheep silver wine wool",
    "part": "cable controller driver engine filter housing inlet motor pump relay rotor sensor shaft switch valve",
    "state": "calibrated|connected|disabled|enabled|inspected|isolated|locked|replaced|sealed|tested|vented",
    "quantity": "current flow frequency load pressure speed temperature torque vibration voltage",
}
CHOICES = {slot: words.split("|" if "|" in words else " ") for slot, words in WORDS.items()}

CODE = (
    "def {verb}_{name}({name}, limit={number}):",
    "for {name} in {verb}_{name}s({number}):",
    "{name}_count = len({name}s) // {number}",
    "if {name}.{verb}({name}_id) is None: return {number}",
    "self.{name} = {verb}({name}s[{number}:], key=None)",
    "assert {name}_{verb}(x) == {number}, x",
)
CHAT = (
    "Hi {person}! Did you see that {mood} {thing} {day}?",
    "Haha, my {thing} was so {mood} {day}, what about you?",
    "Oh no, I lost my {thing} {day}. {person} is so mad at me!",
    "Yeah, me too! I really want a {thing} like {person}'s.",
    "Wow, that sounds {mood}! Are you going with {person} {day}?",
    "I'm fine thanks, just a {mood} day. How was the {thing}?",
)
VERSE = (
    "And the {people} of the {place} {deed}, and brought {gift} unto the {place}.",
    "Then went the {people} up to the {place}, and {deed} {number} days.",
    "Behold, the {people} shall come from the {place} with {gift} and with {gift}.",
    "And it came to pass, that the {people} {deed} before the {place}.",
    "Blessed be the {people}, for thou hast given them {gift} and a {place}.",
    "Thus saith the king: Let the {people} carry {gift} into the {place}.",
)
MANUAL = (
    "The {part} must be {state} before the {part} is {state} again.",
    "If the {quantity} exceeds {number} percent, the {part} is {state} automatically.",
    "Each {part} reports its {quantity} to the {part} every {number} seconds.",
    "Ensure that the {part} and the {part} are {state} at low {quantity}.",
    "A rise in {quantity} indicates that the {part} has not been {state}.",
    "See section {number} for the maximum {quantity} of the {part}.",
)


def from_templates(templates: tuple[str, ...], rng: random.Random) -> str:
    """One of `templates` with a word in each slot; a slot that comes twice gets two words where it can."""
    parts = rng.choice(templates).split("{")
    return parts[0] + "".join(
        rng.choice(CHOICES[slot]) + rest for slot, rest in (part.split("}", 1) for part in parts[1:])
    )


CLASSES: tuple[Snippet, ...] = tuple(partial(from_templates, kind) for kind in (CODE, CHAT, VERSE, MANUAL))
