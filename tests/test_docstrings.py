"""Docstrings of public names are complete, and the examples in them run."""

import doctest
import inspect
import re

import pytest
import torch
from helpers import prompt
from models import VOCAB_SIZE, new_model
from public_api import arguments, public_functions, public_objects

import deltakv_hf
from deltakv_hf import DeltaKVCache

OBJECTS, FUNCTIONS = dict(public_objects()), dict(public_functions())
CLASSES = [name for name, thing in OBJECTS.items() if inspect.isclass(thing) and not issubclass(thing, Exception)]
# what a newcomer looks up first
CENTRAL = [
    *("DeltaKVCache", "JointEncodedCache", "KVCompressor", "DeltaKVConfig", "JointEncodingConfig"),
    *("set_default_cache", "detach", "DeltaKVCache.memory_report", "DeltaKVCache.dequantize", "KVCompressor.calibrate"),
]
FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def is_documented(doc: str, name: str) -> bool:
    """Whether `Args:` or `Attributes:` has an entry for `name`."""
    entries = re.findall(r"^ +([\w*, ]+):", "".join(re.split("Args:|Attributes:", doc)[1:]), re.MULTILINE)
    return name in [entry.strip(" *") for line in entries for entry in line.split(",")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_gives(name):
    function, doc = FUNCTIONS[name], inspect.getdoc(FUNCTIONS[name])
    assert doc, "no docstring"
    if re.match(r"See `[\w.]+`", doc):
        # the same as the method that it overrides
        return
    missing = [argument for argument in arguments(function) if not is_documented(doc, argument)]
    assert not missing, f"no entry under `Args:` for {', '.join(missing)}"
    gives_nothing = inspect.signature(function).return_annotation in (None, "None")
    assert gives_nothing != ("Returns:" in doc), "`Returns:` must stand where something is returned, and only there"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_made_of(name):
    missing = [argument for argument in arguments(OBJECTS[name]) if not is_documented(OBJECTS[name].__doc__, argument)]
    assert not missing, f"no entry under `Args:` or `Attributes:` for {', '.join(missing)}"


@pytest.mark.parametrize("name", OBJECTS)
def test_properties_and_values_have_a_docstring(name):
    if inspect.isclass(OBJECTS[name]):
        properties = inspect.getmembers(OBJECTS[name], lambda value: isinstance(value, property))
        own = [(key, value) for key, value in properties if value.fget.__module__.startswith("deltakv_hf")]
        assert not [key for key, value in own if not key.startswith("_") and not value.__doc__]
    assert OBJECTS[name].__doc__


def examples() -> dict[str, doctest.DocTest]:
    """The examples of public names, by name; each has names of its own."""
    finder, found = doctest.DocTestFinder(exclude_empty=True, recurse=False), {}
    for name, thing in (OBJECTS | FUNCTIONS).items():
        for test in finder.find(thing, name.removeprefix("deltakv_hf."), globs={}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


def test_central_names_have_examples():
    assert set(CENTRAL) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    """`model` is a tiny random Llama, `inputs` hold a prompt of 512 tokens, `cache` was fed it."""
    model, ids = new_model("llama", "sdpa", 0), prompt(1, 512)
    cache = DeltaKVCache(model)
    model(ids, past_key_values=cache)
    texts = torch.randint(1, VOCAB_SIZE, (8, 400), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    public = {name: getattr(deltakv_hf, name) for name in deltakv_hf.__all__}
    test = EXAMPLES[name]
    test.globs = public | {"model": model, "inputs": inputs, "cache": cache, "texts": texts}
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    assert result.failed == 0, "".join(report)
