"""Calibration: whole runs on small random models, runs that are broken off, bad input, the command."""

import json
import random
import re
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import transformers as tf
from commands import assert_refused, run
from compressors import append
from families import BY_NAME, longrope
from models import build, byte_llama, byte_tokenizer, new_model, tiny_model
from safetensors import SafetensorError
from safetensors.torch import save_file

from deltakv_hf import CompressorError, DeltaKVCache, InvalidOptionError, KVCompressor, UnsupportedModelError
from deltakv_hf.calibration import CalibrationSettings, allocation, calibrate, layer_fit, report, workspace
from deltakv_hf.calibration.capture import Observer
from deltakv_hf.calibration.plan import LayerPlan
from deltakv_hf.calibration.settings import SHORTEST_WINDOW
from deltakv_hf.calibration.texts import read_documents
from deltakv_hf.compressor import TransformCompressor
from deltakv_hf.errors import DeltaKVError
from deltakv_hf.evaluation.fidelity import Fidelity, WindowFidelity

WINDOWS, WINDOW = 8, 400
# of the bytes that are asked for, beside the few that a layer takes or leaves at once
NEAR, JUMP = 0.02, 4


def scaled(config_class, **own):
    """A family's shapes with widths a sixteenth to a thirty-second."""
    general = dict(vocab_size=64, num_hidden_layers=2, initializer_range=0.12, max_position_embeddings=4096)
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return build(config_class(**general, **ids, **own))


