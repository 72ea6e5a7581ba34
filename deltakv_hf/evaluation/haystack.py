"""Text to hide things in: sentences without end from a user's file or the bundled one, and needles between them."""

from __future__ import annotations

import random
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidOptionError
from .items import encode, first_ids
from .snippets import CLASSES, Snippet
from .texts import BUNDLED_TEXT, read_documents, read_text

# tokens; a longer sentence is cut, so that a needle can stand at any depth of any text
LONGEST_PIECE = 96
SNIPPET_CHARACTERS = range(25, 111)


@dataclass(frozen=True)
class Sources:
    """The texts that tasks are made from.

    Attributes:
        documents: the haystack.
        classes: one function for each class of short texts that `few_shot` tells apart.
    """

    documents: tuple[str, ...]
    classes: tuple[Snippet, ...] = CLASSES

    @cached_property
    def sentences(self) -> list[str]:
        """All sentences, white space made single blanks."""
        flat = (" ".join(document.split()) for document in self.documents)
        return [sentence for document in flat for sentence in re.split(r"(?<=[.!?]) ", document) if sentence]

    def run(self, rng: random.Random) -> Iterator[str]:
        """Sentences in their order from a random one on; from another one whenever all have been given."""
        while True:
            start = rng.randrange(len(self.sentences))
            yield from self.sentences[start:]
            yield from self.sentences[:start]


def read_sources(text: Path | None = None, classes: Sequence[Path] = ()) -> Sources:
    """Sources from the user's files.

    Args:
        text: the haystack, documents separated by form feeds; None takes the bundled text.
        classes: a file for each class of `few_shot`, two or more; none takes texts made from templates.

    Raises:
        InvalidOptionError: a file cannot be read or holds too little, or there is one class only.
    """
    documents = tuple(read_documents(text or BUNDLED_TEXT))
    if not classes:
        return Sources(documents)
    if len(classes) == 1:
        raise InvalidOptionError(f"`classes` must be two files or more, one a class, got {str(classes[0])!r} alone.")
    return Sources(documents, tuple(partial(_choose, _snippets(path)) for path in classes))


def _choose(snippets: list[str], rng: random.Random) -> str:
    return rng.choice(snippets)


def _snippets(path: Path) -> list[str]:
    lines = (line.strip() for line in read_text(path, "classes").splitlines())
    pieces = (piece for line in lines for piece in textwrap.wrap(line, SNIPPET_CHARACTERS[-1]))
    # a dict drops what comes twice and keeps the order, which a set would not
    snippets = list(dict.fromkeys(piece for piece in pieces if len(piece) in SNIPPET_CHARACTERS))
    if not snippets:
        raise InvalidOptionError(
            f"`classes` must hold lines of {SNIPPET_CHARACTERS[0]} characters or more, {str(path)!r} has none."
        )
    return snippets


def fill(tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random, sources: Sources) -> list[list[int]]:
    """Ids of sentences, together `num_tokens` or up to `LONGEST_PIECE` less.

    Raises:
        InvalidOptionError: `num_tokens` leaves no room for a piece.
    """
    if num_tokens < LONGEST_PIECE:
        raise InvalidOptionError(
            f"`num_tokens` must leave {LONGEST_PIECE} tokens or more for text around what the task hides, got "
            f"{num_tokens} left: ask for {LONGEST_PIECE - num_tokens} more."
        )
    pieces, room = [], num_tokens
    for sentence in sources.run(rng):
        ids = encode(tokenizer, f" {sentence}" if pieces else sentence)
        for start in range(0, len(ids), LONGEST_PIECE):
            piece = ids[start : start + LONGEST_PIECE]
            if len(piece) > room:
                return pieces
            pieces.append(piece)
            room -= len(piece)


def bury(
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    rng: random.Random,
    sources: Sources,
    introduction: str,
    needles: Sequence[str],
    depths: Sequence[float],
) -> tuple[list[int], list[tuple[int, int]]]:
    """Hides sentences in text.

    Args:
        num_tokens: most tokens of the whole.
        introduction: what stands before the text.
        needles: sentences, none of them first.
        depths: of each needle, from 0 (behind the first piece of text) up to below 1 (at the end).

    Returns:
        ids of the whole, and tokens `[start, stop)` of each needle in them.
    """
    ids = first_ids(tokenizer) + encode(tokenizer, introduction)
    hidden = [encode(tokenizer, f" {needle}") for needle in needles]
    pieces = fill(tokenizer, num_tokens - len(ids) - sum(map(len, hidden)), rng, sources)
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    places = {}
    for number, piece in enumerate(pieces):
        ids += piece
        for i in order:
            if int(depths[i] * len(pieces)) == number:
                places[i] = len(ids), len(ids) + len(hidden[i])
                ids += hidden[i]
    return ids, [places[i] for i in range(len(needles))]
