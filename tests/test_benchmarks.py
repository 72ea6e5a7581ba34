"""Published benchmarks: files read as they are published, prompts as token ids, and the command on a tiny model.

The samples have the form of the published data; what they say is invented.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import assert_refused, run
from helpers import TIGHT
from models import build, byte_llama, byte_tokenizer
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache
from deltakv_hf.evaluation import peers
from deltakv_hf.evaluation.benchmarks import load_benchmark, run_benchmark, runner, summarize
from deltakv_hf.evaluation.benchmarks.prompts import Frame, chat_frame, encode_item
from deltakv_hf.evaluation.runner import FULL

SAMPLES = Path(__file__).parent / "samples"
OWN = ", ".join(f"{option}={value}" for option, value in TIGHT.items())
# of SmolLM2's kind, white space around texts stripped as many do
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def sharp_llama():
    """A byte llama whose answers depend on all that it reads."""
    config = byte_llama().config
    config.initializer_range = 0.3
    return build(config)


def sample(name: str) -> Path:
    return SAMPLES / f"{name}.jsonl"


def one(format_name: str, name: str, **options):
    """The first item of a sample."""
    return load_benchmark(format_name, [sample(name)], limit=1, **options)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny random llama with a tokenizer, saved."""
    path = tmp_path_factory.mktemp("llama")
    byte_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


def test_longbench_items_go_by_their_dataset():
    items = load_benchmark("longbench", [sample("longbench")])
    names = ["qasper", "gov_report", "trec", "samsum", "passage_retrieval_en", "passage_count", "lcc", "dureader"]
    assert [item.dataset for item in items] == [*names, "multifieldqa_zh"]
    assert [item.turns[0].max_new_tokens for item in items] == [128, 512, 64, 128, 32, 32, 64, 128, 64]
    assert [item.dataset for item in items if not item.chat] == ["trec", "samsum", "lcc"]
    assert [item.dataset for item in items if item.stop_at_newline] == ["samsum"]
    assert all(item.own_prompt and item.context is None for item in items)
    for item in items:
        (turn,) = item.turns
        assert turn.metric(turn.answers[0], turn.answers) == pytest.approx(1)
        assert turn.metric("", turn.answers) == 0
    # the best of the right answers counts, and of examples the first line alone
    assert items[0].turns[0].metric("in Ostrava", items[0].turns[0].answers) == 1
    assert items[2].turns[0].metric("\nPerson\nPlace", ("Person",)) == 1
    assert items[4].turns[0].metric("2 or 1", ("Paragraph 2",)) == 0.5


def test_the_users_prompts_and_lengths_are_taken(tmp_path):
    prompts, lengths = tmp_path / "dataset2prompt.json", tmp_path / "dataset2maxlen.json"
    prompts.write_text(json.dumps({"qasper": "Read: {context} Say: {input}", "other": "{context}"}))
    lengths.write_text('{"qasper": 7}')
    item = one("longbench", "longbench", prompts=prompts, max_lengths=lengths)
    assert item.turns[0].question.startswith("Read: The probe") and item.turns[0].question.endswith("built?")
    assert item.turns[0].max_new_tokens == 7 and not item.own_prompt
    assert one("longbench", "longbench", max_lengths=9).turns[0].max_new_tokens == 9
    assert item.digest != one("longbench", "longbench", max_lengths=9).digest
    prompts.write_text(json.dumps({"scbench_mf": {"context": "C {context}", "question": "Q {input}"}}))
    item = one("scbench", "scbench_mf", prompts=prompts)
    assert (item.context, item.turns[0].question) == ("C [4, 18, 2, 9]", "Q The largest number is:")


def test_ruler_tasks_go_by_the_name_of_the_file_or_its_folder(tmp_path):
    items = load_benchmark("ruler", [sample("niah_single_1"), sample("qa_1")])
    assert [(item.dataset, item.turns[0].max_new_tokens) for item in items] == [
        *[("niah_single_1", 128)] * 2,
        ("qa_1", 32),
    ]
    assert items[0].turns[0].prefix == " The number is" and items[2].turns[0].prefix == ""
    assert not any(item.own_prompt for item in items)
    path = tmp_path / "cwe" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text('{"index": 0, "input": "Words: a b", "outputs": ["a", "b"], "length": 9}\n')
    (item,) = load_benchmark("ruler", [path])
    assert (item.dataset, item.turns[0].max_new_tokens) == ("cwe", 120)
    assert load_benchmark("ruler", [path], task="vt")[0].dataset == "vt"