SHAPES = {
    "Llama-3.1-8B": lambda: scaled(
        tf.LlamaConfig,
        hidden_size=128,
        intermediate_size=448,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=8,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "Qwen2.5-7B": lambda: scaled(
        tf.Qwen2Config, hidden_size=448, intermediate_size=592, num_attention_heads=28, num_key_value_heads=4
    ),
    "Qwen3-4B": lambda: scaled(
        tf.Qwen3Config,
        hidden_size=80,
        intermediate_size=304,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=8,
    ),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Fewer samples and iterations: the same way in a second."""
    for module, name, value in [
        (allocation, "SIZES", (1, 2, 3, 4, 6, 8, 12, 16, 32)),
        (allocation, "SAMPLES", 300),
        (allocation, "PLACES", 3),
        (allocation, "ITERATIONS", 2),
        (layer_fit, "FIT_SAMPLES", 600),
        (layer_fit, "FIT_ITERATIONS", 2),
        (report, "CURVE", (0.06, 0.12)),
    ]:
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)


def ids(windows=WINDOWS, window=WINDOW, seed=0):
    """Text that repeats itself a little."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 60, (12, 25), generator=generator)
    return words[torch.randint(0, 12, (windows, window // 25), generator=generator)].flatten(1)


def transforms(compressor):
    return [transform for transform in compressor._parts if transform is not None]


def same(one, other):
    return one.tensors.keys() == other.tensors.keys() and one.fingerprint == other.fingerprint


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ratio_is_reached_from_below(shape):
    """A layer that gave up its references used to leave its bytes to nobody."""
    model = SHAPES[shape]()
    text = model.config
    dense = 2 * 2 * text.num_key_value_heads * 2 * (getattr(text, "head_dim", None) or 16)
    for ratio in (4, 8, 12):
        made = calibrate(model, ids(), ratio=ratio, measured_windows=0)
        assert made.bytes_per_token() <= dense / ratio * (1 + 1e-9)
        assert made.bytes_per_token() >= dense / ratio * (1 - NEAR) - JUMP, (ratio, dense / ratio)
        assert made.config["share"] == pytest.approx(made.bytes_per_token() / dense)
        assert made.report.share == pytest.approx(made.config["share"])
        planned = [layer.num_bytes for layer in made.report.layers]
        assert planned == pytest.approx([TransformCompressor(t).bytes_per_token() for t in transforms(made)])


def test_more_bytes_are_closer_to_the_full_cache():
    model = SHAPES["Llama-3.1-8B"]()
    made = [calibrate(model, ids(10), ratio=ratio, measured_windows=2) for ratio in (3, 20)]
    measured, predicted = (
        [m.report.fidelity.mean("kl") for m in made],
        [sum(layer.predicted_kl for layer in m.report.layers) for m in made],
    )
    assert measured[0] < measured[1] / 3 and predicted[0] < predicted[1] / 3
    assert all(0.1 < kl / expected < 10 for kl, expected in zip(measured, predicted, strict=True))


def test_what_a_report_predicts_and_shows(monkeypatch):
    """The KL of a layer is half its loss for every token that a prediction reads; the cache is taken as of 16 bits."""
    made = calibrate(SHAPES["Llama-3.1-8B"](), ids(), ratio=1 / 0.12, reference_stride=1, measured_windows=0).report
    # the curve is of tokens coded by themselves, as these are
    assert sum(layer.predicted_kl for layer in made.layers) == pytest.approx(made.curve[1][1])
    monkeypatch.setattr(report, "CURVE", ())
    plans = [LayerPlan(False, [], 12.0, 0.004), LayerPlan(True, [], 8.0, 0.001)]
    made = report.Report.of([0, 2], [], plans, 200, 300)
    assert [(layer.layer_idx, layer.predicted_kl) for layer in made.layers] == [(0, 0.6), (2, 0.15)]
    assert made.share == pytest.approx(0.1)
    # of tokens in float32, a share of which is compressed
    for share, whole in ((0.9, "19.0%"), (0.5, "55.0%")):
        window = WindowFidelity(0.01, 0.99, 2.02, 2.0, stored_share=1 - share * 0.95, compressed_share=0.05)
        row = replace(made, fidelity=Fidelity([window] * 2)).measured_row()
        assert row["whole cache"] == whole and row["compressed tokens"] == "10.0%"
        assert row["kl"] == "0.01000 ± 0.00000" and row["delta_nll"] == "+1.00%" and row["held-out windows"] == 2


def test_no_layer_has_references_at_stride_1():
    made = calibrate(tiny_model("llama"), ids(), ratio=4, reference_stride=1, measured_windows=0)
    assert made.reference_stride == 1 and not any(layer.uses_references for layer in made.report.layers)
    cache = DeltaKVCache(tiny_model("llama"), compressor=made, recent_window=8)
    tiny_model("llama")(ids()[:1, :100], past_key_values=cache)
    for layer in cache.layers:
        assert layer.state.store.reference_codes.shape[1] > 50
        assert layer.state.store.reference_idx.numel() == layer.state.store.residual_codes.numel() == 0


def test_heads_of_different_groups_do_not_meet():
    """The numbers of a group's heads decide its codes alone."""
    model = SHAPES["Llama-3.1-8B"]()
    made = calibrate(model, ids(), ratio=4, heads_per_group=2, measured_windows=0)
    for transform in transforms(made):
        coder, generator = TransformCompressor(transform), torch.Generator().manual_seed(0)
        tokens = transform.mean + torch.randn(1, 30, 128, generator=generator) * 0.3
        other = tokens.clone()
        # heads 2 and 3 of K and of V
        other[..., 16:32] += 1.0
        other[..., 64 + 16 : 64 + 32] -= 1.0
        codes, changed = (append(coder, x, []).reference_codes for x in (tokens, other))
        book = transform.reference_codebook
        groups = [
            start + size * place
            for start, size, step in zip(book.starts, book.sizes, book.steps, strict=True)
            for place in range(len(step))
        ]
        own = torch.tensor([32 <= start < 64 for start in groups])
        assert torch.equal(codes[..., ~own], changed[..., ~own])
        assert not own.any() or not torch.equal(codes[..., own], changed[..., own])
        used = transform.basis.ne(0)
        of_group = torch.arange(128) % 64 // 16
        assert all(not used[i, of_group != i // 32].any() for i in range(len(used)))


def test_a_group_of_all_heads_is_the_same_as_none():
    model = tiny_model("llama")
    options = dict(ratio=4, reference_stride=1, measured_windows=0)
    one, other = (calibrate(model, ids(), heads_per_group=heads, **options) for heads in (None, 2))
    assert same(one, other)


def test_heads_are_counted_as_the_cache_holds_them():
    """Falcon's config says four heads where the cache holds one, and Gemma 4's does not let them be read."""
    model = BY_NAME["falcon"].model()
    made = calibrate(model, ids(), ratio=3, heads_per_group=1, measured_windows=0)
    assert made.config["layers"][0]["widths"] == [8, 8]
    with pytest.raises(InvalidOptionError, match="`heads_per_group` must divide the 1 key-value heads"):
        calibrate(model, ids(), ratio=3, heads_per_group=2, measured_windows=0)


@pytest.mark.skipif(not hasattr(tf, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
def test_layers_that_differ():
    own = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16, num_kv_shared_layers=0)
    layers = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    model = scaled(
        tf.Gemma4TextConfig, hidden_size=32, intermediate_size=48, vocab_size_per_layer_input=64, **own, **layers
    )
    made = calibrate(model, ids(), ratio=3, heads_per_group=1)
    assert made.config["layers"][0] is None and made.config["layers"][1]["widths"] == [32, 32]
    assert made.report.fidelity.mean("kl") > 0


def test_statistics_are_kept_on_request(tmp_path):
    model = tiny_model("llama")
    plain = calibrate(model, ids(), ratio=4, measured_windows=0)
    made = calibrate(model, ids(), ratio=4, measured_windows=0, keep_statistics=True, heads_per_group=1)
    assert not any("statistics" in name for name in plain.tensors)
    for layer_idx in (0, 1):
        for name in ("covariance", "sensitivity"):
            moments = made.tensors[f"layers.{layer_idx}.statistics.{name}"]
            assert moments.shape == (2, 16, 16) and moments.dtype == torch.float32
            torch.testing.assert_close(moments, moments.transpose(1, 2))
            assert torch.linalg.eigvalsh(moments.double()).min() > -1e-5 * moments.max()
    made.save_pretrained(tmp_path / "c")
    assert same(KVCompressor.from_pretrained(tmp_path / "c"), made)


def test_a_target_is_met():
    """Four tries at the same bytes were taken for a target that is out of reach."""
    model, options = tiny_model("llama"), dict(measured_windows=1, reference_stride=1)
    at_five = calibrate(model, ids(), ratio=5, **options).report.fidelity.mean("kl")
    made = calibrate(model, ids(), target_kl=at_five, **options)
    assert at_five / 4 < made.report.fidelity.mean("kl") <= at_five
    assert made.config["measured"][0]["kl"].startswith(f"{made.report.fidelity.mean('kl'):.5f}")
    with pytest.raises(InvalidOptionError, match="`target_kl` must be reachable"):
        calibrate(model, ids(), target_kl=1e-12, **options)


def test_two_runs_are_equal_and_draw_nothing_from_the_global_generators():
    model = new_model("llama")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    made = [calibrate(model, ids(), ratio=5) for _ in range(2)]
    assert same(*made)
    configs = [json.loads(json.dumps(m.config)) for m in made]
    for config in configs:
        del config["calibration"]["seconds"]
    assert configs[0] == configs[1]
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
    assert not same(made[0], calibrate(model, ids(), ratio=5, seed=1))


@pytest.mark.parametrize("family", ["gemma3", "smollm3", "phi3-partial", "cohere", "llama-mqa"])
def test_other_families(family):
    """Sliding layers are left to the host; layers without positions, partial and interleaved rotation are coded."""
    model = tiny_model(family)
    made, small = (calibrate(model, ids(), ratio=ratio) for ratio in (3, 30))
    assert len(made.config["layers"]) == 2
    assert 0 < made.report.fidelity.mean("kl") < small.report.fidelity.mean("kl") / 1.5
    assert made.report.fidelity.mean("compressed_share") < 0.25


def test_the_shortest_window_measures_something():
    """In shorter ones nothing was compressed: any ratio measured a KL of 0 and met any target."""
    made = calibrate(tiny_model("llama"), ids(25, SHORTEST_WINDOW + 24)[:, :SHORTEST_WINDOW], ratio=20)
    assert made.report.fidelity.mean("kl") > 1e-3 and made.report.fidelity.mean("compressed_share") > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    made = calibrate(new_model("llama").to(dtype), ids(), ratio=3, window=200, reference_stride=500)
    assert made.config["calibration"]["dtype"] == str(dtype).removeprefix("torch.")
    assert made.config["calibration"]["settings"]["window"] == WINDOW
    exact = calibrate(tiny_model("llama"), ids(), ratio=3)
    assert 0 < made.report.fidelity.mean("kl") < 10 * exact.report.fidelity.mean("kl") + 0.01


def test_keys_and_values_that_never_change_cost_nothing():
    model = new_model("qwen2")
    attention = model.model.layers[0].self_attn
    for projection in (attention.k_proj, attention.v_proj):
        projection.weight.zero_()
        projection.bias.fill_(0.5)
    made = calibrate(model, ids(), ratio=8)
    assert made.report.layers[0].num_bytes == 0 and made.report.layers[1].num_bytes > 0
    assert np.isfinite(made.report.fidelity.mean("kl"))


# -- where and how it is called ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_works_whatever_the_gradient_mode(mode):
    """In inference mode nothing could be differentiated."""
    model = tiny_model("llama")
    with mode():
        made = calibrate(model, ids(), ratio=4)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert same(made, calibrate(model, ids(), ratio=4))
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in made.tensors.values())


def test_autocast_and_wrappers_change_nothing():
    """Autocast used to round what is fitted."""
    model = tiny_model("llama")
    plain = calibrate(model, ids(), ratio=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(calibrate(model, ids(), ratio=4), plain)
    assert same(calibrate(torch.nn.Sequential(model), ids(), ratio=4), plain)


def test_a_model_in_training_mode_is_read_in_evaluation_mode():
    """Its modes, gradients and flags are as before."""
    config = tiny_model("llama").config.__class__(**tiny_model("llama").config.to_dict() | {"attention_dropout": 0.5})
    model = build(config)
    plain = calibrate(model, ids(), ratio=4)
    model.train()
    model.model.layers[0].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(32)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.clone() for parameter in model.parameters()]
    made = calibrate(model, ids(), ratio=4)
    assert same(made, plain)
    assert made.report.fidelity == plain.report.fidelity
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(grads) == 1 and torch.equal(grads[0], torch.ones(32))


def test_a_failed_run_leaves_the_model_in_its_mode():
    model = new_model("llama").train()
    with torch.enable_grad(), pytest.raises(Stop):
        try:
            calibrate(model, ids(), ratio=4, progress=stop_at("reading text", 2))
        finally:
            assert torch.is_grad_enabled() and all(module.training for module in model.modules())


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = build(tiny_model("llama").config)
    with pytest.raises(InvalidOptionError, match="`model` must be differentiable.*inference_mode"):
        calibrate(model, ids(), ratio=4)


# -- runs that are broken off ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a key at the keyboard."""


def stop_at(stage, step):
    """Progress that breaks off after a step of a stage."""

    def begin(name, steps):
        count = iter(range(1, steps + 1))

        def advance():
            if next(count) == step and name == stage:
                raise Stop

        return advance

    return begin


@pytest.fixture
def reads(monkeypatch):
    """How often each window was read."""
    seen = Counter()
    real = Observer.read

    def read(self, part):
        if part.shape[1] > 2:
            seen[tuple(part[0].tolist())] += 1
        return real(self, part)

    monkeypatch.setattr(Observer, "read", read)
    return seen


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_run_that_was_broken_off_goes_on(step, tmp_path, reads):
    """It ends with the same bytes: sums of gradients used to be rounded on the way."""
    model, options = tiny_model("llama"), dict(ratio=4, sensitivity_windows=4, draws=2)
    whole = calibrate(model, ids(), **options)
    reads.clear()
    with pytest.raises(Stop):
        calibrate(model, ids(), **options, workspace=tmp_path / "w", progress=stop_at("reading text", step))
    assert len(reads) == step
    assert same(calibrate(model, ids(), **options, workspace=tmp_path / "w"), whole)
    assert len(reads) == 7 and set(reads.values()) == {1}
    assert same(calibrate(model, ids(), **options, workspace=tmp_path / "w"), whole)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("stage", ["finding components", "coding references", "fitting codebooks"])
def test_a_run_that_was_broken_off_later_reads_nothing_again(stage, tmp_path, reads):
    model = tiny_model("llama")
    with pytest.raises(Stop):
        calibrate(model, ids(), ratio=4, workspace=tmp_path / "w", progress=stop_at(stage, 1))
    other = calibrate(model, ids(), ratio=6, workspace=tmp_path / "w")
    assert set(reads.values()) == {1}
    assert same(other, calibrate(model, ids(), ratio=6))


def test_a_window_that_was_half_written_is_read_again(tmp_path, reads):
    model = tiny_model("llama")
    whole = calibrate(model, ids(), ratio=4, workspace=tmp_path / "w")
    for name in ("window-00003.safetensors", "window-00005.safetensors"):
        path = tmp_path / "w" / name
        path.write_bytes(path.read_bytes()[:1000])
    (tmp_path / "w" / ".window-00004.safetensors.0123456789abcdef").write_bytes(b"")
    reads.clear()
    assert same(calibrate(model, ids(), ratio=4, workspace=tmp_path / "w"), whole)
    assert len(reads) == 2


def test_another_calibration_starts_anew(tmp_path, reads):
    """Other settings, other text, and other weights of a model of the same name, which used to be taken for one."""
    place = dict(ratio=4, workspace=tmp_path / "w", measured_windows=0, reference_stride=1)
    calibrate(tiny_model("llama"), ids(7), **place)
    cases = [(tiny_model("llama"), ids(7), dict(draws=2)), (tiny_model("llama"), ids(7, seed=1), {})]
    for model, text, options in [*cases, (tiny_model("llama", seed=1), ids(7, seed=1), {})]:
        reads.clear()
        made = calibrate(model, text, **place, **options)
        assert len(reads) == 7
        assert same(made, calibrate(model, text, ratio=4, measured_windows=0, reference_stride=1, **options))


def test_a_workspace_that_holds_something_else_is_left_alone(tmp_path):
    model = tiny_model("llama")
    calibrate(model, ids(), ratio=4, workspace=tmp_path / "w")
    (tmp_path / "w" / "thesis.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    # a name that others use, too
    for name, content in (("theirs", '{"steps": 1}'), ("list", "[1]"), ("more", '{"key": "a", "b": 1}'), ("text", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "calibration.json").write_text(content)
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    for name in ("w", "other", "file", "file/below", "theirs", "list", "more", "text"):
        with pytest.raises(InvalidOptionError, match="`workspace` must be"):
            calibrate(model, ids(seed=1), ratio=4, workspace=tmp_path / name)
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("broken", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
@pytest.mark.parametrize("name", ["window-00002", "sensitivity"])
def test_a_full_disk_is_said(name, broken, tmp_path, monkeypatch, reads):
    """It was an error of safetensors. What was read before is used when there is room again."""
    model, options = tiny_model("llama"), dict(ratio=4, sensitivity_windows=3, workspace=tmp_path / "w")

    def full(held, path, *rest):
        if name in path.name and len(reads) == 3:
            raise broken
        save_file(held, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "save_file", full)
        with pytest.raises(InvalidOptionError, match="`workspace` must be .* can be written to.*space"):
            calibrate(model, ids(), **options)
    assert same(calibrate(model, ids(), **options), calibrate(model, ids(), **options | {"workspace": None}))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(ratio=4, target_kl=0.1), "`target_kl` must be left out with `ratio`"),
        (dict(ratio=1.2), "`ratio` must be from 1.5 to 200"),
        (dict(ratio=201), "`ratio` must be from 1.5 to 200"),
        (dict(ratio=float("nan")), "`ratio` must be a finite number above 0"),
        (dict(ratio="4"), "`ratio` must be a finite number above 0"),
        (dict(ratio=True), "`ratio` must be a finite number above 0"),
        (dict(target_kl=0), "`target_kl` must be a finite number above 0"),
        (dict(target_kl=-0.1), "`target_kl` must be a finite number above 0"),
        (dict(target_kl=float("inf")), "`target_kl` must be a finite number above 0"),
        (dict(target_kl=0.1, measured_windows=0), "`measured_windows` must not be 0 with `target_kl`"),
        (dict(measured_windows=-1), "`measured_windows` must be an integer >= 0"),
        (dict(measured_windows=1.0), "`measured_windows` must be an integer >= 0"),
        (dict(measured_windows=8), "`texts` must hold at least 2048 tokens"),
        (dict(measured_windows=9), "`texts` must hold at least 2048 tokens"),
        (dict(measured_windows=20), "`texts` must hold at least 2048 tokens"),
        (dict(refrence_stride=4), "refrence_stride.*reference_stride"),
        (dict(reference_stride=0), "`reference_stride` must be an integer >= 1"),
        (dict(heads_per_group=3), "`heads_per_group` must divide the 2 key-value heads"),
        (dict(heads_per_group=0), "`heads_per_group` must be an integer >= 1"),
        (dict(heads_per_group=1, reference_stride=8), "`reference_stride` must be 1 with `heads_per_group`, got 8"),
        (dict(num_sink_tokens=300), "`num_sink_tokens` must be an integer from 0 to 200"),
        (dict(num_tokens=100), "`num_tokens` must be an integer >= 2048"),
        (dict(draws=0), "`draws` must be an integer >= 1"),
        (dict(sensitivity_windows=0), "`sensitivity_windows` must be an integer >= 1"),
        (dict(seed=-1), "`seed` must be an integer >= 0"),
        (dict(keep_statistics="yes"), "`keep_statistics` must be True or False"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, words, reads):
    with pytest.raises(InvalidOptionError, match=words):
        calibrate(tiny_model("llama"), ids(), **options)
    assert not reads


@pytest.mark.parametrize(
    "texts, words",
    [
        (ids().float(), "`texts` must be int64 ids .*float32"),
        (ids().int(), "`texts` must be int64 ids .*int32"),
        (ids()[0], r"`texts` must be int64 ids .*\(400,\)"),
        (ids() + 40, "`texts` must be ids from 0 to 63"),
        (ids() - 30, "`texts` must be ids from 0 to 63"),
        (ids()[:3], "`texts` must hold at least 2048 tokens"),
        (ids()[:0], "`texts` must hold at least 2048 tokens"),
        (ids()[:, :150], "`window` must be an integer >= 176, got 150"),
        (["a few words"], "`tokenizer` must be given"),
    ],
)
def test_bad_texts_are_refused(texts, words, reads):
    with pytest.raises(InvalidOptionError, match=words):
        calibrate(tiny_model("llama"), texts, ratio=4)
    assert not reads


def test_windows_beyond_the_positions_of_the_model_are_refused(reads):
    """A model with learnt positions failed with an IndexError, the others calibrated on noise."""
    with pytest.raises(InvalidOptionError, match="`window` must fit the 512 positions .*got 600: take 512 or less"):
        calibrate(tiny_model("gpt2"), ids(window=600), ratio=4)
    short = byte_llama(max_positions=300)
    with pytest.raises(InvalidOptionError, match="`window` must fit the 300 positions .*got 400: take 300 or less"):
        calibrate(short, ids(), ratio=4)
    with pytest.raises(InvalidOptionError, match="`window` must fit the 300 positions .*got 4096: take 300 or less"):
        calibrate(short, {"one": ["a few words"]}, tokenizer=byte_tokenizer())
    assert not reads
    calibrate(short, ids(12, 300), ratio=4, measured_windows=1)


@pytest.mark.parametrize("switch, fits", [(200, True), (300, False), (399, False), (400, False), (401, True)])
def test_windows_over_the_switch_of_a_longrope_model_are_refused(switch, fits, reads):
    """They failed once all was fitted."""
    model = build(longrope(switch))
    if fits:
        assert calibrate(model, ids(), ratio=4).report.fidelity.mean("kl") > 0
        return
    with pytest.raises(InvalidOptionError, match=f"`window` must stay below {switch} .*take {switch - 1} or less"):
        calibrate(model, ids(), ratio=4)
    assert not reads


def test_too_little_text_is_refused():
    with pytest.raises(InvalidOptionError, match="`documents` must hold"):
        calibrate(byte_llama(), {"one": ["a few words"]}, tokenizer=byte_tokenizer())


def test_what_an_error_says_of_tokens_will_do(texts):
    """It counted those that are predicted as well, in the number given, too: what it advised failed again."""
    documents, options = read_documents(texts.glob("*.txt")), dict(tokenizer=byte_tokenizer(), window=400, ratio=4)
    with pytest.raises(InvalidOptionError, match="`num_tokens` must be at most .* got 900000: give more") as caught:
        calibrate(byte_llama(), documents, num_tokens=900_000, **options)
    most = int(re.search(r"at most (\d+)", str(caught.value))[1])
    made = calibrate(byte_llama(), documents, num_tokens=most, **options)
    assert made.config["calibration"]["windows"] == [most // 300, 400]
    with pytest.raises(InvalidOptionError, match=f"at most {most}, .* got {most + 1}: give more"):
        calibrate(byte_llama(), documents, num_tokens=most + 1, **options)


def test_a_target_without_held_out_text_is_refused(reads):
    """Of so few windows of ids none is held out, and the error spoke of an argument that was left out."""
    few = ids(4, 1000)
    with pytest.raises(InvalidOptionError, match="`texts` must hold at least 5 windows .*got 4: .*`measured_windows`"):
        calibrate(tiny_model("llama"), few, target_kl=0.1)
    assert not reads
    calibrate(tiny_model("llama"), few, target_kl=100, measured_windows=1)


def test_sources_and_the_goal_are_noted(texts):
    documents = read_documents([texts / "novels.txt", texts / "letters.txt"])
    options = dict(tokenizer=byte_tokenizer(), window=400, num_tokens=2100, measured_windows=1)
    noted = calibrate(byte_llama(), documents, **options).config["calibration"]
    assert noted["text"] == [{"source": name, "license": "not stated"} for name in ("novels.txt", "letters.txt")]
    assert noted["goal"] == {"ratio": 10.0}
    noted = calibrate(byte_llama(), documents["novels.txt"] + documents["letters.txt"], target_kl=100, **options).config
    assert "text" not in noted["calibration"] and noted["calibration"]["goal"] == {"target_kl": 100}


def test_a_model_without_a_tokenizer_needs_one_given(tmp_path):
    """It was an error of transformers."""
    byte_llama().save_pretrained(tmp_path / "m")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(InvalidOptionError, match="`tokenizer` must be given for a model that has none"):
        calibrate(model, {"one": ["a few words"]})
    byte_tokenizer().save_pretrained(tmp_path / "m")
    with pytest.raises(InvalidOptionError, match="`documents` must hold"):
        calibrate(model, {"one": ["a few words"]})


@pytest.mark.parametrize("broken", ["model.layers.1.self_attn.v_proj.weight", "lm_head.weight"])
def test_a_model_that_gives_nan_is_refused(broken):
    """Of keys and values, or of predictions alone."""
    model = new_model("llama")
    model.get_parameter(broken)[3, 3] = torch.nan
    with pytest.raises(DeltaKVError, match="must give finite|NaN") as caught:
        calibrate(model, ids(), ratio=4)
    assert isinstance(caught.value, CompressorError)


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="full attention"):
        calibrate(tiny_model("mistral-sliding"), ids(), ratio=4)
    with pytest.raises(DeltaKVError):
        calibrate(object(), ids(), ratio=4)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    byte_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of documents."""
    path = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(40)]
    for name in ("novels.txt", "letters.txt"):
        documents = [" ".join(rng.choices(words, k=90)) for _ in range(14)]
        (path / name).write_text("\n\f\n".join(documents))
    return path


SHORT = ["--num-tokens", 2100, "--window", 400, "--measured-windows", 2]


def command(folder, texts, out, *more):
    both = ["--text", texts / "novels.txt", "--text", texts / "letters.txt"]
    return run("calibrate", folder, *both, "--out", out, *SHORT, *more)


def test_the_command_writes_a_compressor(folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["deltakv", "calibrate", "model"])
    out = tmp_path / "made" / "c"
    licences = ["--text-license", "novels=CC0-1.0", "--text-license", "letters.txt=public domain", "--license", "mit"]
    result = command(folder, texts, out, "--ratio", 4, *licences)
    assert result.exit_code == 0, result.output
    names = {"config.json", "compressor.safetensors", "README.md", "report.json", "layers.png", "rate-distortion.png"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == ["c"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    found = json.loads((out / "report.json").read_text())
    assert 0.2 < found["compressed_share"] <= 0.25 and len(found["layers"]) == 2 and "kl_se" in found["measured"]
    card = (out / "README.md").read_text()
    for words in ("novels.txt", "CC0-1.0", "letters.txt", "public domain", "deltakv calibrate", "tiny-llama", "mit"):
        assert words in card, words
    config = json.loads((out / "config.json").read_text())
    licences = {"novels.txt": "CC0-1.0", "letters.txt": "public domain"}
    assert {one["source"]: one["license"] for one in config["calibration"]["text"]} == licences
    assert {f.name for f in fields(CalibrationSettings)} == config["calibration"]["settings"].keys()

    model = byte_llama()
    cache = DeltaKVCache.from_pretrained(out, model=model)
    model(torch.randint(1, 99, (1, 300), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    assert cache.memory_report().compressed_tokens > 200


def test_a_command_that_fails_leaves_an_old_folder_as_it_is(folder, texts, tmp_path, monkeypatch):
    out = tmp_path / "c"
    first = command(folder, texts, out, "--ratio", 8)
    assert first.exit_code == 0, first.output
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    place = tmp_path / ".c.calibration"
    with monkeypatch.context() as patch:
        patch.setattr("deltakv_hf.cli.calibrate.stages", lambda bar: stop_at("fitting codebooks", 1))
        with pytest.raises(Stop):
            command(folder, texts, out, "--ratio", 4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name, "c"]
    with monkeypatch.context() as patch:
        patch.setattr("deltakv_hf.cli.calibrate.stages", lambda bar: stop_at("fitting codebooks", 1))
        with pytest.raises(Stop):
            command(folder, texts, tmp_path / "new", "--ratio", 4)
    assert not (tmp_path / "new").exists()

    def never(*_):
        raise AssertionError("nothing is read again")

    with monkeypatch.context() as patch:
        patch.setattr(Observer, "gradients", never)
        assert command(folder, texts, out, "--ratio", 4).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before
    assert not place.exists()


def test_a_workspace_is_kept_for_another_ratio(folder, texts, tmp_path, reads):
    place = ["--workspace", tmp_path / "read"]
    assert command(folder, texts, tmp_path / "a", "--ratio", 8, *place).exit_code == 0
    assert (tmp_path / "read" / "calibration.json").exists() and reads
    reads.clear()
    assert command(folder, texts, tmp_path / "b", "--ratio", 4, *place).exit_code == 0
    assert not reads
    assert command(folder, texts, tmp_path / "c", "--ratio", 4).exit_code == 0
    made = [(tmp_path / name / "compressor.safetensors").read_bytes() for name in "abc"]
    assert made[0] != made[1] == made[2]


def test_what_the_command_cannot_do_is_refused_at_once(folder, texts, tmp_path, reads):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("taken", "file"):
        assert_refused(command(folder, texts, tmp_path / name), "--out", tmp_path / name)
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text('{"format": "deltakv-compressor"}')
    (made / "runs").mkdir()
    assert_refused(command(folder, texts, made), "--out", made)
    # these were found out once all was fitted
    below, long = tmp_path / "file" / "below", tmp_path / ("n" * 300)
    for out in (below, below / "further", long):
        for place in ([], ["--workspace", tmp_path / "w"]):
            assert_refused(command(folder, texts, out, *place), "`--out`", "that can be made", out)
    out = tmp_path / "c"
    for place in (out, out / "w", out / ".." / "c", tmp_path):
        assert_refused(command(folder, texts, out, "--workspace", place), "`--workspace`", "apart from `--out`", place)
    assert_refused(command(folder, texts, out, "--ratio", 4, "--target-kl", 0.1), "target_kl", "ratio")
    # after the bars of loading the model
    result = command(folder, texts, out, "--num-tokens", 900_000)
    assert result.exit_code == 2 and "error: `num_tokens` must be at most" in result.stderr
    assert_refused(command(folder, texts, out, "--text-license", "mit"), "--text-license", "FILE=LICENCE")
    assert_refused(command(folder, texts, out, "--text-license", "novel=mit"), "--text-license", "novels.txt")
    assert_refused(run("calibrate", folder, "--text", tmp_path / "none.txt", "--out", out), "none.txt")
    assert not out.exists() and not reads


def test_an_out_that_may_not_be_written_is_refused_at_once(folder, texts, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # root may write everywhere
    monkeypatch.setattr("os.access", lambda path, *_: locked != path)
    for out in (locked / "c", locked / "new" / "c"):
        assert_refused(command(folder, texts, out, "--workspace", tmp_path / "w"), "`--out`", out, "may not be written")
    assert not (tmp_path / "w").exists()
