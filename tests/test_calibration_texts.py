"""Windows of the user's texts: as many as asked for, none twice, no document in both parts, the same anywhere."""

import hashlib
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import byte_tokenizer

from deltakv_hf import InvalidOptionError
from deltakv_hf.calibration.texts import read_documents, token_windows

TOKENIZER = byte_tokenizer()
# of the windows below, so that a compressor can be made again
WINDOWS = "9ed0d2c7bfd4a4e962a2da23c633aba058613dcbe7fb672e50bee16466745c59"

lengths = st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=8), min_size=1, max_size=4)
windows = st.integers(16, 200)
seeds = st.integers(0, 2**40)


def document(source, number, words):
    """Words that say where they stand, so that a window tells what it was cut from."""
    return " ".join(f"<{source}.{number}.{word}>" for word in range(words))


def corpus(lengths):
    return {f"source {s}": [document(s, n, words) for n, words in enumerate(own)] for s, own in enumerate(lengths)}


def words(ids):
    """The whole words of a window: source, document, place."""
    return [tuple(map(int, word.split("."))) for word in re.findall(r"<(\d+\.\d+\.\d+)>", TOKENIZER.decode(ids))]


def documents(part):
    return {word[:2] for ids in part for word in words(ids)}


def most_tokens(texts, **options):
    """What the error about too little text names as the most; 0 if there is not even something to hold out."""
    with pytest.raises(InvalidOptionError) as error:
        token_windows(TOKENIZER, texts, num_tokens=10**9, **options)
    found = re.match(r"`num_tokens` must be at most (\d+), what `documents` hold", str(error.value))
    return int(found[1]) if found else 0


