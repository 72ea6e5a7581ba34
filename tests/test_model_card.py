"""The model card of a compressor: metadata that the Hub can read and a text, whatever is in it."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltakv_hf.compressor.card import model_card

CONFIG = {
    "kind": "linear",
    "share": 0.2917,
    "license": "apache-2.0",
    "model": {"id": "someone/small", "revision": "a" * 40},
    "measured": [
        {"text": "Persuasion", "kl": 0.0024512, "top1": 0.968, "delta_nll": -0.01, "bytes_per_token": 12345},
        {"text": "Emma", "kl": 0.0026, "note": "half | as long"},
    ],
    "calibration": {
        "text": [{"source": "Emma", "license": "public domain", "tokens": 20000}, "my notes"],
        "command": "deltakv calibrate someone/small",
        "device": "cpu",
        "seconds": {"reading": 61.237, "measuring": 5},
        "versions": {"torch": "2.13.0", "deltakv-hf": "0.1.0"},
    },
    "limits": ["English prose only."],
}
HEADINGS = ["How to use it", "What was measured", "What it was calibrated on", "How it was made", "Limits"]
NASTY = [
    "a: b",
    "'single' \"double\"",
    "two\nlines",
    "---",
    "x\n---\ny: 1",
    "日本語 é 🙂",
    "a | b",
    "# no",
    "- - -",
    "[x](y)",
]
NASTY += [
    "<script>",
    "```",
    "`tick`",
    "{{ card_data }}",
    "{% if %}",
    "\\",
    "\x00\x1b[31m",
    "\u2028",
    "\ud800",
    "yes",
    "",
]
NASTY += ["null", "1.0", "&a *a", "!!python/object:os.system", "%TAG", "@x", "|", ">", "*", " ", "\t", "#", ": ", "- "]


def parts(card):
    """Metadata and text."""
    assert card.startswith("---\n") and card.endswith("\n")
    return yaml.safe_load(card.split("\n---\n")[0][4:]), card.split("\n---\n", 1)[1]


def assert_sound(card):
    """The Hub's metadata are ours alone, and nothing from outside made a heading, a fence or a column."""
    data, text = parts(card)
    assert data.keys() <= {"base_model", "library_name", "license", "tags"}
    assert data["library_name"] == "deltakv-hf" and data["tags"] == ["kv-cache", "compression", "deltakv"]
    assert all(isinstance(data.get(name, ""), str) for name in ("base_model", "license"))
    assert ModelCard(card).data.to_dict() == data
    lines = text.splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == HEADINGS
    assert [line[:2] for line in lines].count("# ") == 1
    assert [line for line in lines if line.startswith("```")] == ["```python", "```"]
    compile(text.split("```python\n")[1].split("\n```\n")[0], "example", "exec")
    table = [line for line in text.split("## What was measured")[1].split("## ")[0].splitlines() if line]
    if table != ["Not measured."]:
        # unescaped bars
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table}) == 1
    prose = re.sub(r"```python.*?\n```|`[^`]*`", "", text, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", prose) and "\x1b" not in text
    return data, text


def test_a_card_says_all_that_is_known():
    data, text = assert_sound(model_card(CONFIG, "someone/small-compressor"))
    assert (data["base_model"], data["license"]) == ("someone/small", "apache-2.0")
    assert "pipeline_tag" not in data
    for line in (
        "# someone/small-compressor",
        "| Base model | [someone/small](https://huggingface.co/someone/small) |",
        "| Share of the full cache's bytes | 29.2% |",
        'cache = DeltaKVCache.from_pretrained("someone/small-compressor", model=model)',
        "| text | KL | top-1 | ΔNLL | bytes a token | note |",
        "| Persuasion | 0.002451 | 0.968 | -0.01 | 12,345 | – |",
        r"| Emma | 0.0026 | – | – | – | half \| as long |",
        "- Emma (licence: public domain); tokens: 20,000",
        "- my notes (licence: unknown)",
        "- `deltakv calibrate someone/small`",
        "- seconds on cpu: reading 61.24, measuring 5",
        "- deltakv-hf 0.1.0, torch 2.13.0",
        "- English prose only.",
    ):
        assert line in text.splitlines(), line
    assert f"at revision `{'a' * 40}`" in text


@pytest.mark.parametrize(
    "config", [{}, dict.fromkeys(CONFIG), {name: {} for name in CONFIG}, {"measured": [], "model": {}}]
)
def test_what_is_missing_is_said_to_be(config):
    data, text = assert_sound(model_card(config))
    assert "base_model" not in data and "license" not in data
    for words in ("Not measured.", "No text is noted.", "Not noted.", "an unknown model", "not noted"):
        assert words in text


def test_only_an_id_on_the_hub_is_a_base_model():
    for name in ("my-folder", "a/b/c", "has spaces/x"):
        data, text = assert_sound(model_card({"model": {"id": name}}))
        assert "base_model" not in data and name in text


def filled(text):
    """CONFIG with `text` wherever a text may be."""
    return {
        "kind": text,
        "share": text,
        "license": text,
        "model": {"id": text, "revision": text},
        "measured": [{text: text, "kl": text}, {"kl": 1}],
        "calibration": {"text": [{"source": text, "license": text, text: text}, text], "command": text, "seconds": text}
        | {"versions": {text: text}},
        "limits": [text],
    }


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_stay_texts(text):
    assert_sound(model_card(filled(text), text))


@given(st.text(max_size=20) | st.lists(st.sampled_from(NASTY), max_size=4).map("".join), st.sampled_from(list(CONFIG)))
def test_any_text_stays_a_text(text, name):
    assert_sound(model_card(CONFIG | {name: filled(text)[name]}, text))


def test_an_example_with_quotes_is_still_python():
    text = parts(model_card({"model": {"id": 'a "b" \\ c'}}))[1]
    assert r'model = AutoModelForCausalLM.from_pretrained("a \"b\" \\ c")' in text


def test_training_is_told_of():
    training = {
        "steps": 100,
        "held_out_kl": {"before": 0.00152, "after": 0.00117},
        "text": [{"source": "drama.txt", "license": "public domain"}],
        "command": "deltakv train demo",
    }
    text = parts(model_card(CONFIG | {"training": training}))[1]
    assert "in 100 steps: KL on held-out text 0.00152 before, 0.00117 after" in text
    assert "trained on drama.txt (licence: public domain)" in text and "`deltakv train demo`" in text
    assert "trained through" not in parts(model_card(CONFIG))[1]
