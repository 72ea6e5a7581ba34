"""An item as token ids: what goes around its texts, and what is cut out where they are too long."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...errors import InvalidOptionError
from ..items import encode, first_ids
from .items import BenchmarkItem

MARKS = "The first question.", "The first answer.", "The next question."


@dataclass(frozen=True)
class Frame:
    """Texts around those of an item: none but blank lines, or a chat template's.

    Attributes:
        before: the first text.
        after: a question, before the answer.
        between: an answer and the next question.
    """

    before: str = ""
    after: str = ""
    between: str = "\n\n"


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The one of the tokenizer's chat template.

    Raises:
        InvalidOptionError: it has none.
    """
    if not tokenizer.chat_template:
        raise InvalidOptionError("`chat` must be False for a tokenizer without a chat template, got True.")
    roles = "user", "assistant", "user"
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, MARKS, strict=True)]
    before, after = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True).split(MARKS[0])
    longer = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return Frame(before, after, longer.split(MARKS[1])[1].split(MARKS[2])[0])


@dataclass(frozen=True)
class EncodedItem:
    """Token ids of an item.

    Attributes:
        context: shared by all questions; empty where there is none.
        questions: of each turn, down to where its answer begins.
        golden: the right answer of each turn.
        num_dropped: tokens cut out of the middle.
    """

    context: list[int]
    questions: list[list[int]]
    golden: list[list[int]]
    num_dropped: int


def encode_item(
    tokenizer: PreTrainedTokenizerBase, item: BenchmarkItem, frame: Frame, multi_turn: bool, room: int | None
) -> EncodedItem:
    """Encodes an item so that its prompt, questions and answers have at most `room` tokens.

    What is too long loses its middle, as LongBench and SCBench do it: instructions stand at either end.

    Args:
        multi_turn: whether each question comes behind the turns before it, with their right answers.
        room: tokens in all; None: no limit.

    Raises:
        InvalidOptionError: what must not be cut has no room.
    """
    begin = [] if frame.before else first_ids(tokenizer)
    texts = [turn.question + frame.after + turn.prefix for turn in item.turns]
    if item.context is None:
        ids = begin + encode(tokenizer, frame.before + texts[0])
        kept = _cut(ids, room, item.turns[0].max_new_tokens, item)
        return EncodedItem([], [kept], [[]], len(ids) - len(kept))
    gaps = ["\n\n" if number == 0 or not multi_turn else frame.between for number in range(len(texts))]
    questions = [encode(tokenizer, gap + text) for gap, text in zip(gaps, texts, strict=True)]
    golden = [encode(tokenizer, turn.golden) for turn in item.turns]
    longest, held = 0, 0
    for turn, question, answer in zip(item.turns, questions, golden, strict=True):
        longest = max(longest, held + len(question) + max(turn.max_new_tokens, len(answer)))
        held += len(question) + len(answer) if multi_turn else 0
    ids = begin + encode(tokenizer, frame.before + item.context)
    kept = _cut(ids, room, longest, item)
    return EncodedItem(kept, questions, golden, len(ids) - len(kept))


def _cut(ids: list[int], room: int | None, taken: int, item: BenchmarkItem) -> list[int]:
    if room is None or len(ids) + taken <= room:
        return ids
    left = room - taken
    if left < 2:
        raise InvalidOptionError(
            f"`max_lengths` must leave room for the prompt in {room} tokens, got {taken} for what comes behind it in "
            f"{item.dataset}, line {item.number}: lower it, or take a model with more positions."
        )
    return ids[: left // 2] + ids[len(ids) - (left - left // 2) :]
