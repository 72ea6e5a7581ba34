"""What only a GPU can show: memory as the allocator sees it, and a host that never waits."""

import copy

import pytest
import torch
from compressors import TIGHT_WINDOW, random_compressor
from helpers import TIGHT, assert_same_tensors, greedy, left_padded, state_tensors
from models import new_model
from transformers import AutoModelForCausalLM, LlamaConfig

from deltakv_hf import DeltaKVCache, dispatch, reading
from deltakv_hf.reading import StateReader
from deltakv_hf.side_stream import SideStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the CUDA allocator and the CUDA sync checker"),
]

HEADS, HEAD_DIM, LAYERS = 8, 128, 6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=1000,
        max_position_embeddings=65536,
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("num_tokens", [4096, 20000], ids=["4k", "20k"])
def test_prefill_holds_finished_layers_and_two_dense_layers(model, num_tokens):
    cache = DeltaKVCache(model)
    rope = model.model.rotary_emb
    positions = torch.arange(num_tokens, device="cuda")[None]
    tables = rope(torch.zeros(1, 1, dtype=torch.bfloat16, device="cuda"), positions)
    dense_layer = 2 * num_tokens * HEADS * HEAD_DIM * 2
    torch.cuda.synchronize()
    baseline = torch.cuda.memory_allocated()
    for layer_idx in range(LAYERS):
        finished = torch.cuda.memory_allocated() - baseline
        torch.cuda.reset_peak_memory_stats()
        keys = torch.randn(1, HEADS, num_tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        values = torch.randn_like(keys)
        cache.layers[layer_idx].receive_tables(*tables)
        cache.update(keys, values, layer_idx)
        del keys, values
        peak = torch.cuda.max_memory_allocated() - baseline
        assert peak <= finished + 2 * dense_layer + 64 * 2**20
    held = torch.cuda.memory_allocated() - baseline
    assert held <= 1.02 * cache.memory_report().stored_bytes + 2**20


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@torch.no_grad()
def test_decode_steps_never_wait_for_the_device(model, padded):
    cache = DeltaKVCache(model, recent_window=8, block_size=4)
    ids = torch.randint(1, 1000, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    mask = mask if padded else None
    model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    # the model's own mask code may wait, so the layers are driven alone
    keys = torch.randn(2, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    steps = [torch.cat([mask, mask.new_ones(2, n + 1)], dim=1) if padded else None for n in range(12)]
    tables = [tuple(torch.rand(2, 1, HEAD_DIM, device="cuda") for _ in range(2)) for _ in steps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step_mask, step_tables in zip(steps, tables, strict=True):
            cache._ledger.note_mask(step_mask, outermost=True)
            for layer_idx in range(LAYERS):
                cache.layers[layer_idx].receive_tables(*step_tables)
                dense, _ = cache.update(keys, keys, layer_idx)
                dense.materialize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.get_seq_length() == 312


def test_stored_bytes_are_those_of_the_cpu(model):
    """The search is exact in integers, so the same K and V give the same bytes on every device."""
    num_tokens = 700
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, HEADS, num_tokens, HEAD_DIM, generator=generator).bfloat16() for _ in range(2))
    angles = torch.rand(1, num_tokens, HEAD_DIM // 2, generator=generator)
    tables = tuple(torch.cat([f(angles)] * 2, dim=-1).bfloat16() for f in (torch.cos, torch.sin))
    states = []
    for device in ("cpu", "cuda"):
        cache = DeltaKVCache(model)
        for layer_idx in range(LAYERS):
            moved = tuple(table.to(device) for table in tables)
            cache.layers[layer_idx].receive_tables(*moved)
            cache.update(keys.to(device), values.to(device), layer_idx)
        states.append(cache.layers[0].state.map(lambda t: t.cpu()))
    assert torch.equal(states[0].store.reference_idx, states[1].store.reference_idx)
    for name in ("reference_codes", "reference_levels", "residual_codes", "residual_levels"):
        assert torch.equal(getattr(states[0].store, name), getattr(states[1].store, name)), name


def generated(model, cache, **options):
    ids = torch.arange(1, 601, device="cuda")[None] % 1000
    options = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40} | options
    return model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_fused_step_is_near_that_of_dense_keys(monkeypatch, dtype, padded):
    model = new_model("llama")
    compressor = random_compressor(model)
    model.to("cuda", dtype).set_attn_implementation("deltakv")
    inputs = left_padded([60, 41]) if padded else {"input_ids": torch.arange(1, 61)[None]}
    inputs, logits = {name: part.cuda() for name, part in inputs.items()}, []
    calls, original = [], dispatch.reconstruct_and_attend
    monkeypatch.setattr(dispatch, "reconstruct_and_attend", lambda *a, **k: calls.append(1) or original(*a, **k))
    for fuses in (True, False):
        if not fuses:
            monkeypatch.setattr(StateReader, "attend", lambda *args: None)
        cache = DeltaKVCache(model, compressor=compressor, **TIGHT_WINDOW)
        model(**inputs, past_key_values=cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1) if padded else None
        logits.append(model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache).logits.float())
    # of two layers the second has no references, which are read apart
    assert 2 * len(calls) == 3 * len(cache.own_layers)
    assert (logits[0] - logits[1]).norm() < 3e-2 * logits[1].norm()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("make", [random_compressor, None], ids=["components", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_chunk_reads_a_long_past_in_parts(monkeypatch, dtype, make, padded):
    monkeypatch.setattr(reading, "DENSE_BYTES", 0)
    monkeypatch.setattr(reading, "SCRATCH_BYTES", {"cuda": 4096})
    model = new_model("llama")
    compressor = make and make(model)
    model.to("cuda", dtype).set_attn_implementation("deltakv")
    inputs = left_padded([60, 41]) if padded else {"input_ids": torch.arange(1, 61)[None]}
    inputs, logits = {name: part.cuda() for name, part in inputs.items()}, []
    for in_parts in (True, False):
        if not in_parts:
            monkeypatch.setattr(StateReader, "attend", lambda *args: None)
        cache = DeltaKVCache(model, compressor=compressor, **TIGHT_WINDOW)
        model(**inputs, past_key_values=cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 19), value=1) if padded else None
        ids = inputs["input_ids"][:, :19]
        logits.append(model(ids, attention_mask=mask, past_key_values=cache).logits.float())
    assert (logits[0] - logits[1]).norm() < (1e-4 if dtype == torch.float32 else 3e-2) * logits[1].norm()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"max_cache_len": 20100}], ids=["growing", "fixed"])
