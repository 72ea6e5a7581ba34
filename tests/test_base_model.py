"""A compressor says what model it was made for, refuses one that is built otherwise and warns of another."""

import copy
import json
import warnings

import pytest
import transformers as tf
from models import CONFIGS, SMALL, new_model, tiny_model
from peft import LoraConfig, get_peft_model

from deltakv_hf import CompressorError, UnsupportedModelError
from deltakv_hf.compressor.base_model import check_model, describe_model

COMMIT, OTHER = "a" * 40, "b" * 40


def named(name, commit=None, **changes):
    config = tf.LlamaConfig(**SMALL | changes)
    config._name_or_path, config._commit_hash = name, commit
    return config


def silent(saved, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model(saved, model)


def test_what_is_noted():
    found = describe_model(named("someone/llama", COMMIT, attention_bias=True))
    assert found == {
        "id": "someone/llama",
        "revision": COMMIT,
        "architecture": {
            "model_type": "llama",
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_size": 32,
            "layer_types": None,
            "rope": [{"rope_theta": 10000.0, "rope_type": "default"}],
            "attention_bias": True,
        },
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_described_and_accepted_again(family):
    config = CONFIGS[family]()
    saved = describe_model(config)
    assert json.loads(json.dumps(saved)) == saved
    assert all(saved["architecture"][name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    silent(saved, copy.deepcopy(config))
    # a checkpoint that went over disk says the same
    silent(saved, type(config).from_dict(json.loads(json.dumps(config.to_dict()))))


def test_a_model_whose_layers_differ_is_described_with_what_differs():
    """Gemma 4: heads of full layers are wider, and transformers does not let their width be read off the config."""
    if not hasattr(tf, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    types = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0)
    config, other = (tf.Gemma4TextConfig(**SMALL, **types, global_head_dim=width) for width in (16, 32))
    saved = describe_model(config)
    assert saved["architecture"]["head_dim"] == 8 and saved["architecture"]["num_key_value_heads"] == 2
    assert describe_model(tf.Gemma4TextConfig())["architecture"]["head_dim"] == 256
    assert json.loads(json.dumps(saved)) == saved
    silent(saved, copy.deepcopy(config))
    silent(saved, tf.Gemma4TextConfig.from_dict(json.loads(json.dumps(config.to_dict()))))
    with pytest.raises(CompressorError, match="32"):
        check_model(saved, other)


def test_no_two_families_are_taken_for_each_other():
    saved = {name: describe_model(make())["architecture"] for name, make in CONFIGS.items()}
    texts = {name: json.dumps(one, sort_keys=True) for name, one in saved.items()}
    # their windows differ, which is not what keys and values are made of
    del texts["mistral-sliding"]
    assert len(set(texts.values())) == len(texts)


def test_models_wrappers_and_nested_configs_are_looked_into():
    model = new_model("llama")
    saved = describe_model(model)
    assert saved == describe_model(model.config)
    wrapped = get_peft_model(new_model("llama"), LoraConfig(target_modules=["q_proj"]))
    silent(saved, wrapped)
    outer = tf.Gemma3Config(text_config=tiny_model("gemma3").config.to_dict(), vision_config={"hidden_size": 16})
    assert describe_model(outer)["architecture"] == describe_model(tiny_model("gemma3"))["architecture"]
    with pytest.raises(UnsupportedModelError, match="`model`"):
        describe_model("llama")


def test_every_difference_is_named_with_both_values():
    saved = describe_model(named("someone/llama"))
    other = named("someone/wider", hidden_size=64, num_key_value_heads=1, rope_parameters={"rope_theta": 5e5})
    with pytest.raises(CompressorError) as error:
        check_model(saved, other)
    text = str(error.value)
    for words in (
        "like someone/llama",
        "got someone/wider",
        "hidden_size is 64, not 32",
        "value_heads is 1, not 2",
    ):
        assert words in text
    assert "rope is [{'rope_theta': 500000.0" in text and "head_dim" not in text
    with pytest.raises(CompressorError, match="model_type is 'qwen2', not 'llama'"):
        check_model(saved, tiny_model("qwen2"))


def test_an_entry_that_one_version_does_not_know_is_not_compared():
    saved = describe_model(named("someone/llama", attention_bias=True))
    del saved["architecture"]["attention_bias"]
    saved["architecture"]["of_the_future"] = True
    silent(saved, named("someone/llama", attention_bias=True))


@pytest.mark.parametrize(
    "saved, running",
    [
        (("someone/llama", COMMIT), ("someone/llama-chat", COMMIT)),
        (("someone/llama", COMMIT), ("someone/llama", OTHER)),
        (("someone/llama", None), ("else/llama", None)),
        (("llama", None), ("someone/qwen", None)),
    ],
)
def test_another_model_of_the_same_build_is_warned_of_once(saved, running):
    with pytest.warns(UserWarning, match="fine-tune .*filterwarnings") as caught:
        check_model(describe_model(named(*saved)), named(*running))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(str(name) in str(caught[0].message) for name in (*saved, *running) if name)


@pytest.mark.parametrize(
    "saved, running",
    [
        (("someone/llama", COMMIT), ("someone/llama", COMMIT)),
        (("someone/llama", COMMIT), ("someone/llama", None)),
        (("someone/llama", None), ("", OTHER)),
        (("", None), ("someone/llama", COMMIT)),
        # a copy of the repository in a folder of its name
        (("someone/llama", COMMIT), ("/data/models/llama", None)),
    ],
)
def test_the_same_model_or_an_unknown_one_is_no_news(saved, running):
    silent(describe_model(named(*saved)), named(*running))


def test_no_path_of_this_machine_is_noted(tmp_path, monkeypatch):
    (tmp_path / "org" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "org" / "mine"), "org/mine", "./mine/", "~/x/mine", "a/b/mine", r"C:\models\mine"):
        assert describe_model(named(name))["id"] == "mine", name
    assert describe_model(named("org/other"))["id"] == "org/other"
    assert describe_model(named("gpt2"))["id"] == "gpt2"
    assert describe_model(named(""))["id"] is None


@pytest.mark.parametrize("saved", [None, {}, {"architecture": {}}, {"architecture": {"model_type": "llama"}}])
def test_a_config_that_does_not_say_its_model_is_refused(saved):
    with pytest.raises(CompressorError, match='"model"'):
        check_model(saved, named("someone/llama"))
