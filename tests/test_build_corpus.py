"""The corpus of examples/build_corpus.py, offline: text out of pages and archives, the split, files, packages."""

import json
import os
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import build_corpus
import corpus_packages
from build_corpus import DOMAINS, Domain, split_documents
from corpus_packages import DEBIAN, PYPI, CorpusError, Packages
from corpus_text import chat_lines, clean_text, html_to_text, r_texts, wikitext_to_text


@given(st.text(alphabet="ab \t\r\n\f"))
def test_clean_text_leaves_nothing_that_could_separate_documents(text):
    clean = clean_text(text)
    assert not set("\r\f") & set(clean) and "\n\n\n" not in clean and " \n" not in clean
    assert clean == clean_text(clean) == clean.strip()
    assert [letter for letter in clean if letter in "ab"] == [letter for letter in text if letter in "ab"]


def test_pages_become_lines():
    page = (
        "<html><head><title>no</title></head><body><nav>no</nav><h1>A &amp;\n B</h1><p>one\n  <b>two</b></p>"
        "<pre>x\n  y</pre><script>no()</script><ul><li>three</ul></body></html>"
    )
    assert clean_text(html_to_text(page)) == "A & B\n\none two\n\nx\n  y\n\nthree"


def test_articles_lose_their_markup():
    article = (
        "{{Infobox|a={{b}}}}'''Anarchism''' is a [[political philosophy|philosophy]]<ref>no</ref> of [[freedom]].\n"
        "[[File:x.png|thumb|a [[flag]]]]{| no |}<!-- no -->See [http://a.b the page].\n| no\n== Notes ==\nno"
    )
    assert clean_text(wikitext_to_text(article)) == "Anarchism is a philosophy of freedom.\nSee the page."


def r_strings(lines):
    """A vector of strings as R serializes it, compressed as in a lazy-load database."""
    strings = b"".join(b"\x00\x04\x00\x09" + len(line).to_bytes(4, "big") + line for line in map(str.encode, lines))
    vector = b"X\n\x00\x00\x00\x02" + b"\x00\x00\x00\x10" + len(lines).to_bytes(4, "big") + strings
    stream = zlib.compress(vector)
    return (len(vector)).to_bytes(4, "big") + stream


def test_novels_are_read_from_a_database_of_r():
    novels = [["EMMA", "", *(f"line {i} of Émma" for i in range(9000))], ["PERSUASION", "", *("x" * 70,) * 2000]]
    assert list(r_texts(r_strings(novels[0]) + r_strings(["short"]) + b"xx" + r_strings(novels[1]))) == novels
    assert list(r_texts(b"")) == []


def test_speakers_have_no_names():
    chat = {
        "messages": [
            [{"sender": "u1", "text": " Hi "}, {"sender": "u1", "text": "?"}],
            [{"sender": "u2", "text": "Yo"}],
        ]
    }
    assert chat_lines(chat) == ["Speaker A: Hi", "Speaker A: ?", "Speaker B: Yo"]


@given(st.lists(st.tuples(st.integers(0, 99).map(str), st.integers(400, 5000)), max_size=40), st.integers(0, 30_000))
def test_a_document_goes_to_one_part_whole(sizes, most):
    documents = [(name, "x" * size) for name, size in sizes]
    parts = split_documents(documents, Domain(lambda packages: [], lambda name: name.endswith("7"), most, {}))
    for part, is_part in (("train", lambda name: name[-1] != "7"), ("heldout", lambda name: name[-1] == "7")):
        texts = [text for name, text in documents if is_part(name) and len(text) >= 500]
        kept = parts.get(part, [])
        assert kept == texts[: len(kept)]
        limit = most if part == "train" else build_corpus.MOST_HELD_OUT
        assert sum(map(len, kept[:-1])) <= limit and (kept == texts or sum(map(len, kept)) > limit)