def test_codes_made_beside_the_model_are_those_made_behind_it(model, monkeypatch, sizes):
    compressor, ids = random_compressor(model), torch.randint(1, 1000, (1, 20000), device="cuda")
    caches = [DeltaKVCache(model, compressor=compressor, **sizes) for _ in range(2)]
    for _ in range(3):
        model(ids, past_key_values=caches[0], logits_to_keep=1)
        with monkeypatch.context() as patch:
            patch.setattr(SideStream, "run", lambda self, device, work, *read: work())
            model(ids, past_key_values=caches[1], logits_to_keep=1)
        for beside, behind in zip(*(cache.layers for cache in caches), strict=True):
            assert_same_tensors(state_tensors(beside), state_tensors(behind))
        for cache in caches:
            cache.reset()


@torch.no_grad()
def test_a_forward_broken_off_beside_its_codes_is_taken_back(model, monkeypatch):
    cache, ids = DeltaKVCache(model), torch.randint(1, 1000, (1, 20000), device="cuda")

    def fail(*args):
        raise KeyboardInterrupt

    for way_out in (cache.reset, lambda: cache.crop(-20000)):
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[2].mlp, "forward", fail)
            with pytest.raises(KeyboardInterrupt):
                model(ids, past_key_values=cache, logits_to_keep=1)
        way_out()
        assert cache.get_seq_length() == 0
    fresh = DeltaKVCache(model)
    for each in (cache, fresh):
        model(ids, past_key_values=each, logits_to_keep=1)
    for layer, other in zip(cache.layers, fresh.layers, strict=True):
        assert_same_tensors(state_tensors(layer), state_tensors(other))


