"""Runs every cell of the compatibility matrix for every kind of cache, and compares the committed page with it."""

import functools

import pytest
import transformers
from case import NEW, Case, errors
from compatibility import CELL_ERRORS, CELLS, PAGE, REFUSALS, page
from families import BY_NAME, FAMILIES, host_cache
from helpers import TIGHT, prompt
from kinds import KINDS
from models import tiny_model
from modes import MODES
from modes_generation import greedy
from packaging.version import Version

from deltakv_hf import DeltaKVCache

OLD_HOST = Version(transformers.__version__) < Version("5.23")
# in every mode, but that the host has no sdpa for gpt_oss
COMPLETE = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "smollm3", "gpt_oss"]


@functools.cache
def host(cell):
    """What `DynamicCache` says in a cell, or the error that it raises."""
    try:
        return cell.mode.expected(cell.family)
    except Exception as error:
        return error


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell, kind):
    expected, case = host(cell), Case(cell.family, kind.make)
    # an older host may serve what the newest does not
    if cell.error is not None and not (cell.error.by_host and OLD_HOST and not isinstance(expected, Exception)):
        if cell.error.by_host:
            assert isinstance(expected, cell.error.error), f"the host does not raise: {expected}"
        with pytest.raises(cell.error.error, match=cell.error.match):
            cell.mode.run(case)
        return
    if isinstance(expected, Exception):
        if OLD_HOST:
            pytest.skip(f"the host itself cannot do this: {expected}")
        raise expected
    result = cell.mode.run(case)
    assert case.caches and all(cache.get_seq_length() > 0 for cache in case.caches), "a cache was not used"
    if kind.lossless:
        for got, wanted in zip(result, expected, strict=True):
            kind.check_same(got, wanted)
        return
    if cell.family.grows:
        for cache in case.caches:
            kind.check_active(cache)
    cell.mode.check(case, result)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_refusal(refusal, kind):
    with pytest.raises(refusal.error, match=refusal.match):
        refusal.run(kind.make)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_8_bits_are_near_the_full_cache(family):
    """Also the proof that keys are rotated back to the right place, which comparing a cache with itself is not."""
    inputs, tokens = family.inputs([48, 31]), prompt(2, NEW, seed=3)
    logits = [Case(family, make).forced(inputs, tokens) for make in (host_cache, eight_bits)]
    error = errors(logits[1], logits[0]).median()
    assert error < 0.06 and (error > 0 or not family.grows)


def eight_bits(model):
    return DeltaKVCache(model, **TIGHT, nbits=8)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.images], ids=lambda family: family.name)
def test_images_are_seen(family):
    """A model that does not look at its image would pass every cell."""
    case = Case(family, KINDS[0].make)
    inputs = family.inputs()
    other = inputs | {"pixel_values": inputs["pixel_values"] + 1}
    logits = [case.model(**given, past_key_values=case.cache()).logits for given in (inputs, other)]
    assert (logits[0] - logits[1])[:, -1].abs().max() > 0.1


def test_the_committed_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make compatibility`"


def test_the_families_that_must_be_complete_are():
    assert [place for place in CELL_ERRORS if place[0] in COMPLETE] == [("gpt_oss", "sdpa")]


def test_every_declared_error_is_of_a_cell():
    assert set(CELL_ERRORS) <= {(family.name, mode.name) for family in FAMILIES for mode in MODES}
    assert len(BY_NAME) == len(FAMILIES) and len({str(cell) for cell in CELLS}) == len(CELLS)


def test_an_uncompressing_cache_does_not_count_as_compressed():
    """Where the matrix says so, compression was on: a lossless cache would not pass for a compressed one."""
    lossless = next(kind for kind in KINDS if kind.lossless)
    case = Case(BY_NAME["llama"], lossless.make)
    greedy(case)
    with pytest.raises(AssertionError, match="compressed"):
        lossless.check_active(case.caches[0])


def test_the_matrix_leaves_shared_models_alone():
    model = BY_NAME["llama"].model()
    assert "_prepare_cache_for_generation" not in vars(model) and model is not tiny_model("llama")