def test_scbench_questions_share_a_context():
    item = one("scbench", "scbench_kv")
    assert item.context.endswith('"e012": "41aa"}') and len(item.turns) == 3
    assert (item.turns[2].answers, item.turns[2].golden) == (("41aa",), "41aa")
    item = one("scbench", "scbench_choice_eng")
    assert item.turns[0].answers == ("bees", "B") and "\nB. bees\n" in item.turns[0].question
    assert item.turns[0].golden == "bees" and item.own_prompt
    item = one("scbench", "scbench_vt")
    assert item.turns[0].metric("QZX", item.turns[0].answers) == 0.5 and not item.own_prompt
    assert item.turns[0].golden == "['QZX', 'PLM']"
    item = one("scbench", "scbench_summary_with_needles")
    assert [(turn.dataset.split(": ")[1], turn.max_new_tokens) for turn in item.turns] == [
        ("scbench_summary", 800),
        ("scbench_passkey", 15),
    ]


def test_problems_have_a_number_as_the_answer(tmp_path):
    items = load_benchmark("aime", [sample("aime24")])
    assert [item.turns[0].answers for item in items] == [("75",), ("210",)]
    assert r"\boxed{}" in items[0].turns[0].question and items[0].dataset == "aime24"
    items = load_benchmark("gsm8k", [sample("gsm8k")])
    assert [item.turns[0].answers for item in items] == [("#### 19",), ("#### 1200",)]
    path = tmp_path / "aime.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "solution": r"First \boxed{1}, then \boxed{2}."}))
    assert load_benchmark("aime", [path])[0].turns[0].answers == ("2",)


LONGBENCH = {"input": "", "context": "c", "answers": ["a"], "dataset": "qasper", "all_classes": None}


@pytest.mark.parametrize(
    "format_name, name, line, words",
    [
        ("longbench", "x", "{oops", ["line 2", "JSON", "{oops"]),
        ("longbench", "x", "[1]", ["line 2", "JSON object", "[1]"]),
        ("longbench", "x", {"input": ""}, ["line 2", "`dataset` must be a text, which is missing"]),
        ("longbench", "x", LONGBENCH | {"dataset": "nq"}, ["`dataset` must be one of narrativeqa", "got 'nq'"]),
        ("longbench", "x", LONGBENCH | {"answers": []}, ["`answers` must be a list of texts", "got []"]),
        ("longbench", "x", LONGBENCH | {"context": 3}, ["`context` must be a text, got 3"]),
        ("longbench", "x", LONGBENCH | {"dataset": "trec"}, ["`all_classes` must be a list", "got None"]),
        ("longbench", "x", LONGBENCH | {"dataset": "passage_retrieval_en"}, ["`answers` must be like `Paragraph 1`"]),
        ("ruler", "niah_1", {"input": "a"}, ["`outputs` must be a list", "which is missing"]),
        ("ruler", "unknown", {"input": "a"}, ["`task` must be one of niah", "'unknown'", "x.jsonl or the like"]),
        ("scbench", "scbench_kv", {"context": "c"}, ["`multi_turns` must be a list of objects"]),
        ("scbench", "scbench_kv", {"multi_turns": []}, ["`context` must be a text, which is missing"]),
        ("scbench", "scbench_kv", {"context": "c", "multi_turns": [{"input": "i"}]}, ["`multi_turns[0].answer`"]),
        ("scbench", "scbench_repoqa", {"context": "c"}, ["`task` must be one of", "scbench_repoqa"]),
        ("aime", "x", {"problem": "p", "answer": "1000"}, ["`answer` must be an integer of 0 to 999, got '1000'"]),
        ("aime", "x", {"problem": "p", "solution": "3"}, ["`solution` must be", r"\boxed{}"]),
        ("gsm8k", "x", {"question": "q", "answer": "19"}, ["`answer` must be a text with the number behind `####`"]),
        ("gsm8k", "x", {"question": "q"}, ["`answer` must be a text, which is missing"]),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path, format_name, name, line, words):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError) as caught:
        load_benchmark(format_name, [path])
    assert path.name in str(caught.value)
    for word in words:
        assert word.replace("x.jsonl or the like", path.name) in str(caught.value)


