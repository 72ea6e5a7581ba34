"""Compressors in the format of the paper's authors, made small: they load, and what cannot be computed is refused."""

import json

import pytest
import torch
from commands import assert_refused, run
from compressors import TIGHT_WINDOW, random_networks
from helpers import prompt
from models import CONFIGS, tiny_model
from safetensors.torch import save_file

from deltakv_hf import CompressorError, DeltaKVCache, InvalidOptionError, KVCompressor

WIDTH, LATENT = 32, 16
# as the published configs name things, over the base model's config
FIELDS = {
    "kv_compressed_size": LATENT,
    "deltakv_neighbor_count": 4,
    "cluster_ratio": 0.1,
    "stride_alpha": 0.0,
    "recon_mode": "delta_in_latent",
    "use_nonlinear_compressor": True,
    "compressor_intermediate_size": 2048,
    "compressor_down_type": "mlp_swiglu",
    "compressor_up_type": "linear",
    "compressor_down_intermediate_size": 2 * WIDTH,
    "compressor_up_intermediate_size": -1,
    "collect_kv_before_rope": True,
    "compressor_linear_bias": False,
    "split_kv": False,
    "cluster_metric": "l2",
    "cluster_on_kv": True,
    "cluster_temp": 10,
    "cluster_soft_assignment": False,
    "full_attn_layers": [0],
    "num_sink_tokens": 8,
    "num_recent_tokens": 128,
    "quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
}


def published_tensors(num_layers=2, **networks):
    tensors = {}
    for layer_idx in range(num_layers):
        for name, tensor in random_networks(WIDTH, LATENT, seed=layer_idx, **networks).items():
            part, rest = name.split(".", 1)
            tensors[f"model.layers.{layer_idx}.self_attn.compress_{part}.{rest}"] = tensor.bfloat16()
    return tensors


def publish(path, tensors=None, family="llama", drop=(), **changes):
    """A folder as the authors' trainer saves it."""
    path.mkdir(exist_ok=True)
    config = CONFIGS[family]().to_dict() | {"architectures": ["LlamaForCausalLM"]} | FIELDS | changes
    config = {name: value for name, value in config.items() if name not in drop}
    (path / "config.json").write_text(json.dumps(config))
    if tensors is not False:
        save_file(published_tensors() if tensors is None else tensors, path / "model.safetensors")
    return path


@pytest.fixture
def model():
    return tiny_model("llama")


def test_a_published_compressor_is_used_like_any_other(tmp_path, model):
    folder = publish(tmp_path / "theirs")
    cache = DeltaKVCache.from_pretrained(folder, model=model, **TIGHT_WINDOW)
    model(prompt(2, 60), past_key_values=cache)
    assert cache.memory_report().compressed_tokens > 0
    coder = cache.layers[1].compressor
    assert (coder.lattice.stride, coder.learned.top_k, coder.learned.latent_nbits) == (10, 4, 0)
    name = "model.layers.1.self_attn.compress_down.w12.weight"
    assert torch.equal(coder.learned.down.weights["w12.weight"], published_tensors()[name])
    with pytest.raises(InvalidOptionError, match="top_k"):
        DeltaKVCache.from_pretrained(folder, model=model, top_k=1)


NAMES = [
    dict(drop=["deltakv_neighbor_count"], k_neighbors=4),
    dict(drop=["deltakv_neighbor_count"], seq_chunk_size=4),
    dict(drop=["cluster_ratio"], deltakv_center_ratio=0.1),
    dict(drop=["kv_compressed_size"], deltakv_latent_dim=LATENT),
    dict(seq_chunk_size=4),
    dict(drop=["compressor_down_type", "compressor_up_type", "use_nonlinear_compressor"]),
]


@pytest.mark.parametrize("changes", NAMES, ids=str)
def test_every_name_of_a_setting_is_known(tmp_path, changes):
    plain = KVCompressor.from_pretrained(publish(tmp_path / "plain"))
    assert KVCompressor.from_pretrained(publish(tmp_path / "other", **changes)).fingerprint == plain.fingerprint