@given(lengths=lengths, window=windows, seed=seeds, num_held_out=st.sampled_from([None, 0, 1, 6]))
def test_windows_are_cut_from_documents_that_are_in_one_part_only(lengths, window, seed, num_held_out):
    texts, options = corpus(lengths), {"window": window, "seed": seed, "num_held_out": num_held_out}
    most = most_tokens(texts, **options)
    if not most:
        return
    made, held_out = token_windows(TOKENIZER, texts, num_tokens=most, **options)
    again = token_windows(TOKENIZER, texts, num_tokens=most, **options)
    assert torch.equal(made, again[0]) and torch.equal(held_out, again[1])
    assert made.dtype == held_out.dtype == torch.int64
    assert made.shape == (most // window, window)
    assert held_out.shape == (
        max(4, len([1 for own in lengths if any(own)])) if num_held_out is None else num_held_out,
        window,
    )

    assert not documents(made) & documents(held_out)
    counts = Counter(word for ids in (*made, *held_out) for word in words(ids))
    assert max(counts.values(), default=1) == 1
    whole = "\n\n".join(text for own in texts.values() for text in own)
    for ids in (*made, *held_out):
        assert all(piece in whole for piece in TOKENIZER.decode(ids).split("\n\n"))
    for number, own in enumerate(texts.values()):
        aside = sum(len(own[n]) for source, n in documents(held_out) if source == number)
        assert aside <= sum(map(len, own)) / 2


@given(lengths=lengths, window=windows, seed=seeds)
def test_fewer_tokens_are_the_first_windows_and_leave_the_held_out_ones_as_they_are(lengths, window, seed):
    texts, options = corpus(lengths), {"window": window, "seed": seed, "num_held_out": 1}
    if most := most_tokens(texts, **options):
        made, held_out = token_windows(TOKENIZER, texts, num_tokens=most, **options)
        few, same = token_windows(TOKENIZER, texts, num_tokens=most // 2 + 1, **options)
        assert len(few) == -(-(most // 2 + 1) // window)
        assert torch.equal(few, made[: len(few)]) and torch.equal(held_out, same)


@given(window=windows, seed=seeds)
def test_sources_and_documents_take_turns(window, seed):
    made, held_out = token_windows(TOKENIZER, corpus([[100] * 5] * 3), num_tokens=12 * window, window=window, seed=seed)
    assert [words(ids)[0][0] for ids in made] == [0, 1, 2] * 4
    assert [words(ids)[0][0] for ids in held_out] == [0, 1, 2, 0]
    # source 0 gave two of its five documents away and has no fourth one to go on with
    assert len(documents(made[:9])) == 9 and len(documents(made)) == 11
    assert len(documents(held_out)) == 4


def test_short_documents_are_joined_and_lose_no_token():
    ends = byte_tokenizer()
    ends.add_special_tokens({"eos_token": "</s>"})
    texts = [document(0, number, 3) for number in range(50)]
    for tokenizer, separator in ((TOKENIZER, "\n\n"), (ends, "</s>")):
        made, _ = token_windows(tokenizer, texts, num_tokens=1000, window=100, num_held_out=0)
        joined = tokenizer.decode(made.flatten()).split(separator)
        assert len(joined) > 30 and set(joined[:-1]) < set(texts) and len(set(joined)) == len(joined)


def test_a_source_too_short_to_hold_out_from_is_calibrated_on_whole():
    texts = corpus([[20], [5, 5, 5], [100] * 6])
    made, held_out = token_windows(TOKENIZER, texts, num_tokens=most_tokens(texts, window=110), window=110)
    assert {source for source, _ in documents(held_out)} == {2}
    assert {(0, 0), (1, 0), (1, 1), (1, 2)} <= documents(made)


def test_windows_stay_what_they_are():
    """In any process, on any machine: they come from texts, names and the seed alone."""
    made = token_windows(
        TOKENIZER, corpus([[100] * 6, [300, 200, 9, 9], [7] * 60]), num_tokens=4000, window=100, seed=3
    )
    assert hashlib.sha256(b"".join(part.numpy().astype("<i8").tobytes() for part in made)).hexdigest() == WINDOWS


def test_another_seed_gives_other_windows():
    texts = corpus([[100] * 6])
    parts = [token_windows(TOKENIZER, texts, num_tokens=500, window=100, seed=seed) for seed in (0, 1)]
    assert not torch.equal(parts[0][0], parts[1][0]) and not torch.equal(parts[0][1], parts[1][1])


class Column:
    """As a data set's column: it iterates, and is no list."""

    def __init__(self, texts):
        self.texts = texts

    def __iter__(self):
        return iter(self.texts)


def test_any_iterables_of_strings_will_do():
    texts = [document(0, number, 100) for number in range(6)]
    options = {"num_tokens": 300, "window": 100}
    made = token_windows(TOKENIZER, texts, **options)
    # a text that comes again, and blank ones, count for nothing
    for other in (Column(texts), (text for text in texts), {"documents": Column(texts)}, [*texts, *texts, "", " \n"]):
        assert all(map(torch.equal, token_windows(TOKENIZER, other, **options), made))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("a text", "`documents` must be iterables of strings, got str for 'documents': put a single text into a list"),
        ({"a": "a text"}, "`documents` must be iterables of strings, got str for 'a'"),
        ({"a": 3}, "`documents` must be iterables of strings, got int for 'a'"),
        ([{"text": "row"}], "`documents` must be strings, got dict in 'documents': pass a data set's column"),
        ({"a": [b"bytes"]}, "`documents` must be strings, got bytes in 'a'"),
        ([], "`documents` must hold text, got none that is not blank"),
        ({"a": ["", " \n"]}, "`documents` must hold text"),
    ],
)
def test_what_is_no_texts_is_refused(wrong, message):
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        token_windows(TOKENIZER, wrong, num_tokens=10)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_tokens": 0}, "`num_tokens` must be an integer >= 1, got 0."),
        ({"num_tokens": 1e6}, "`num_tokens` must be an integer >= 1, got 1000000.0."),
        ({"num_tokens": 1, "window": 0}, "`window` must be an integer >= 1, got 0."),
        ({"num_tokens": 1, "num_held_out": -1}, "`num_held_out` must be an integer >= 0, got -1."),
        ({"num_tokens": 1, "num_held_out": True}, "`num_held_out` must be an integer >= 0, got True."),
        ({"num_tokens": 1, "window": 8, "num_uncounted": 8}, "`num_uncounted` must be an integer from 0 to 7, got 8."),
        ({"num_tokens": 1, "seed": "0"}, "`seed` must be an integer, got '0'."),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        token_windows(TOKENIZER, ["a text"], **options)


@given(lengths=lengths, window=windows, seed=seeds, share=st.floats(0, 0.9))
def test_the_most_tokens_that_an_error_names_will_do(lengths, window, seed, share):
    """Also where a part of each window does not count; which windows come depends on their number alone."""
    texts, uncounted = corpus(lengths), int(share * window)
    options = {"window": window, "seed": seed}
    if most := most_tokens(texts, num_uncounted=uncounted, **options):
        assert most % (window - uncounted) == 0
        made, held_out = token_windows(TOKENIZER, texts, num_tokens=most, num_uncounted=uncounted, **options)
        plain = token_windows(TOKENIZER, texts, num_tokens=most_tokens(texts, **options), **options)
        assert torch.equal(made, plain[0]) and torch.equal(held_out, plain[1])
        message = f"`num_tokens` must be at most {most}, .* got {most + 1}: give more"
        with pytest.raises(InvalidOptionError, match=message):
            token_windows(TOKENIZER, texts, num_tokens=most + 1, num_uncounted=uncounted, **options)


def test_a_single_document_cannot_be_in_both_parts():
    texts = [document(0, 0, 500)]
    with pytest.raises(InvalidOptionError, match=r"`documents` must hold 4 windows of 100 tokens .* got 0: give more"):
        token_windows(TOKENIZER, texts, num_tokens=100, window=100)
    made, held_out = token_windows(TOKENIZER, texts, num_tokens=101, window=100, num_held_out=0)
    assert made.shape == (2, 100) and held_out.shape == (0, 100)


def test_files_are_read_as_documents(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "more" / "a.txt"
    second.parent.mkdir()
    first.write_bytes("\ufeffOne.\r\nTwo.\r\n\f\r\nThrée.\n\f\n \n".encode())
    second.write_text("Four.", encoding="utf-8")
    assert read_documents([first, str(second)]) == {"a.txt": ["One.\nTwo.", "Thrée."], "a.txt (2)": ["Four."]}
    assert read_documents(first) == read_documents(str(first)) == {"a.txt": ["One.\nTwo.", "Thrée."]}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "`paths` must be a text file in UTF-8 that can be read, got {path}: No such file or directory."),
        (
            "Text.".encode("utf-16"),
            "`paths` must be a text file in UTF-8 that can be read, got {path}: not UTF-8 at byte",
        ),
        ("Text.".encode("utf-16-le"), "`paths` must be text files, got the binary file {path}: leave it out."),
        (b"\n\f\n", "`paths` must hold text, got the empty file {path}."),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidOptionError, match=re.escape(message.format(path=repr(str(path))))):
        read_documents([path])


def test_no_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InvalidOptionError, match="`paths` must name one file or more"):
        read_documents([])
    with pytest.raises(InvalidOptionError, match="`paths` must be a text file .*: Is a directory"):
        read_documents(tmp_path)
