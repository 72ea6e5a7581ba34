"""Token windows cut from the user's texts: what a compressor is calibrated on, and what its report is measured on."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import check_integer
from ..errors import InvalidOptionError
from ..evaluation import texts

FEWEST_HELD_OUT, MOST_HELD_OUT = 4, 9


def read_documents(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> dict[str, list[str]]:
    """The documents of text files, one source for each file.

    Args:
        paths: of files in UTF-8; a line that holds a form feed separates documents.

    Returns:
        the documents by the file's name, without blank ones; a name that comes again gets a number.

    Raises:
        InvalidOptionError: there is no file, or one cannot be read, is not text or is empty.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    sources = {}
    for path in map(Path, paths):
        documents = [document.removeprefix("\ufeff") for document in texts.read_documents(path, "paths")]
        if any("\0" in document for document in documents):
            raise InvalidOptionError(f"`paths` must be text files, got the binary file {str(path)!r}: leave it out.")
        name, number = path.name, 2
        while name in sources:
            name, number = f"{path.name} ({number})", number + 1
        sources[name] = [document for document in documents if document.strip()]
    if not sources:
        raise InvalidOptionError("`paths` must name one file or more, got none.")
    return sources


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Mapping[str, Iterable[str]] | Iterable[str],
    *,
    num_tokens: int,
    window: int = 4096,
    seed: int = 0,
    num_held_out: int | None = None,
    num_uncounted: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cuts windows of tokens for calibration, and some from documents that calibration does not see.

    Sources take turns, a window each. In a source every document gives one window before long ones give more; windows
    do not overlap. Documents shorter than a window are joined, with the tokenizer's end of text between them (an empty
    line if it has none). Which documents and which places depends on the texts, the sources' names and `seed` alone.

    Args:
        tokenizer: of the model; it adds no special tokens here.
        documents: texts by the name of their source, as `read_documents` gives them, or the texts of one source. Any
            finite iterables do, a column of a data set too; a text that comes again counts once.
        num_tokens: tokens to calibrate on, rounded up to whole windows.
        window: tokens of a window.
        seed: another one gives other windows.
        num_held_out: windows to hold out, all from documents set aside, of which there are as few as can be and at
            most half of each source's characters; None takes one for each source, but 4 at least and 9 at most.
        num_uncounted: tokens of a window that do not count for `num_tokens`.

    Returns:
        ids `[n, window]` and ids held out `[m, window]`, int64.

    Raises:
        InvalidOptionError: an argument is out of range, or there is too little text.
    """
    if num_held_out is not None:
        check_integer("num_held_out", num_held_out, low=0)
    check_integer("num_tokens", num_tokens, low=1)
    check_integer("window", window, low=1)
    check_integer("num_uncounted", num_uncounted, low=0, high=window - 1)
    check_integer("seed", seed)
    sources = [_Source(name, own, seed) for name, own in _check_documents(documents).items()]
    if num_held_out is None:
        num_held_out = min(max(FEWEST_HELD_OUT, len(sources)), MOST_HELD_OUT)

    cutter = _Cutter(tokenizer, window)
    held_out = _in_turn([source.held_out(cutter) for source in sources], num_held_out)
    if len(held_out) < num_held_out:
        raise InvalidOptionError(
            f"`documents` must hold {num_held_out} windows of {window} tokens in documents that calibration does not "
            f"use, at most half of each source, got {len(held_out)}: give more documents (a line that holds a form "
            "feed separates those of a file), or lower `num_held_out` (0 holds none out) or `window`."
        )
    counted = window - num_uncounted
    wanted = -(-num_tokens // counted)
    windows = _in_turn([source.windows(cutter) for source in sources], wanted)
    if len(windows) < wanted:
        raise InvalidOptionError(
            f"`num_tokens` must be at most {len(windows) * counted}, what `documents` hold in windows of {window}"
            f"{f', of which {counted} count,' if num_uncounted else ''} beside the {num_held_out} held out, got "
            f"{num_tokens}: give more text, or lower `num_tokens` or `window`."
        )
    empty = torch.empty(0, window, dtype=torch.int64)
    return tuple(torch.stack(part) if part else empty for part in (windows, held_out))


def _check_documents(documents: Mapping[str, Iterable[str]] | Iterable[str]) -> dict[str, list[str]]:
    """The texts of each source, each text once, without blank ones and sources that hold nothing else."""
    sources, seen = {}, set()
    for name, own in documents.items() if isinstance(documents, Mapping) else [("documents", documents)]:
        if isinstance(own, (str, bytes)) or not isinstance(own, Iterable):
            raise InvalidOptionError(
                f"`documents` must be iterables of strings, got {type(own).__name__} for {name!r}: put a single text "
                "into a list, read files with `read_documents`."
            )
        kept = []
        for text in own:
            if not isinstance(text, str):
                raise InvalidOptionError(
                    f"`documents` must be strings, got {type(text).__name__} in {name!r}: pass a data set's column of "
                    "texts, several sources as a dict by name, and files through `read_documents`."
                )
            if text.strip() and text not in seen:
                seen.add(text)
                kept.append(text)
        if kept:
            sources[name] = kept
    if not sources:
        raise InvalidOptionError("`documents` must hold text, got none that is not blank.")
    return sources


class _Source:
    """The documents of a source in a random order: those set aside, and the others."""

    def __init__(self, name: str, documents: list[str], seed: int):
        self.places = f"{seed}/{name}"
        self.documents = documents
        self.order = list(range(len(documents)))
        random.Random(self.places).shuffle(self.order)
        self.aside: set[int] = set()

    def held_out(self, cutter: _Cutter) -> Iterator[Tensor]:
        """Windows of documents set aside; if they are too short for one, none is set aside."""
        fruitless = True
        for ids in cutter.windows(self._set_aside()):
            fruitless = False
            yield ids
        if fruitless:
            self.aside.clear()

    def windows(self, cutter: _Cutter) -> Iterator[Tensor]:
        """Windows of the other documents."""
        return cutter.windows(self._document(number) for number in self.order if number not in self.aside)

    def _set_aside(self) -> Iterator[tuple[str, random.Random]]:
        """Documents, each set aside when it is asked for, up to half of the characters."""
        room = sum(map(len, self.documents)) // 2
        for number in self.order:
            if len(self.documents[number]) <= room:
                room -= len(self.documents[number])
                self.aside.add(number)
                yield self._document(number)

    def _document(self, number: int) -> tuple[str, random.Random]:
        return self.documents[number], random.Random(f"{self.places}/{number}")


class _Cutter:
    """Cuts documents into windows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int):
        self.tokenizer = tokenizer
        self.window = window
        end = tokenizer.eos_token_id
        self.separator = self.encode("\n\n") if end is None else [end]

    def encode(self, text: str) -> list[int]:
        """The ids of a text by itself, without a warning that they are more than the model takes."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def windows(self, documents: Iterable[tuple[str, random.Random]]) -> Iterator[Tensor]:
        """One window of each long document, or of each few short ones joined; then the others of the long ones."""
        joined, long = [], []
        for text, place in documents:
            ids = self.encode(text)
            if len(ids) >= self.window:
                own = self._cut(ids, place)
                yield own.pop()
                long.append(own)
            elif ids:
                joined += (self.separator if joined else []) + ids
            while len(joined) >= self.window:
                yield torch.tensor(joined[: self.window])
                joined = joined[self.window :]
        while long := [own for own in long if own]:
            yield from (own.pop() for own in long)

    def _cut(self, ids: list[int], place: random.Random) -> list[Tensor]:
        """As many windows as there are, from a random start on, in a random order."""
        count = len(ids) // self.window
        start = place.randrange(len(ids) - count * self.window + 1)
        cut = list(torch.tensor(ids[start : start + count * self.window]).view(count, self.window))
        place.shuffle(cut)
        return cut


def _in_turn(sources: list[Iterator[Tensor]], count: int) -> list[Tensor]:
    """The first `count` windows, one of each source in turn, or all if they are fewer."""
    taken = []
    while sources and len(taken) < count:
        left = []
        for source in sources:
            if len(taken) < count and (ids := next(source, None)) is not None:
                taken.append(ids)
                left.append(source)
        sources = left
    return taken