def test_other_arguments_are_refused(tmp_path):
    path = tmp_path / "given.json"

    def refused(words, content="", **options):
        path.write_text(content or "{}")
        with pytest.raises(ValueError, match=words):
            load_benchmark("longbench", [sample("longbench")], **options)

    refused("`prompts` must be a JSON file", "no", prompts=path)
    refused("`prompts` must hold an object of templates", '{"qasper": 3}', prompts=path)
    refused("`prompts` must have an entry for the dataset 'qasper'", prompts=path)
    refused("`prompts` of the dataset 'qasper' must be a template.*KeyError", '{"qasper": "{what}"}', prompts=path)
    refused("`prompts` of the dataset 'qasper' must be a template", '{"qasper": "{"}', prompts=path)
    refused("`max_lengths` must hold an object of numbers", '{"qasper": "3"}', max_lengths=path)
    refused("`max_lengths` of the dataset 'qasper' must be positive, got 0", '{"qasper": 0}', max_lengths=path)
    refused("`max_lengths` must be a positive number", max_lengths=0)
    with pytest.raises(ValueError, match="`format` must be .*Did you mean `longbench`"):
        load_benchmark("longbenhc", [])
    with pytest.raises(ValueError, match="`file` must be one for each dataset, got 'gsm8k.jsonl' with 'gsm8k' again"):
        load_benchmark("gsm8k", [sample("gsm8k"), sample("gsm8k")])
    path.write_text('{"scbench_kv": "{context}"}')
    with pytest.raises(ValueError, match="`prompts` of the dataset 'scbench_kv' must be an object"):
        load_benchmark("scbench", [sample("scbench_kv")], prompts=path)


def text_of(ids) -> str:
    return byte_tokenizer().decode(ids)


def test_long_prompts_lose_their_middle():
    item, tokenizer = one("ruler", "niah_single_1", max_lengths=10), byte_tokenizer()
    whole = encode_item(tokenizer, item, Frame(), True, None)
    assert text_of(whole.questions[0]) == item.turns[0].question + " The number is" and whole.num_dropped == 0
    cut = encode_item(tokenizer, item, Frame(), True, 111)
    (ids,) = cut.questions
    assert len(ids) == 101 and cut.num_dropped == len(whole.questions[0]) - 101
    assert ids == whole.questions[0][:50] + whole.questions[0][-51:]
    item = one("scbench", "scbench_kv", max_lengths=10)
    whole, cut = (encode_item(tokenizer, item, Frame(), True, room) for room in (None, 200))
    assert cut.questions == whole.questions and 0 < len(cut.context) < len(whole.context)
    asked = sum(map(len, cut.questions)) + 2 * 4 + 10
    assert len(cut.context) + asked == 200
    # alone, questions leave more room
    assert len(encode_item(tokenizer, item, Frame(), False, 200).context) > len(cut.context)
    with pytest.raises(ValueError, match="`max_lengths` must leave room .*scbench_kv, line 1"):
        encode_item(tokenizer, item, Frame(), True, asked)


def test_a_chat_template_goes_around_texts():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="`chat`"):
        chat_frame(tokenizer)
    tokenizer.chat_template = CHAT
    frame = chat_frame(tokenizer)
    item = one("ruler", "qa_1")
    (ids,) = encode_item(tokenizer, item, frame, True, None).questions
    assert text_of(ids) == f"<user>{item.turns[0].question}</><assistant>"
    item = one("scbench", "scbench_kv")
    ids = encode_item(tokenizer, item, frame, True, None)
    said = text_of(ids.context + ids.questions[0] + ids.golden[0] + ids.questions[1])
    chat = [
        {"role": "user", "content": f"{item.context}\n\n{item.turns[0].question}"},
        {"role": "assistant", "content": "9b20"},
        {"role": "user", "content": item.turns[1].question},
    ]
    assert said == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text_of(encode_item(tokenizer, item, frame, False, None).questions[1]).startswith("\n\nKey: ")


@pytest.mark.parametrize("mode", ["multi-turn", "multi-request"])
def test_turns_on_a_shared_context_are_those_of_prompts_read_whole(mode):
    """Caches that hold all as it came answer as if each prompt were read at once: no answer leaves a trace."""
    model, tokenizer = sharp_llama(), byte_tokenizer()
    item = one("scbench", "scbench_kv", max_lengths=6)
    makers = {"raw": lambda: DeltaKVCache(model, recent_window=4000)}
    results = run_benchmark(model, tokenizer, [item], makers, mode=mode)
    ids = encode_item(tokenizer, item, Frame(), mode == "multi-turn", None)
    held = list(ids.context)
    for number, (question, golden) in enumerate(zip(ids.questions, ids.golden, strict=True)):
        whole = torch.tensor([held + question])
        out = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
        for result in results:
            assert result.turns[number]["answer"] == text_of(out[0, whole.shape[1] :].tolist())
        held += question + golden if mode == "multi-turn" else []


