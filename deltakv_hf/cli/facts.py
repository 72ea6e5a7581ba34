"""The demo's prompt: made-up facts planted in a real text, at known places."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import DeltaKVConfig
from ..errors import InvalidOptionError
from ..evaluation.texts import BUNDLED_TEXT

INTRODUCTION = "There is important information hidden inside the following text. Memorize it."
# the planted prompt ends near here
PROMPT_TOKENS = 4224
CONTINUATION_TOKENS = 256


@dataclass(frozen=True)
class Fact:
    """A sentence to plant, and how it is asked. A small model finds digits well when its answer is begun for it."""

    subject: str
    question: str
    value: str

    @property
    def sentence(self) -> str:
        """What is planted; said twice, a small model finds it with more certainty."""
        return f"{self.subject} {self.value}. Remember it: {self.subject} {self.value}."

    @property
    def ask(self) -> str:
        """What is fed behind the text; the answer follows at once."""
        return f"\n\nQuestion: {self.question}\nAnswer: {self.subject} "


# facts of different kinds whose values begin differently: a small model mixes up similar ones, with any cache
FACTS = (
    Fact("The phone number of the hotel in Lisbon is", "What is the phone number of the hotel in Lisbon?", "2614"),
    Fact("The population of the village is", "What is the population of the village?", "4821"),
    Fact("The weight of the whale in pounds is", "What is the weight of the whale in pounds?", "1759"),
    Fact("The password of the wireless network is", "What is the password of the wireless network?", "9138"),
    Fact("The height of the mountain in metres is", "What is the height of the mountain in metres?", "7518"),
    Fact("The locker at the swimming pool is number", "Which number is the locker at the swimming pool?", "5386"),
    Fact("The door code of the laboratory is", "What is the door code of the laboratory?", "3957"),
    Fact("The spaceship landed on asteroid number", "On which asteroid number did the spaceship land?", "6194"),
)


@dataclass(frozen=True)
class PlantedPrompt:
    """A prompt with facts in it.

    Attributes:
        ids: token ids of the prompt.
        places: first token and the one behind the last of each fact of `FACTS`, in `ids`.
        continuation: ids of the text that follows the prompt.
    """

    ids: list[int]
    places: list[tuple[int, int]]
    continuation: list[int]


def plant(tokenizer, options: DeltaKVConfig) -> PlantedPrompt:
    """Plants the facts in the text that comes with the package.

    All but the last stand between paragraphs, spread evenly. The last stands where the cache's last compressed block
    will be when the prompt has been read: the newest tokens that are not raw.
    """
    if options.num_sink_tokens + options.recent_window + options.block_size > PROMPT_TOKENS // 2:
        raise InvalidOptionError(
            f"`num_sink_tokens` + `recent_window` must leave most of the demo's {PROMPT_TOKENS} tokens to be "
            f"compressed, got {options.num_sink_tokens} + {options.recent_window}: lower `--recent-window`."
        )
    ids, places, starts, pieces = _encode(tokenizer, INTRODUCTION), [], [], _sentences()
    spread = [PROMPT_TOKENS * (i + 0.2) / len(FACTS) for i in range(len(FACTS) - 1)]
    for separator, sentence in pieces:
        if len(places) < len(spread) and separator == "\n\n" and len(ids) >= spread[len(places)]:
            _add(ids, places, _encode(tokenizer, separator + FACTS[len(places)].sentence))
        starts.append((len(ids), separator))
        ids += _encode(tokenizer, separator + sentence)
    place, separator = _last_place(starts, max(len(_fact_ids(tokenizer, s)) for s in (" ", "\n\n")), options)
    last = _fact_ids(tokenizer, separator)
    places.append((place, place + len(last)))
    ids[place:place] = last
    block = place - (place - options.num_sink_tokens) % options.block_size
    end = block + options.block_size + options.recent_window
    # up to a block later the same tokens are compressed; the end of a sentence there is nicer to stop at
    shifted = [start + len(last) for start, _ in starts if start >= place]
    end = next((start for start in shifted if end <= start < end + options.block_size), end)
    return PlantedPrompt(ids[:end], places, ids[end : end + CONTINUATION_TOKENS])


def _last_place(starts: list[tuple[int, str]], length: int, options: DeltaKVConfig) -> tuple[int, str]:
    """The last start of a sentence with room for `length` tokens in its block, so early that the window follows."""
    latest = PROMPT_TOKENS - options.recent_window
    fits = [
        (start, separator)
        for start, separator in starts
        if start < latest and (start - options.num_sink_tokens) % options.block_size + length <= options.block_size
    ]
    return fits[-1]


def _sentences() -> list[tuple[str, str]]:
    """The text as sentences, each with what stands before it."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in BUNDLED_TEXT.read_text(encoding="utf-8").split("\n\n")]
    sentences = [re.split(r"(?<=[.!?]) ", paragraph) for paragraph in paragraphs if paragraph]
    return [("\n\n" if i == 0 else " ", sentence) for group in sentences for i, sentence in enumerate(group)]


def _fact_ids(tokenizer, separator: str) -> list[int]:
    return _encode(tokenizer, separator + FACTS[-1].sentence)


def _add(ids: list[int], places: list[tuple[int, int]], new: list[int]) -> None:
    places.append((len(ids), len(ids) + len(new)))
    ids += new


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
