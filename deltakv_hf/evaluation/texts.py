"""Text files as documents: what windows, haystacks and examples are cut from."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidOptionError

BUNDLED_TEXT = Path(__file__).resolve().parents[1] / "data" / "persuasion.txt"


def read_text(path: Path, argument: str = "text") -> str:
    """The text of a file.

    Args:
        path: of the file.
        argument: what an error calls it.

    Raises:
        InvalidOptionError: the file cannot be read, is not UTF-8 or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise InvalidOptionError(
            f"`{argument}` must be a text file in UTF-8 that can be read, got {str(path)!r}: {reason}."
        ) from error
    if not text.strip():
        raise InvalidOptionError(f"`{argument}` must hold text, got the empty file {str(path)!r}.")
    return text


def read_documents(path: Path, argument: str = "text") -> list[str]:
    """The documents of a file, which a line that holds a form feed separates; raises as `read_text` does."""
    return read_text(path, argument).split("\n\f\n")