def test_a_question_asked_again_of_a_compressed_context_gets_the_same_answer():
    """Each is asked of a copy, also of a cache of others."""
    model, item = sharp_llama(), one("scbench", "scbench_kv", max_lengths=16)
    item = replace(item, turns=(item.turns[0], item.turns[1], item.turns[0]))
    kivi = peers._kivi(4, 8)
    makers = {"tight": lambda: DeltaKVCache(model, **TIGHT), "kivi": lambda: kivi.make(model.config)}
    for result in run_benchmark(model, byte_tokenizer(), [item], makers, mode="multi-request"):
        first, second, again = (turn["answer"] for turn in result.turns)
        assert first == again != second
        assert (result.stored_share < 1) == (result.cache != FULL)


def test_answers_end_at_the_end_token_and_at_a_line_break_where_the_dataset_says_so(monkeypatch):
    model, tokenizer = byte_llama(), byte_tokenizer()
    items = load_benchmark("longbench", [sample("longbench")], max_lengths=4)
    item = next(item for item in items if item.dataset == "samsum")
    newline = tokenizer("\n").input_ids[0]
    assert runner._ends(model, tokenizer, item) == [newline] and runner._ends(model, tokenizer, items[0]) is None
    ids = tokenizer(items[0].turns[0].question).input_ids
    whole = runner._answer(model, ids, DynamicCache(config=model.config), 4, None)
    assert len(whole) == 4 and whole[2] not in whole[:2]
    assert runner._answer(model, ids, DynamicCache(config=model.config), 4, [whole[2]]) == whole[:2]
    assert runner._answer(model, ids, DynamicCache(config=model.config), 4, [whole[0]]) == []
    begun = runner._answer(model, ids, DynamicCache(config=model.config), 4, [whole[0]], 1)
    assert begun and whole[0] not in begun
    monkeypatch.setattr(model.generation_config, "eos_token_id", [whole[2]])
    assert runner._ends(model, tokenizer, item) == [whole[2], newline]
    (result,) = run_benchmark(model, tokenizer, [items[0]], {})
    assert result.turns[0]["num_tokens"] == 2


def test_scores_are_means_over_items_beside_the_full_cache():
    items = load_benchmark("scbench", [sample("scbench_summary_with_needles"), sample("scbench_kv")], max_lengths=3)
    model = byte_llama()
    results = run_benchmark(model, byte_tokenizer(), items, {"tight": lambda: DeltaKVCache(model, **TIGHT)})
    scores = summarize(results)
    mixed = "scbench_summary_with_needles: scbench_"
    assert [(score.dataset, score.cache, len(score.scores)) for score in scores] == [
        (dataset, cache, count)
        for dataset, count in ((f"{mixed}summary", 1), (f"{mixed}passkey", 1), ("scbench_kv", 2))
        for cache in (FULL, "tight")
    ]
    # half of what the second says is right, by hand
    full, tight = scores[-2:]
    results[-1].turns[0]["score"], results[-2].turns[0]["score"] = 1.0, 0.0
    full, tight = summarize(results)[-2:]
    assert (full.score, tight.score, tight.change) == (0.0, 1 / 6, 1 / 6)
    assert tight.change_interval == (0.0, pytest.approx(1 / 3))
    assert full.share("stored_share") == 1 and 0 < tight.share("compressed_share") < tight.share("stored_share") < 1
    share = tight.share("compressed_share")
    short = replace(tight.results[0], compressed_share=0.0)
    assert replace(tight, results=[short]).share("compressed_share") == 0
    assert replace(tight, results=[*tight.results, short]).share("compressed_share") == share
    assert "change" not in full.summary() and tight.summary()["change"] == 1 / 6


