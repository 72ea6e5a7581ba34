"""A saved cache goes on bit for bit in another process, and whatever is not that cache is refused."""

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from helpers import (
    SHAPES,
    TIGHT,
    assert_same_state,
    assert_same_tensors,
    cuts,
    dense,
    driven,
    feed,
    greedy,
    held_storages,
    left_padded,
    make_tokens,
    option_sets,
    prompt,
    reachable_tensors,
)
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGS, MOE, SMALL, build, new_model, tiny_model
from safetensors.torch import save_file
from torch.testing._internal.two_tensor import TwoTensor

from deltakv_hf import CacheStateError, DeltaKVCache, DeltaKVError, InvalidOptionError
from deltakv_hf.hf_compat import execution_device
from deltakv_hf.saving import archive
from deltakv_hf.saving.archive import read_archive, write_archive
from deltakv_hf.saving.fingerprint import describe_weights

ROOT = Path(__file__).resolve().parents[1]
HYBRIDS = {
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **SMALL | MOE,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": lambda: tf.Lfm2Config(
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, layer_types=["conv", "full_attention"]
    ),
}
FAMILIES = ["llama", "gemma3", "gpt_oss", "cohere2", "smollm3", "mistral-sliding", "phi3-partial", "gpt2", *HYBRIDS]


def model_of(family):
    if family in HYBRIDS:
        return build(HYBRIDS[family]())
    return tiny_model(family, "eager" if family == "gpt_oss" else "sdpa")


def again(cache, path, model=None, **kwargs):
    """The cache after a way through a file."""
    cache.save(path, **kwargs)
    return type(cache).load(path, model or cache._model())


def assert_same_cache(left, right):
    """All that is held is equal, and no memory is shared."""
    assert_same_state(left, right)
    assert left._ledger.counts() == right._ledger.counts()
    assert repr(left._ledger.row_columns) == repr(right._ledger.row_columns)
    assert [t.form for t in left._registry.tables] == [t.form for t in right._registry.tables]
    for a, b in zip(left._registry.tables, right._registry.tables, strict=True):
        assert_same_tensors({"cos": a.cos, "sin": a.sin}, {"cos": b.cos, "sin": b.sin})
    shared = [[[a.tables is b.tables for a in c.own_layers] for b in c.own_layers] for c in (left, right)]
    assert shared[0] == shared[1]
    assert left.options == right.options
    parts = [c.memory_report().parts for c in (left, right)]
    for name in parts[0].keys() - {"host layers", "bookkeeping"}:
        assert parts[0][name] == parts[1][name], name
    # views of the host's may keep more alive than they show
    assert parts[1]["host layers"] <= parts[0]["host layers"]
    pointers = [{t.untyped_storage().data_ptr() for _, t in _tensors(c)} for c in (left, right)]
    assert not pointers[0] & pointers[1]


def _tensors(cache):
    return [(path, t) for path, t in reachable_tensors(cache) if t.numel() and "_probes" not in path]


# -- given keys and values ---------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """(tokens, columns fed before saving, their chunks, flushed, options)"""
    length, batch = draw(st.integers(1, 60)), draw(st.integers(1, 3))
    heads, head_dim = draw(st.sampled_from(SHAPES))
    mask = None
    if draw(st.booleans()):
        mask = torch.ones(batch, length + 15, dtype=torch.long)
        for row in range(batch):
            mask[row, : draw(st.integers(0, length - 1))] = 0
            mask[row, length - draw(st.integers(0, min(3, length - 1))) : length] = 0
            mask[row, draw(st.integers(0, length - 1))] = 1
    tokens = make_tokens(length + 15, batch=batch, heads=heads, head_dim=head_dim, mask=mask)
    return tokens, length, draw(cuts(length)), draw(st.booleans()), draw(option_sets())