@pytest.mark.parametrize(
    "domain, held_out, train",
    [
        ("fiction", "PERSUASION", "EMMA"),
        ("drama", "macbeth_gut.txt", "othello_gut.txt"),
        ("bible", "Acts", "Gen"),
        ("nonfiction", "secH3.html", "secH2.html"),
        ("dialogue", "chat00300", "chat00330"),
        ("wiki", "Algeria", "ASCII"),
        ("techdoc", "linux:arm64/sme.rst.gz", "linux:PCI/msi-howto.rst.gz"),
        ("code", "std:argparse.py", "std:__future__.py"),
    ],
)
def test_the_split_stays_what_it_is(domain, held_out, train):
    """What was measured on held-out text was measured on these."""
    assert DOMAINS[domain].is_held_out(held_out) and not DOMAINS[domain].is_held_out(train)


def test_every_text_has_a_licence_and_a_version():
    packages = {package for domain in DOMAINS.values() for package in domain.licences}
    assert packages == {*DEBIAN, *PYPI, "CPython", "torch"}
    assert all(licence for domain in DOMAINS.values() for licence in domain.licences.values())


def test_the_corpus_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(packages):
        raise CorpusError("gone")

    texts = [(name, name * 600) for name in "abc"]
    monkeypatch.setattr(build_corpus, "DOMAINS", {"one": Domain(lambda _: texts, "b".__eq__, 9e9, {"torch": "BSD"})})
    out = tmp_path / "out"
    for _ in range(2):
        build_corpus.build(out, Packages(tmp_path / "packages"))
        assert (out / "train" / "one.txt").read_text() == "a" * 600 + "\n\f\n" + "c" * 600
        assert (out / "heldout" / "one.txt").read_text() == "b" * 600
    noted = json.loads((out / "SOURCES.json").read_text())["one"]
    assert noted["packages"]["torch"]["licence"] == "BSD" and noted["train"]["documents"] == 2

    build_corpus.DOMAINS["two"] = Domain(fails, str.isupper, 0, {})
    with pytest.raises(CorpusError, match="gone"):
        build_corpus.build(out, Packages(tmp_path / "packages"))
    assert os.listdir(tmp_path) == ["out"] and (out / "SOURCES.json").exists()


def test_a_folder_of_the_user_is_not_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["build_corpus.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        build_corpus.main()
    assert "OUT must be a new folder or an old corpus" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder that is alone on the PATH, and a function that puts a program there."""
    folder = tmp_path / "programs"
    folder.mkdir()

    def put(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(folder))
    return put


def test_packages_are_downloaded_once_and_tell_their_version(tmp_path, programs):
    programs("apt-get", "echo 1 > bible-kjv_1%3a4.38_amd64.deb")
    programs("dpkg", 'case "$2" in *.deb) echo text > "$3";; esac')
    for _ in range(2):
        packages = Packages(tmp_path / "kept")
        assert packages.get("bible-kjv").read_text() == "text\n"
        assert packages.versions["bible-kjv"] == "1:4.38"
        programs("apt-get", "exit 1")


def test_what_keeps_packages_from_coming_is_said(tmp_path, programs, monkeypatch):
    packages = Packages(tmp_path / "kept")
    with pytest.raises(CorpusError, match="`apt-get` must be on the PATH, it is not: run this on Debian 12"):
        packages.get("perl-doc")
    programs("dpkg", "")
    programs("apt-get", "echo \"E: Version '5' for 'perl-doc' was not found\" >&2; exit 100")
    with pytest.raises(CorpusError, match="perl-doc=5.* is not served any more, .*--any-version takes the version"):
        packages.get("perl-doc")
    programs("apt-get", "echo 'E: disk full' >&2; exit 100")
    with pytest.raises(CorpusError, match="perl-doc=.*: E: disk full"):
        packages.get("perl-doc")
    monkeypatch.setattr(corpus_packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match="pip must be in this Python, it is not"):
        packages.get("gensim")
    assert list((tmp_path / "kept").iterdir()) == []