def test_the_command_prints_a_table_and_writes_every_answer(folder, tmp_path):
    out = tmp_path / "out.json"
    options = ["--max-lengths", 4, "--model", folder, "--device", "cpu", "--options", json.dumps(TIGHT), "--json", out]
    result = run("eval", "benchmark", "ruler", sample("niah_single_1"), sample("qa_1"), *options)
    assert result.exit_code == 0, result.output
    for word in ("niah_single_1", "qa_1", "full cache", "recent_window=8", "mean", "+0.0", "100.0%", "Score: 0 to 100"):
        assert word in result.output
    assert "Not comparable" not in result.output and "Too long" not in result.output
    found = json.loads(out.read_text())
    assert found["command"].startswith("deltakv") and found["environment"]["dtype"] == "float32"
    assert found["own_prompts"] == [] and found["files"] == ["niah_single_1.jsonl", "qa_1.jsonl"]
    assert [(row["dataset"], row["cache"], row["items"]) for row in found["results"]] == [
        ("niah_single_1", FULL, 2),
        ("niah_single_1", OWN, 2),
        ("qa_1", FULL, 1),
        ("qa_1", OWN, 1),
    ]
    assert "options" not in found["results"][0] and found["results"][1]["options"] == TIGHT
    assert len(found["items"]) == 6 and found["items"][0]["turns"][0]["answers"] == ["4821"]
    assert found["items"][1]["compressed_share"] > 0


def test_the_command_says_what_is_not_comparable_and_what_was_cut(folder, tmp_path):
    """Our own prompts are named in the output and in the file."""
    out = tmp_path / "out.json"
    options = ["--max-lengths", 3, "--model", folder, "--device", "cpu", "--json", out, "--max-prompt-tokens", 60]
    result = run("eval", "benchmark", "gsm8k", sample("gsm8k"), *options)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.split())
    assert "Not comparable with published scores: the prompts of gsm8k are worded by us" in flat
    assert "2 prompts, which lost" in flat
    found = json.loads(out.read_text())
    assert found["own_prompts"] == ["gsm8k"] and found["max_prompt_tokens"] == 60
    assert all(item["num_prompt_tokens"] == 60 and item["num_dropped"] > 0 for item in found["items"])


def test_an_interrupted_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    out, asked = tmp_path / "out.json", []
    arguments = ["eval", "benchmark", "ruler", sample("niah_single_1"), "--max-lengths", 3, "--model", folder]
    arguments += ["--device", "cpu", "--options", json.dumps(TIGHT), "--json", out]
    answer = runner._answer

    def interrupted_later(*given):
        asked.append(given)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(runner, "_answer", interrupted_later)
    assert run(*arguments).exit_code != 0
    assert len(json.loads(out.read_text())["items"]) == 3 and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert run(*arguments).exit_code == 0
    assert len(asked) == 5 and len(json.loads(out.read_text())["items"]) == 4
    # all is there
    result = run(*arguments)
    assert result.exit_code == 0 and len(asked) == 5 and "recent_window=8" in result.output
    # another cache, and an item that reads otherwise
    assert run(*arguments, "--options", "{}").exit_code == 0 and len(asked) == 7
    assert run(*[4 if part == 3 else part for part in arguments]).exit_code == 0 and len(asked) == 11
    # what else may change is refused
    before = out.read_text()
    assert_refused(run(*arguments, "--max-prompt-tokens", 99), "--json", "max_prompt_tokens", 99, "another file")
    mode = ["--mode", "multi-request"]
    assert_refused(run(*arguments, *mode), "--json", "mode 'multi-turn' instead of 'multi-request'")
    assert out.read_text() == before and len(asked) == 11
    out.write_text("{}")
    assert_refused(run(*arguments), "--json", "out.json", "new file")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["longbenhc", "gsm8k"], ["format", "longbenhc", "Did you mean `longbench`?"]),
        (["gsm8k", "niah_single_1"], ["niah_single_1.jsonl", "line 1", "`question`", "missing"]),
        (["gsm8k", "gsm8k", "--chat"], ["`chat`", "chat template"]),
        (["gsm8k", "gsm8k", "--mode", "both"], ["`mode`", "multi-turn, multi-request", "both"]),
        (["gsm8k", "gsm8k", "--max-lengths", "5000"], ["`max_lengths`", "4096", "gsm8k, line 1"]),
        (["gsm8k", "gsm8k", "--max-lengths", "nowhere.json"], ["`max_lengths`", "nowhere.json"]),
        (["gsm8k", "missing"], ["`file`", "missing.jsonl"]),
        (["gsm8k", "gsm8k", "--peer", "kivy4"], ["`peer`", "Did you mean `kivi4`?"]),
        (["gsm8k", "gsm8k", "--json", "missing/out.json"], ["--json", "missing/out.json"]),
    ],
)
def test_the_command_refuses_what_cannot_be(folder, arguments, words):
    format_name, name, *others = arguments
    assert_refused(run("eval", "benchmark", format_name, sample(name), "--model", folder, *others), *words)