@pytest.mark.parametrize("bits", ["kv_quant_bits", "deltakv_latent_quant_bits"])
@pytest.mark.parametrize("group", [None, 8])
def test_quantised_latents(tmp_path, model, bits, group):
    sizes = {} if group is None else {"kv_quant_group_size": group}
    made = KVCompressor.from_pretrained(publish(tmp_path / "theirs", **{bits: 4}, **sizes))
    learned = made.layer(0, WIDTH // 2, WIDTH // 2, torch.device("cpu")).learned
    assert (learned.latent_nbits, learned.latent_group_size) == (4, group or LATENT)


def test_a_growing_stride(tmp_path):
    made = KVCompressor.from_pretrained(publish(tmp_path / "theirs", stride_alpha=0.02))
    assert made.reference_growth == 0.02
    # 32,768 tokens have some 215 references
    assert made.layer(0, 16, 16, torch.device("cpu")).lattice.count(32_768) in range(205, 220)


@pytest.mark.parametrize("down", ["linear", "mlp_gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_networks_of_every_kind(tmp_path, down, bias):
    tensors = published_tensors(down=down, bias=bias)
    KVCompressor.from_pretrained(
        publish(tmp_path / "theirs", tensors, compressor_down_type=down, compressor_linear_bias=bias)
    )


def test_files_in_several_pieces(tmp_path):
    whole = publish(tmp_path / "whole")
    pieces = publish(tmp_path / "pieces", False)
    tensors = published_tensors()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, pieces / file)
        weight_map |= dict.fromkeys(part, file)
    index = pieces / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    given = [KVCompressor.from_pretrained(path) for path in (whole, pieces)]
    assert given[0].fingerprint == given[1].fingerprint
    for wrong in ({"weight_map": {"a": "../model.safetensors"}}, {"weight_map": []}, []):
        index.write_text(json.dumps(wrong))
        with pytest.raises(CompressorError, match="index"):
            KVCompressor.from_pretrained(pieces)


REFUSED = {
    "soft": (dict(cluster_soft_assignment=True), "cluster_soft_assignment"),
    "split": (dict(split_kv=True), "split_kv"),
    "origin": (dict(recon_mode="delta_in_origin"), "recon_mode"),
    "after rope": (dict(collect_kv_before_rope=False), "collect_kv_before_rope"),
    "cosine": (dict(cluster_metric="cosine"), "cluster_metric"),
    "no k": (dict(drop=["deltakv_neighbor_count"]), "deltakv_neighbor_count"),
    "two k": (dict(k_neighbors=1), "all of its names"),
    "no ratio": (dict(drop=["cluster_ratio"]), "center_ratio"),
    "ratio": (dict(cluster_ratio=0.9), "cluster_ratio"),
    "latent": (dict(kv_compressed_size=8), "weight"),
    "kind": (dict(compressor_down_type="linear"), "compressor_down_type"),
    "auto kind": (dict(drop=["compressor_down_type"], use_nonlinear_compressor=True), "compressor_down_type"),
    "hidden": (dict(compressor_down_intermediate_size=7), "intermediate_size"),
    "bias": (dict(compressor_linear_bias=True), "compressor_linear_bias"),
    "bits": (dict(kv_quant_bits=3), "bits"),
    "bits word": (dict(kv_quant_bits="4"), "integer"),
    "group": (dict(kv_quant_bits=4, kv_quant_group_size=7), "groups"),
    "layers": (dict(tensors=published_tensors(3)), "2 layers"),
    "one layer": (dict(tensors=published_tensors(1)), "layers.1"),
    "qwen3": (dict(family="qwen3"), "normalised"),
    "model": (dict(model_type="of_my_own"), "model_type"),
    "width": (dict(num_key_value_heads=4), "weight"),
    "no files": (dict(tensors=False), "safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_here_is_refused(tmp_path, case):
    changes, word = REFUSED[case]
    with pytest.raises(CompressorError, match=word):
        KVCompressor.from_pretrained(publish(tmp_path / "theirs", **changes))


def test_other_tensors_are_refused(tmp_path):
    tensors = published_tensors()
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.ones(2, 2)
    with pytest.raises(CompressorError, match="k_proj"):
        KVCompressor.from_pretrained(publish(tmp_path / "theirs", tensors))


def test_a_cut_off_file_is_refused(tmp_path):
    folder = publish(tmp_path / "theirs")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CompressorError, match="cannot be read"):
        KVCompressor.from_pretrained(folder)


def test_it_is_for_the_model_of_its_config(tmp_path):
    folder = publish(tmp_path / "theirs")
    with pytest.raises(CompressorError, match="num_key_value_heads"):
        DeltaKVCache.from_pretrained(folder, model=tiny_model("llama-mha"))


def test_convert_makes_a_folder_of_ours(tmp_path, model):
    theirs, out = publish(tmp_path / "theirs"), tmp_path / "ours"
    result = run("convert", theirs, "--out", out)
    assert result.exit_code == 0, result.output
    assert "bytes a compressed token" in result.output
    ours = KVCompressor.from_pretrained(out)
    assert ours.fingerprint == KVCompressor.from_pretrained(theirs).fingerprint
    assert 0 < ours.config["share"] < 1
    assert run("convert", out, "--out", out, "--latent-nbits", "4").exit_code == 0
    assert KVCompressor.from_pretrained(out).bytes_per_token() < ours.bytes_per_token()
    DeltaKVCache.from_pretrained(out, model=model)


def test_convert_refuses(tmp_path):
    theirs = publish(tmp_path / "theirs")
    (tmp_path / "file").write_text("mine")
    assert_refused(run("convert", theirs, "--out", tmp_path / "file"), "out", "file")
    assert_refused(run("convert", theirs, "--out", tmp_path / "new", "--latent-group-size", "8"), "latent_nbits")
    assert_refused(run("convert", theirs, "--out", tmp_path / "new", "--latent-nbits", "3"), "nbits")
    assert_refused(
        run("convert", "smollm2-135m-instruct-10x", "--out", tmp_path / "new", "--latent-nbits", "4"), "kind"
    )
    assert not (tmp_path / "new").exists()