@given(problems())
def test_a_loaded_cache_is_the_saved_one_and_goes_on_alike(tmp_path_factory, problem):
    tokens, length, chunks, flush, options = problem
    cache = driven(tokens.columns(slice(0, length)), chunks, flush=flush, **options)
    states = [layer.state for layer in cache.layers]
    loaded = again(cache, tmp_path_factory.getbasetemp() / "saving-property")
    assert all(layer.state is state for layer, state in zip(cache.layers, states, strict=True))
    assert_same_cache(cache, loaded)
    for past, chunk in ((length, 1), (length + 1, 11), (length + 12, 3)):
        part = tokens.columns(slice(0, past + chunk))
        for a, b in zip(feed(cache, part, [chunk], past), feed(loaded, part, [chunk], past), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(dense(a), dense(b), strict=True))
    cache.flush()
    loaded.flush()
    assert_same_cache(cache, loaded)


PADDED = torch.ones(3, 70, dtype=torch.long)
PADDED[0, :17], PADDED[2, :44], PADDED[2, 46:48] = 0, 0, 0
OPERATIONS = {
    "crop": lambda cache: cache.crop(-3),
    "crop-much": lambda cache: cache.crop(-7),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "leave-the-longest": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "leave-all-compressed": lambda cache: cache.batch_select_indices(torch.tensor([2])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("chunks", [[50], [50, 3]], ids=["whole", "pending"])
def test_after_other_operations(tmp_path, operation, mask, chunks):
    tokens = make_tokens(70, batch=3, mask=mask)
    cache = driven(tokens.columns(slice(0, sum(chunks))), chunks, flush=False)
    OPERATIONS[operation](cache)
    loaded = again(copy.deepcopy(cache), tmp_path / "cache")
    if operation == "reset":
        assert loaded.memory_report() == DeltaKVCache(tiny_model("llama"), **TIGHT).memory_report()
        return
    assert_same_cache(cache, loaded)
    rows, past = cache._ledger.batch_size, cache.get_seq_length()
    rest = make_tokens(past + 20, batch=rows, seed=5)
    if mask is not None:
        seen = torch.ones(rows, past + 20, dtype=torch.long)
        for row, columns in enumerate(cache._ledger.row_columns):
            seen[row, :past] = torch.zeros(past, dtype=torch.long).index_fill(0, columns, 1)
        rest = make_tokens(past + 20, batch=rows, seed=5, mask=seen)
    for a, b in zip(feed(cache, rest, [1, 15, 4], past), feed(loaded, rest, [1, 15, 4], past), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(dense(a), dense(b), strict=True))
    assert_same_cache(cache, loaded)


def test_an_empty_cache_keeps_its_options(tmp_path):
    model = tiny_model("gemma3")
    loaded = again(DeltaKVCache(model, **TIGHT), tmp_path / "cache")
    assert loaded.options == DeltaKVCache(model, **TIGHT).options
    assert torch.equal(greedy(model, prompt(), loaded), greedy(model, prompt(), DeltaKVCache(model, **TIGHT)))


# -- models ------------------------------------------------------------------------------------------------------------


def prefilled(model, inputs, **options):
    """(cache, ids that `generate` gave, mask of all of them)"""
    cache = DeltaKVCache(model, **TIGHT | options)
    ids = greedy(model, inputs, cache, max_new_tokens=5)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return cache, ids, mask


def step_logits(model, cache, ids, mask):
    """Logits of several steps behind what the cache has seen."""
    found = []
    for token in range(ids.shape[1] - 1, ids.shape[1] + 9):
        if token >= ids.shape[1]:
            ids = torch.cat([ids, found[-1][:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -1:]
        found.append(model(ids[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_alike(tmp_path, family, padded):
    model = model_of(family)
    inputs = left_padded([40, 22, 31]) if padded else {"input_ids": prompt(), "attention_mask": torch.ones(1, 48)}
    cache, ids, mask = prefilled(model, inputs)
    cache.save(tmp_path / "cache", input_ids=ids, attention_mask=mask)
    loaded = DeltaKVCache.load(tmp_path / "cache", model, input_ids=ids)
    assert_same_cache(cache, loaded)
    assert torch.equal(loaded.saved_prompt.input_ids, ids[:, :-1])
    assert torch.equal(loaded.saved_prompt.attention_mask, mask[:, :-1])
    if padded:
        assert loaded.saved_prompt.lengths == [44, 26, 35]
    other = copy.deepcopy(loaded)
    assert torch.equal(step_logits(model, cache, ids, mask), step_logits(model, loaded, ids, mask))
    inputs = {"input_ids": ids, "attention_mask": mask}
    expected = greedy(model, inputs, DeltaKVCache.load(tmp_path / "cache", model))
    assert torch.equal(greedy(model, inputs, other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path, dtype):
    model = new_model("gemma3").to(dtype)
    cache, ids, mask = prefilled(model, left_padded([40, 22]))
    loaded = again(cache, tmp_path / "cache")
    assert_same_cache(cache, loaded)
    assert torch.equal(step_logits(model, cache, ids, mask), step_logits(model, loaded, ids, mask))


def test_bare_config(tmp_path):
    model = new_model("llama")
    cache = DeltaKVCache(model.config, **TIGHT)
    ids = greedy(model, prompt(), cache)
    loaded = again(cache, tmp_path / "cache", model.config)
    assert_same_cache(cache, loaded)
    mask = torch.ones_like(ids)
    assert torch.equal(step_logits(model, cache, ids, mask), step_logits(model, loaded, ids, mask))
    for held, other in ((cache, model), (DeltaKVCache(model), model.config)):
        held.save(tmp_path / "cache")
        with pytest.raises(InvalidOptionError, match="`model`.*bare config"):
            DeltaKVCache.load(tmp_path / "cache", other)


@pytest.mark.parametrize("saver", ["offloaded", "whole"])
def test_weights_that_accelerate_holds_elsewhere_are_not_compared(tmp_path, saver):
    models = {"whole": new_model("llama"), "offloaded": cpu_offload(new_model("llama"), execution_device="cpu")}
    assert next(models["offloaded"].parameters()).device.type == "meta"
    assert execution_device(models["offloaded"].model.layers[0].self_attn) == torch.device("cpu")
    saving, loading = models.pop(saver), models.popitem()[1]
    cache, ids, mask = prefilled(saving, left_padded([40, 22]))
    loaded = again(cache, tmp_path / "cache", loading)
    assert torch.equal(step_logits(saving, cache, ids, mask), step_logits(loading, loaded, ids, mask))


RESUME = """
import sys
sys.path.insert(0, "tests")
import torch
from helpers import greedy
from models import new_model
from deltakv_hf import DeltaKVCache

model = new_model("gemma3")
cache = DeltaKVCache.load(sys.argv[1], model)
held = cache.saved_prompt
inputs = {name: torch.cat([part, torch.ones_like(part[:, :1])], 1) for name, part in vars(held).items()}
print(greedy(model, inputs, cache).tolist())
"""


def test_another_process_goes_on(tmp_path):
    model = new_model("gemma3")
    cache, ids, mask = prefilled(model, left_padded([40, 22]))
    cache.save(tmp_path / "cache", input_ids=ids)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", RESUME, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids[:, -1] = 1
    expected = greedy(model, {"input_ids": ids, "attention_mask": mask}, cache)
    assert done.stdout.splitlines()[-1] == str(expected.tolist())


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def padded(tmp_path):
    """(path, cache, ids `[3, 45]`) of a saved batch whose rows begin with 0, 18 and 9 pads."""
    cache, ids, _ = prefilled(tiny_model("llama"), left_padded([40, 22, 31]))
    cache.save(tmp_path / "cache", input_ids=ids)
    return tmp_path / "cache", cache, ids


def test_ids_that_differ_are_refused_with_their_place(padded):
    path, _, ids = padded
    ids[1, 30], ids[2, 40] = 63, 63
    with pytest.raises(InvalidOptionError, match="row 1 has 63 in column 30"):
        DeltaKVCache.load(path, tiny_model("llama"), input_ids=ids)


def test_padding_and_later_ids_are_not_compared(padded):
    path, _, ids = padded
    ids[1, :18], ids[:, 44] = 61, 61
    longer = torch.cat([ids, ids], 1).to(torch.int32)
    assert DeltaKVCache.load(path, tiny_model("llama"), input_ids=longer).saved_prompt.lengths == [44, 26, 35]
    ids[1, 18] = 61 if ids[1, 18] != 61 else 62
    with pytest.raises(InvalidOptionError, match="row 1.*column 18"):
        DeltaKVCache.load(path, tiny_model("llama"), input_ids=ids)


@pytest.mark.parametrize("bad", [torch.ones(3, 43).long(), torch.ones(2, 44).long(), torch.ones(3, 44), [[1]]], ids=str)
def test_ids_of_another_shape(padded, tmp_path, bad):
    path, cache, _ = padded
    with pytest.raises(InvalidOptionError, match=r"`input_ids` must be .*\[3, 44 or more\]"):
        DeltaKVCache.load(path, tiny_model("llama"), input_ids=bad)
    with pytest.raises(InvalidOptionError, match=r"`input_ids` must be .*\[3, 44 or more\]"):
        cache.save(tmp_path / "other", input_ids=bad)
    assert not (tmp_path / "other").exists()


def test_ids_are_kept_as_far_as_seen_and_on_their_own(padded):
    path, cache, ids = padded
    held = DeltaKVCache.load(path, tiny_model("llama")).saved_prompt
    assert torch.equal(held.input_ids, ids[:, :44]) and held.attention_mask.sum(1).tolist() == held.lengths
    cache.save(path, input_ids=ids[:, :44])
    assert torch.equal(DeltaKVCache.load(path, tiny_model("llama")).saved_prompt.input_ids, held.input_ids)
    assert cache.saved_prompt is None


def test_a_check_without_saved_ids(padded):
    path, cache, ids = padded
    cache.save(path)
    assert DeltaKVCache.load(path, tiny_model("llama")).saved_prompt is None
    with pytest.raises(InvalidOptionError, match="`input_ids`.*without ids"):
        DeltaKVCache.load(path, tiny_model("llama"), input_ids=ids)


def test_mask_of_the_ids(padded, tmp_path):
    path, cache, ids = padded
    with pytest.raises(InvalidOptionError, match="`attention_mask`.*alone"):
        cache.save(path, attention_mask=torch.ones_like(ids))
    with pytest.raises(InvalidOptionError, match="`attention_mask`.*another"):
        cache.save(path, input_ids=ids, attention_mask=torch.ones_like(ids))
    # no layer of this model compresses, so the cache never saw the padding
    model = tiny_model("mistral-sliding")
    inputs = left_padded([40, 22])
    cache, ids, _ = prefilled(model, inputs)
    cache.save(path, input_ids=ids, attention_mask=inputs["attention_mask"])
    assert DeltaKVCache.load(path, model).saved_prompt.lengths == [44, 26]


# -- what cannot be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, at", [("llama-4-layers", 1), ("gemma3", 0), ("mistral-sliding", 0)])
@pytest.mark.parametrize("stage", ["prompt", "decode"])
def test_a_broken_off_forward(tmp_path, family, at, stage):
    model = tiny_model(family)
    cache = DeltaKVCache(model, **TIGHT)
    if stage == "decode":
        model(prompt(), past_key_values=cache)
    handle = model.model.layers[at].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(1, 1 if stage == "decode" else 48), past_key_values=cache)
    handle.remove()
    with pytest.raises(CacheStateError, match="reset"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_first_forward_that_never_reached_the_last_layer_of_the_host(tmp_path):
    types = ["full_attention", "sliding_attention"]
    model = build(tf.Gemma3TextConfig(**SMALL, sliding_window=16, layer_types=types))
    cache = DeltaKVCache(model)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(prompt(), past_key_values=cache)
    with pytest.raises(CacheStateError, match="layer 1 holds 0"):
        cache.save(tmp_path / "cache")


def test_a_model_that_is_gone(tmp_path):
    model = new_model("llama")
    cache = DeltaKVCache(model)
    del model
    with pytest.raises(CacheStateError, match="model.*alive"):
        cache.save(tmp_path / "cache")


@pytest.mark.parametrize(
    "value", [object(), {1}, [torch.ones(2)], {(1, 2): 3}, 1.5], ids=lambda value: type(value).__name__
)
def test_attributes_of_host_layers_that_no_file_holds(tmp_path, value):
    cache = prefilled(tiny_model("gemma3"), left_padded([40, 22]))[0]
    cache.layers[0].odd = value
    with pytest.raises(CacheStateError, match=rf"layers.0.odd.*{type(value).__name__}"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, change",
    [
        *[(family, change) for family in ("gemma3", "qwen3_next") for change in ("more", "less", "kind")],
        ("qwen3_next", "keys"),
    ],
)
def test_attributes_of_host_layers_of_another_version(tmp_path, family, change):
    model = model_of(family)
    cache = prefilled(model, left_padded([40, 22]))[0]
    layer = cache.layers[0]
    if change == "more":
        layer.future = torch.ones(2)
    elif change == "less":
        del layer.record_past
    elif change == "kind":
        layer.record_past = 0
    else:
        layer.conv_states = {1: None}
    cache.save(tmp_path / "cache")
    with pytest.raises(CacheStateError, match=rf"transformers {tf.__version__}.*layer 0.*attribute"):
        DeltaKVCache.load(tmp_path / "cache", model)


# -- files that are refused --------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """(path, model) of a small saved cache."""
    model = new_model("gemma3")
    prefilled(model, left_padded([14, 11]))[0].save(tmp_path / "cache", input_ids=prompt(2, 19))
    return tmp_path / "cache", model


@pytest.mark.parametrize("name", ["nothing", ""], ids=["missing", "folder"])
def test_no_file(tmp_path, name):
    with pytest.raises(InvalidOptionError, match="`path`.*no such file"):
        DeltaKVCache.load(tmp_path / name, tiny_model("llama"))


def test_saving_to_a_folder(tmp_path):
    with pytest.raises(InvalidOptionError, match="`path`.*folder"):
        driven(make_tokens(20)).save(tmp_path)


def test_truncated_file(small):
    path, model = small
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CacheStateError, match="`path`.*cut off"):
            DeltaKVCache.load(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CacheStateError, match="`path`"):
        DeltaKVCache.load(path, model)


def test_flipped_bytes(small):
    path, model = small
    whole = path.read_bytes()
    # many of the header, some of the tensors, the last ones
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [
        *range(0, 120),
        *range(120, header, 97),
        *range(header, len(whole), 211),
        *range(len(whole) - 8, len(whole)),
    ]
    for place in places:
        for bits in (0x01, 0x80):
            changed = bytearray(whole)
            changed[place] ^= bits
            path.write_bytes(changed)
            with pytest.raises(CacheStateError, match="`path`"):
                read_archive(path)
    path.write_bytes(whole)
    DeltaKVCache.load(path, model)


@pytest.mark.parametrize("old, new", [("shape", ""), ('"F32"', '"I32"'), ("residual_codes", "residual_sedoc")])
def test_header_that_tells_another_story(small, old, new):
    """Bytes and their number are right, only what they are is not."""
    path, model = small
    whole = path.read_bytes()
    if old == "shape":
        shape = list(read_archive(path)[1]["layers.1.state.tail_keys"].shape)
        old, new = (json.dumps(numbers, separators=(",", ":")) for numbers in (shape, shape[::-1]))
    changed = whole.replace(old.encode(), new.encode())
    assert changed != whole and len(changed) == len(whole)
    path.write_bytes(changed)
    with pytest.raises(CacheStateError, match="checksum"):
        DeltaKVCache.load(path, model)


def test_no_safetensors_file(tmp_path):
    for content in (b"PK\x03\x04" * 100, b"\xff" * 300, b"\x08" + bytes(7) + b"[1,2,3] "):
        (tmp_path / "cache").write_bytes(content)
        with pytest.raises(CacheStateError, match="no safetensors"):
            DeltaKVCache.load(tmp_path / "cache", tiny_model("llama"))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=str)
def test_a_foreign_safetensors_file(tmp_path, metadata):
    save_file({"weight": torch.ones(3)}, tmp_path / "cache", metadata)
    with pytest.raises(CacheStateError, match="`path`.*something else"):
        DeltaKVCache.load(tmp_path / "cache", tiny_model("llama"))


def test_another_format_version(small, monkeypatch):
    path, model = small
    monkeypatch.setattr(archive, "VERSION", "2")
    with pytest.raises(CacheStateError, match="version 2.*version 1"):
        DeltaKVCache.load(path, model)


class OtherCache(DeltaKVCache):
    """A cache of another class."""


def test_another_class_of_cache(small):
    path, model = small
    with pytest.raises(CacheStateError, match="OtherCache.*DeltaKVCache.load"):
        OtherCache.load(path, model)


def tampered(path, change):
    """Writes the file again, with a right checksum, after `change(content, tensors)`."""
    content, tensors = read_archive(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(content, tensors)
    write_archive(path, content, tensors)


def widened(tensor, axis):
    return (
        torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        if tensor.shape[axis]
        else tensor.new_zeros([1 if i == axis else n for i, n in enumerate(tensor.shape)])
    )


CHANGES = {
    "missing": lambda tensor: None,
    "dtype": lambda tensor: tensor.to(torch.int64 if tensor.dtype != torch.int64 else torch.int32),
    "flat": lambda tensor: tensor.flatten(),
    "rows": lambda tensor: widened(tensor, 0),
    "tokens": lambda tensor: widened(tensor, 2 if tensor.ndim == 4 and tensor.is_floating_point() else 1),
    "shorter": lambda tensor: tensor[:, :0] if tensor.ndim == 3 else tensor[:, :, :0],
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_the_counts(tmp_path, change):
    path = tmp_path / "cache"
    driven(make_tokens(50, batch=3, mask=PADDED[:, :50]), [46, 4], flush=False).save(path)
    whole = path.read_bytes()
    names = [name for name in read_archive(path)[1] if not name.startswith("prompt.")]
    assert len(names) == 2 * 11 + 2 + 1
    for name in names:
        path.write_bytes(whole)

        def apply(content, tensors, name=name):
            tensor = tensors.pop(name)
            if name == "ledger.row_columns":
                changed = None if change == "missing" else tensor.int() if change == "dtype" else tensor[:-1]
            # levels [batch, tokens, groups, 2] are of four axes too
            elif change == "tokens" and name.endswith("levels"):
                changed = widened(tensor, 1)
            elif change == "shorter" and "store" in name:
                changed = tensor[:, :-1]
            else:
                changed = CHANGES[change](tensor)
            if changed is not None:
                tensors[name] = changed

        tampered(path, apply)
        with pytest.raises(CacheStateError, match=r"saved cache"):
            DeltaKVCache.load(path, tiny_model("llama"))


def put(container, *keys_and_value):
    *keys, last, value = keys_and_value
    for key in keys:
        container = container[key]
    container[last] = value


CONTENT_CHANGES = {
    "extra tensor": lambda content, tensors: tensors.update(more=torch.ones(1)),
    "columns": lambda content, tensors: put(content, "ledger", "columns", 51),
    "seen": lambda content, tensors: put(content, "ledger", "seen", [34, 50, 3]),
    "compressed": lambda content, tensors: put(content, "ledger", "compressed", [20, 40, 0]),
    "rows": lambda content, tensors: put(content, "ledger", "tail_lengths", [9, 8]),
    "tail lengths": lambda content, tensors: put(content, "ledger", "tail_lengths", 0, 1),
    "short stores": lambda content, tensors: tensors.update(
        {name: tensor[:, :4] for name, tensor in tensors.items() if ".residual_" in name or ".reference_idx" in name}
        | {name: tensor[:, :2] for name, tensor in tensors.items() if ".store.reference_" in name and "idx" not in name}
    ),
    "tail width": lambda content, tensors: put(content, "ledger", "tail_width", 2),
    "merged": lambda content, tensors: put(content, "ledger", "merged", 45),
    "layers of the ledger": lambda content, tensors: put(content, "ledger", "num_layers", 3),
    "unknown count": lambda content, tensors: put(content, "ledger", "more", 3),
    "order of columns": lambda content, tensors: put(
        tensors, "ledger.row_columns", tensors["ledger.row_columns"].flip(0)
    ),
    "layers": lambda content, tensors: content["layers"].pop(),
    "layer class": lambda content, tensors: put(content, "layers", 0, "class", "OtherLayer"),
    "compressor": lambda content, tensors: put(content, "layers", 0, "compressor", "LearnedCompressor"),
    "store": lambda content, tensors: put(content, "layers", 0, "state", "fields", "store", "class", "LearnedStore"),
    "fields": lambda content, tensors: put(content, "layers", 0, "state", "fields", "more", 3),
    "rotation": lambda content, tensors: put(content, "tables", 0, "pairing", "interleaved"),
    "no rotation": lambda content, tensors: put(content, "layers", 0, "tables", None),
    "options": lambda content, tensors: put(content, "options", "nbits", 8),
    "lattice": lambda content, tensors: put(content, "options", "reference_stride", 5),
    "sinks": lambda content, tensors: put(content, "options", "num_sink_tokens", 3),
    "unknown option": lambda content, tensors: put(content, "options", "more", 3),
}


@pytest.mark.parametrize("change", CONTENT_CHANGES)
def test_content_that_does_not_fit(tmp_path, change):
    path = tmp_path / "cache"
    driven(make_tokens(50, batch=3, mask=PADDED[:, :50]), [46, 4], flush=False).save(path)
    tampered(path, lambda content, tensors: None)
    DeltaKVCache.load(path, tiny_model("llama"))
    tampered(path, CONTENT_CHANGES[change])
    with pytest.raises(DeltaKVError):
        DeltaKVCache.load(path, tiny_model("llama"))


def test_a_layer_of_the_host_with_other_rows_or_columns(small):
    path, model = small
    for value in (lambda t: t.repeat(2, 1, 1, 1), None):
        whole = path.read_bytes()

        def change(content, tensors, value=value):
            if value is None:
                pairs = content["layers"][0]["attributes"]["dict"]
                next(pair for pair in pairs if pair[0] == "cumulative_length")[1] = 17
            else:
                tensors["layers.0.keys"] = value(tensors["layers.0.keys"])

        tampered(path, change)
        with pytest.raises(CacheStateError, match="layer"):
            DeltaKVCache.load(path, model)
        path.write_bytes(whole)


# -- caches of other models --------------------------------------------------------------------------------------------

OTHER_CONFIGS = {
    "model_type": "qwen2",
    "num_hidden_layers": tf.LlamaConfig(**SMALL | {"num_hidden_layers": 3}),
    "num_attention_heads": tf.LlamaConfig(**SMALL | {"num_attention_heads": 2}),
    "num_key_value_heads": tf.LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "head_dim": tf.LlamaConfig(**SMALL | {"head_dim": 16}),
    "vocab_size": tf.LlamaConfig(**SMALL | {"vocab_size": 65}),
    "rope_parameters": "llama-yarn",
    "rms_norm_eps": tf.LlamaConfig(**SMALL, rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("name", OTHER_CONFIGS)
def test_a_model_of_another_config(tmp_path, name):
    driven(make_tokens(50)).save(tmp_path / "cache")
    config = OTHER_CONFIGS[name]
    model = build(CONFIGS[config]() if isinstance(config, str) else config)
    with pytest.raises(CacheStateError, match=f"`model`.*{name} ="):
        DeltaKVCache.load(tmp_path / "cache", model)


def test_settings_that_change_no_key_are_free(tmp_path):
    model, other = new_model("llama"), new_model("llama", attention="eager")
    other.config.use_cache, other.config.pad_token_id, other.config.name_or_path = False, 7, "elsewhere"
    cache, ids, mask = prefilled(model, left_padded([40, 22]))
    loaded = again(cache, tmp_path / "cache", other)
    assert_same_cache(cache, loaded)
    other.set_attn_implementation("sdpa")
    assert torch.equal(step_logits(model, cache, ids, mask), step_logits(other, loaded, ids, mask))


@pytest.mark.parametrize("change", ["seed", "one", "last", "dtype", "less", "more"])
def test_a_model_of_other_weights(tmp_path, change):
    saved, model = new_model("llama"), new_model("llama", seed=1 if change == "seed" else 0)
    driven_by = prefilled(saved, left_padded([40, 22]))[0]
    name = {"seed": "model.embed_tokens.weight"}.get(change, "model.layers.1.mlp.up_proj.weight")
    weight = model.model.layers[1].mlp.up_proj.weight
    if change == "one":
        weight[0, 0] += 1e-3
    elif change == "last":
        weight[-1, -1] = -weight[-1, -1]
    elif change == "dtype":
        model.model.layers[1].mlp.up_proj.half()
    elif change == "less":
        model.model.layers[1].mlp.up_proj.weight = None
    elif change == "more":
        model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
        name = "model.layers.1.mlp.up_proj.bias"
    driven_by.save(tmp_path / "cache")
    with pytest.raises(CacheStateError, match=f"`model`.*{name}"):
        DeltaKVCache.load(tmp_path / "cache", model)


def test_fingerprints_see_bytes_whatever_the_form():
    base = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    base.wide = torch.nn.Parameter(torch.randn(40, 60, generator=generator))
    base.tied = base.wide
    base.turned = torch.nn.Parameter(base.wide.detach().t())
    base.copied = torch.nn.Parameter(base.wide.detach().t().contiguous())
    base.scalar = torch.nn.Parameter(torch.tensor(3.0))
    base.empty = torch.nn.Parameter(torch.empty(0, 3))
    base.complex = torch.nn.Parameter(torch.randn(9, 9, dtype=torch.complex64, generator=generator))
    base.codes = torch.nn.Parameter(torch.arange(99, dtype=torch.uint8), requires_grad=False)
    base.low = torch.nn.Parameter(torch.randn(9, 9, generator=generator).to(torch.float8_e4m3fn), requires_grad=False)
    base.pair = torch.nn.Parameter(TwoTensor(torch.zeros(9), torch.ones(9)))
    base.register_buffer("held", torch.ones(3))
    base.register_buffer("passing", torch.ones(3), persistent=False)
    base.elsewhere = torch.nn.Parameter(torch.empty(3, device="meta"))
    before = describe_weights(base)
    assert before["wide"] == before["tied"] and before["turned"] == before["copied"] != before["wide"]
    assert before["elsewhere"] is None and "passing" not in before and "held" in before
    for name in ("scalar", "complex", "codes", "held"):
        getattr(base, name).data.view(-1)[-1] += 1 + 1j if name == "complex" else 1
    base.low.data.view(torch.uint8)[8, 8] ^= 1
    base.pair.b[8] = 2
    after = describe_weights(base)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"scalar", "complex", "codes", "held", "low", "pair"}


# -- atomic ------------------------------------------------------------------------------------------------------------


def test_saving_over_an_old_file(small):
    path, model = small
    cache = prefilled(model, left_padded([30, 20]))[0]
    cache.save(path)
    assert_same_state(cache, DeltaKVCache.load(path, model))
    assert [entry.name for entry in path.parent.iterdir()] == ["cache"]


@pytest.mark.parametrize("failure", ["library", "disk", "sync", "rename"])
@pytest.mark.parametrize("old", [True, False], ids=["old-file", "no-file"])
def test_a_failed_save_leaves_all_as_it_was(tmp_path, monkeypatch, failure, old):
    cache = driven(make_tokens(300))
    if old:
        driven(make_tokens(20)).save(tmp_path / "cache")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    def fail(*args):
        raise KeyboardInterrupt

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if failure == "library":
        monkeypatch.setattr(archive, "save_file", half)
    elif failure == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    else:
        monkeypatch.setattr(os, {"sync": "fsync", "rename": "replace"}[failure], fail)
    try:
        with pytest.raises(Exception if failure == "disk" else KeyboardInterrupt):
            cache.save(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
    cache.save(tmp_path / "cache")
    assert_same_state(cache, DeltaKVCache.load(tmp_path / "cache", tiny_model("llama")))


def test_the_file_is_as_readable_as_any_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    (tmp_path / "plain").touch()
    driven(make_tokens(20)).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "cache").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_loaded_cache_does_not_need_the_file(tmp_path):
    cache = driven(make_tokens(100))
    loaded = again(cache, tmp_path / "cache")
    (tmp_path / "cache").write_bytes(b"\0" * (tmp_path / "cache").stat().st_size)
    assert_same_cache(cache, loaded)
    assert sum(held_storages(loaded).values()) < 1.1 * sum(held_storages(cache).values())
