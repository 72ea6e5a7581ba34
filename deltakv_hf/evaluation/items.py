"""A context and the questions asked after it, as token ids.

The split is question-agnostic: a cache stores the context before it can know what will be asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        question: ids fed behind the context, down to where the answer begins.
        answer: ids that must follow, one or more.
        place: tokens `[start, stop)` of the context that hold the answer; None if it follows from the whole of it.
    """

    question: list[int]
    answer: list[int]
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class TaskContext:
    """Token ids that a cache stores, and the items asked on top of them, each on its own."""

    ids: list[int]
    items: list[Item]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` alone, without special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: the BOS token or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[0] == bos else []


def make_item(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, place: tuple[int, int] | None = None
) -> Item:
    """An item whose ids are those of the joined text: a token across the seam belongs to the answer."""
    asked, whole = encode(tokenizer, question), encode(tokenizer, question + answer)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, whole, strict=False)))
    return Item(whole[:shared], whole[shared:], place)
