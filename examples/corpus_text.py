"""Plain text from what packages hold: pages, wikitext, an R database, chats. Used by build_corpus.py."""

import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser


def clean_text(text: str) -> str:
    """Without carriage returns, form feeds, blanks at the end of lines, and runs of empty lines."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", "").replace("\f", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Page(HTMLParser):
    SKIPPED = frozenset(("script", "style", "head", "nav", "footer"))
    BLOCKS = frozenset("p div li h1 h2 h3 h4 h5 tr pre dt dd blockquote br table ul".split())

    def __init__(self):
        super().__init__()
        self.parts, self.skipped, self.preformatted = [], 0, 0

    def handle_starttag(self, tag, attrs):
        self.skipped += tag in self.SKIPPED
        self.preformatted += tag == "pre"
        self.parts += ["\n"] * (tag in self.BLOCKS)

    def handle_endtag(self, tag):
        self.skipped -= tag in self.SKIPPED and self.skipped > 0
        self.preformatted -= tag == "pre" and self.preformatted > 0
        self.parts += ["\n"] * (tag in self.BLOCKS)

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    """What a page says, a line for each block; the parser is not closed, so an unfinished tag at the end is dropped."""
    parser = _Page()
    parser.feed(page)
    return "".join(parser.parts)


def wikitext_to_text(text: str) -> str:
    """An article without comments, references, templates, tables, files and the lists at its end."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math>.*?</math>", "", text, flags=re.DOTALL)
    for _ in range(4):  # nested ones, from the inside
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    inner = r"[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*"
    text = re.sub(rf"\[\[(?:File|Image|Category|[a-z\-]{{2,10}}):{inner}\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}|<[^>]+>|^\s*[|!{}].*$", "", text, flags=re.MULTILINE)
    ending = "See also|References|External links|Further reading|Notes|Bibliography"
    return re.sub(rf"\n==+ *({ending})[\s\S]*", "", text)


def r_texts(database: bytes) -> Iterator[list[str]]:
    """The lines of each long text in a lazy-load database of R: zlib streams of serialized vectors of strings."""
    place = 0
    while (start := database.find(b"\x78", place)) >= 0:
        stream = zlib.decompressobj()
        try:
            vector = stream.decompress(database[start:]) + stream.flush()
        except zlib.error:
            place = start + 1
            continue
        place = max(start + 1, len(database) - len(stream.unused_data))
        lines, at = [], vector.find(b"\x00\x00\x00\x10") + 8
        while len(vector) > 100_000 and at + 8 <= len(vector) and vector[at + 3] == 9:
            size = max(int.from_bytes(vector[at + 4 : at + 8], "big", signed=True), 0)
            lines.append(vector[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        if lines:
            yield lines


def chat_lines(chat: dict) -> list[str]:
    """A line for each message, speakers called A and B."""
    speakers, lines = {}, []
    for message in (message for turn in chat["messages"] for message in turn):
        speaker = speakers.setdefault(message["sender"], "AB"[len(speakers) % 2])
        lines.append(f"Speaker {speaker}: {message['text'].strip()}")
    return lines
