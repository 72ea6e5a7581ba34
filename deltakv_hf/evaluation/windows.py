"""Windows of tokens cut from text files: what fidelity is measured on."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ..errors import InvalidOptionError
from .texts import read_documents


def text_windows(tokenizer, path: Path, num_tokens: int, count: int) -> list[torch.Tensor]:
    """Cuts `count` windows of `num_tokens` contiguous tokens, each from one document long enough.

    Args:
        tokenizer: of the model.
        path: text file; documents are separated by a line that holds a form feed.
        num_tokens: length of a window.
        count: windows, at places that depend on the file's name and the window's number alone.

    Returns:
        ids `[num_tokens]` int64 each.

    Raises:
        InvalidOptionError: the file cannot be read, or no document in it is long enough.
    """
    documents = read_documents(path)
    windows = []
    for number in range(count):
        place = random.Random(f"{path.stem}/{number}")
        order = place.sample(range(len(documents)), len(documents))
        for document in (documents[i] for i in order):
            ids = tokenizer(document, add_special_tokens=False).input_ids
            if len(ids) >= num_tokens:
                start = place.randrange(len(ids) - num_tokens + 1)
                windows.append(torch.tensor(ids[start : start + num_tokens]))
                break
        else:
            raise InvalidOptionError(
                f"`text` must hold a document of {num_tokens} tokens or more, {path.name!r} has none."
            )
    return windows
