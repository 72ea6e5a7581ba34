"""`deltakv inspect --joint`: what it shows is what the cache says; its pictures, its own batch, yours, and errors."""

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("typer")
from commands import assert_refused, run  # noqa: E402
from models import byte_llama, byte_tokenizer, saved_byte_llama, tiny_model  # noqa: E402

from deltakv_hf import JointEncodedCache  # noqa: E402
from deltakv_hf.cli import joint_figures  # noqa: E402
from deltakv_hf.cli.inspect_joint import passages_in_orders, read_rows  # noqa: E402
from deltakv_hf.evaluation.texts import BUNDLED_TEXT  # noqa: E402
from deltakv_hf.joint_config import JointEncodingConfig  # noqa: E402
from deltakv_hf.rate_distortion import GRID, predict  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"
MAX_POSITIONS = 512
SMALL = ("--length", 256, "--block-size", 8, "--rows", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random llama with a tokenizer, saved."""
    return saved_byte_llama(tmp_path_factory.mktemp("llama"), MAX_POSITIONS)


def shown(*arguments) -> dict:
    """The JSON of a run."""
    result = run("inspect", *arguments, "--joint", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def expected(rows: list[list[int]], **options) -> JointEncodedCache:
    return read_rows(byte_llama(MAX_POSITIONS), rows, JointEncodingConfig(**options))


def as_json(cache: JointEncodedCache) -> list[dict]:
    return json.loads(json.dumps([asdict(plan) for plan in cache.rate_distortion()]))


@pytest.mark.parametrize(
    "flags, options",
    [
        ([], {"max_relative_error": 0.4}),
        (["--max-relative-error", 0.7, "--rope", "rotated"], {"max_relative_error": 0.7, "rope": "rotated"}),
        (["--target-ratio", 0.6, "--scope", "batch"], {"target_ratio": 0.6, "scope": "batch"}),
    ],
)
def test_what_is_shown_is_what_the_cache_says(folder, flags, options):
    found = shown(folder, *SMALL, *flags)
    ids = byte_tokenizer()(BUNDLED_TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    rows = passages_in_orders(ids, 3, 256, 8)
    cache = expected(rows, block_size=8, **options)
    assert found["layers"] == as_json(cache) and len(found["layers"]) == 2
    assert (found["rows"], found["tokens"], found["dtype"]) == (3, 256, "float32")
    assert found["options"] == asdict(cache.options) and found["errors"] == list(GRID)
    report, exact = cache.memory_report(), expected(rows, block_size=8).memory_report()
    total = found["total"]
    assert (total["ratio"], total["exact_ratio"]) == (report.ratio, exact.ratio)
    # what all rows begin with is shared by any cache, passages in another order by this one
    beginnings = {tuple(row[:end]) for row in rows for end in range(8, 257, 8)}
    assert total["ratio"] < total["exact_ratio"] < 1 and total["blocks"] == len(beginnings) < 3 * 32
    assert total["sharing_layers"] == 2 and found["layers"][0]["achieved_kept"] < 0.8


def test_the_tables_and_the_picture(folder, tmp_path):
    png = tmp_path / "joint.png"
    png.write_text("old")
    result = run("inspect", folder, "--joint", *SMALL, "--png", png)
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(PNG) and list(tmp_path.iterdir()) == [png]
    found = shown(folder, *SMALL)
    # lines are folded wherever they end
    printed = "".join(result.output.split())
    for words in ("3 rows of 256 tokens, blocks of 8", "with equal blocks alone", png.name):
        assert words.replace(" ", "") in printed
    for layer in found["layers"]:
        assert f"{layer['predicted_kept']:.1%}" in result.output and f"{layer['achieved_kept']:.1%}" in result.output
    for row in found["thresholds"]:
        assert f"{row['kept']:.1%}" in result.output
    assert [row["max_relative_error"] for row in found["thresholds"]] == pytest.approx([i / 10 for i in range(1, 10)])
    for curve in ("kept", "kept_poisson"):
        shares = [layer[curve][GRID.index(0.5)] for layer in found["layers"]]
        assert found["thresholds"][4][curve] == pytest.approx(sum(shares) / 2)
    assert f"{found['total']['ratio']:.1%}" in result.output and f"{found['total']['exact_ratio']:.1%}" in result.output


def test_layers_that_are_left_alone_are_named_and_no_match_has_no_error():
    cosines = torch.full((20, 20), 0.1).fill_diagonal_(-torch.inf)
    plan = predict(cosines, 0, 0, 0.5, None)
    alone = replace(plan, is_left_alone=True)
    figures = {"model": "[m]", "dtype": "float32", "rows": 2, "tokens": 9, "options": {"block_size": 4}}
    table = joint_figures.layer_table(figures, [plan, alone])
    assert list(table.columns[-1].cells) == ["", "left alone"]
    assert len(joint_figures.layer_table(figures, [plan]).columns) == len(table.columns) - 1
    assert all(row["error"] is None and row["kept"] == 1 for row in joint_figures.thresholds([plan]))
    figures["total"] = {"ratio": 1.0, "exact_ratio": 1.0}
    assert joint_figures.chart(figures, [plan, alone]).startswith(PNG)


def test_your_texts_are_rows_padded_at_the_left(folder, tmp_path):
    """One begins with the other: the same blocks, whatever stands before it."""
    text = BUNDLED_TEXT.read_text(encoding="utf-8")[:640]
    for name, content in (("a.txt", text), ("b.txt", f"{text[:200]}\n\f\n{text[400:]}\n\f\n \n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    texts = "--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt"
    found = shown(folder, *texts, "--length", 320, "--block-size", 8)
    tokens = list(text.encode())
    assert (found["rows"], found["tokens"]) == (3, 320)
    # 200 are 25 blocks of the first row too
    assert found["total"]["blocks"] == 40 + 240 // 8
    rows = [tokens[:320], tokens[:200], tokens[400:]]
    rows = [byte_tokenizer()(bytes(row).decode(), add_special_tokens=False).input_ids for row in rows]
    assert found["layers"] == as_json(expected(rows, block_size=8, max_relative_error=0.4))
    assert found["total"]["exact_ratio"] < 1


@pytest.mark.parametrize("length, block_size, width", [(512, 16, 64), (100, 8, 8), (1000, 16, 112), (7, 8, 0)])
def test_passages_begin_where_blocks_begin(length, block_size, width):
    ids = list(range(2000))
    rows = passages_in_orders(ids, 4, length, block_size)
    assert all(sorted(row) == ids[:length] for row in rows)
    if width == 0:
        assert rows == [ids[:7]] * 4
        return
    assert len({tuple(row) for row in rows}) == 4 and all(row[:width] == ids[:width] for row in rows)
    for row in rows:
        starts = [place for place in range(0, length, width) if row[place] % width == 0]
        assert starts == list(range(0, length, width)) and width % block_size == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--max-relative-error", 1.5], ["max_relative_error", "0 to below 1", 1.5]),
        (["--max-relative-error", 0], ["--max-relative-error", "above 0", "--target-ratio"]),
        (["--target-ratio", 2], ["target_ratio", "between 0 and 1", 2]),
        (["--scope", "some"], ["scope", "all, batch", "some"]),
        (["--scope", "none"], ["--scope", "none", "leave it out"]),
        (["--rope", "straight"], ["rope", "stripped, rotated", "straight"]),
        (["--block-size", 0], ["block_size", 0]),
        (["--length", MAX_POSITIONS + 1], ["--length", MAX_POSITIONS, MAX_POSITIONS + 1, "lower it"]),
        (["--length", 20], ["16 different blocks", "got 1 of 16", "--length", "--block-size"]),
        (["--text", "missing.txt"], ["--text", "missing.txt", "No such file"]),
        (["--png", "missing/x.png"], ["--png", "missing/x.png"]),
        (["--nbits", 4], ["--nbits", "left out with `--joint`", 4]),
    ],
)
def test_bad_input_is_refused(folder, arguments, words):
    assert_refused(run("inspect", folder, "--joint", *arguments), *words)


def test_rows_are_of_the_bundled_text(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text. " * 30)
    assert_refused(run("inspect", folder, "--joint", "--text", text, "--rows", 3), "--rows", "--text", 3)
    text.write_text(" ")
    assert_refused(run("inspect", folder, "--joint", "--text", text), "--text", "empty")


@pytest.mark.parametrize("flag, value", [("--scope", "all"), ("--png", "x.png"), ("--text", "x.txt"), ("--rows", 2)])
def test_what_is_about_joint_caches_needs_joint(folder, flag, value):
    assert_refused(run("inspect", folder, flag, value), flag, "come with `--joint`", value)


def test_a_model_whose_layers_all_slide_is_refused(tmp_path):
    model = tiny_model("mistral-sliding")
    model.resize_token_embeddings(256)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert_refused(run("inspect", tmp_path, "--joint", *SMALL), "model", "full attention", "got none")