SMALL_CACHE = dict(recent_window=32, block_size=16)


@pytest.mark.parametrize("beams", [1, 2])
def test_offloaded_layers_live_on_the_host_and_give_the_same_tokens(model, beams):
    cache = DeltaKVCache(model, offloading=True, **SMALL_CACHE)
    tokens = generated(model, cache, num_beams=beams)
    assert torch.equal(tokens, generated(model, DeltaKVCache(model, **SMALL_CACHE), num_beams=beams))
    places = [layer.state.store.residual_codes.device.type for layer in cache.layers]
    # the layer that the next forward begins with is fetched ahead
    assert places.count("cpu") >= LAYERS - 1
    twin = copy.deepcopy(cache)
    cache.flush()
    cache.crop(-300)
    assert cache.dequantize(2)[0].shape[2] == cache.get_seq_length() == 339
    assert torch.equal(twin.dequantize(2)[0][:, :, :339], cache.dequantize(2)[0])


@torch.no_grad()
def test_offloading_bounds_the_memory_of_the_device(model):
    ids = torch.randint(1, 1000, (1, 20000), device="cuda")
    held = {}
    for offloading in (False, True):
        baseline = torch.cuda.memory_allocated()
        cache = DeltaKVCache(model, offloading=offloading)
        model(ids, past_key_values=cache, logits_to_keep=1)
        model(ids[:, :1], past_key_values=cache)
        torch.cuda.synchronize()
        held[offloading] = torch.cuda.memory_allocated() - baseline
        del cache
    # one layer and the RoPE tables stay
    assert held[True] < held[False] * 2 / LAYERS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [dict(recent_window=4096), SMALL_CACHE], ids=["lossless", "lossy"])
def test_a_model_split_over_gpus(model, options):
    accelerate = pytest.importorskip("accelerate")
    whole = generated(model, DeltaKVCache(model, **options))
    split = accelerate.dispatch_model(
        copy.deepcopy(model),
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        | {f"model.layers.{i}": int(i >= LAYERS // 2) for i in range(LAYERS)},
    )
    cache = DeltaKVCache(split, **options)
    assert torch.equal(generated(split, cache), whole)
    devices = [layer.state.store.residual_codes.device.index for layer in cache.layers]
    assert devices == [int(i >= LAYERS // 2) for i in range(LAYERS)]
    # layers of one device share their tables, although each was handed a copy
    assert len(cache._registry.tables) == 2


def test_a_saved_cache_changes_the_device(tmp_path):
    """Saved on the GPU, it goes on there bit for bit; on the CPU it has the same bytes."""
    model, host = new_model("gemma3").cuda(), new_model("gemma3")
    cache = DeltaKVCache(model, **TIGHT)
    inputs = {name: part.cuda() for name, part in left_padded([60, 41]).items()}
    ids = greedy(model, inputs, cache)
    cache.save(tmp_path / "cache", input_ids=ids)
    loaded = DeltaKVCache.load(tmp_path / "cache", model, input_ids=ids)
    moved = DeltaKVCache.load(tmp_path / "cache", host)
    for other in (loaded, moved):
        for a, b in zip(cache.own_layers, other.own_layers, strict=True):
            assert_same_tensors(*({k: v.cpu() for k, v in state_tensors(layer).items()} for layer in (a, b)))
    assert loaded.own_layers[0].state.tail_keys.is_cuda and loaded.layers[0].keys.is_cuda
    mask = torch.ones_like(ids)
    mask[:, :60] = inputs["attention_mask"]
    logits = [model(ids[:, -1:], attention_mask=mask, past_key_values=c).logits for c in (cache, loaded)]
    assert torch.equal(*logits)
    moved.save(tmp_path / "cache")
    back = host(ids[:, -1:].cpu(), attention_mask=mask.cpu(), past_key_values=moved).logits
    assert (back - logits[0].cpu()).abs().max() < 1e-3
    assert DeltaKVCache.load(tmp_path / "cache", model).layers[0].keys.is_cuda
