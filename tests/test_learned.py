"""The learned compressor: its networks, its codes, and that they mean the same however tokens came."""

import pytest
import torch
from compressors import TIGHT_WINDOW, append, decode, learned_compressor, random_networks
from deltakv_hf.kernels.reference import dequantize, feed_forward, nearest_references, predict
from helpers import prompt
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_model
from torch import nn

from deltakv_hf import CompressorError, DeltaKVCache, InvalidOptionError, KVCompressor
from deltakv_hf.compressor.learned import LearnedCompressor
from deltakv_hf.compressor.learned_tensors import read_learned

WIDTH, LATENT = 32, 16
RECORD = {
    "widths": [WIDTH // 2, WIDTH // 2],
    "reference_stride": 4,
    "reference_growth": 0.0,
    "top_k": 2,
    "latent_nbits": 0,
    "latent_group_size": 8,
}


def coder(record=None, **networks):
    weights = random_networks(WIDTH, LATENT, **networks)
    tensors = {f"layers.0.{name}": tensor for name, tensor in weights.items()}
    return LearnedCompressor(read_learned(tensors, RECORD | (record or {}), 0, "a test"))


def random_tokens(batch, count):
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(count))


class Swiglu(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(6, 16, bias=False), nn.Linear(8, 5, bias=False)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(a) * b)


PLAIN = {
    "linear": lambda: nn.Linear(6, 5),
    "mlp_gelu": lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)),
    "mlp_swiglu": Swiglu,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_networks_are_the_formulas(kind):
    torch.manual_seed(0)
    module, x = PLAIN[kind](), torch.randn(3, 4, 6)
    torch.testing.assert_close(feed_forward(x, module.state_dict(), kind), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("networks", [{}, {"down": "linear", "bias": True}, {"down": "mlp_gelu", "up": "mlp_gelu"}])
@pytest.mark.parametrize("nbits", [0, 2, 4, 8])
def test_a_token_reads_back_as_the_formula_says(nbits, networks):
    """x = f_up(f_down(x) - f_down(r)) + r, references as they are."""
    one, tokens = coder({"latent_nbits": nbits}, **networks), random_tokens(2, 41)
    store = append(one, tokens, [])
    back = decode(one, store, 41)
    is_reference = torch.arange(41) % 4 == 0
    references = tokens[:, is_reference].bfloat16().float()
    assert torch.equal(back[:, is_reference], references)
    others, visible = tokens[:, ~is_reference], (torch.arange(41)[~is_reference] // 4 + 1).expand(2, -1)
    mean = predict(references, nearest_references(others, references, visible, 2))
    down, up = one.learned.down, one.learned.up
    latents = down(others) - down(mean)
    if nbits:
        stored = dequantize(store.latents, store.latent_levels, nbits)
        assert (stored - latents).abs().max() <= 0.51 * store.latent_levels[..., 0].max() + 1e-2
        latents = stored
    torch.testing.assert_close(back[:, ~is_reference], up(latents.bfloat16().float()) + mean, rtol=2e-2, atol=3e-2)


@given(
    st.integers(1, 60),
    st.lists(st.integers(1, 60)),
    st.sampled_from([0, 4]),
    st.sampled_from([(4, 0.0), (2, 0.3), (7, 0.0)]),
)
def test_codes_do_not_depend_on_how_tokens_came(count, edges, nbits, lattice):
    one = coder({"latent_nbits": nbits, "reference_stride": lattice[0], "reference_growth": lattice[1]})
    tokens = random_tokens(2, count)
    whole = append(one, tokens, [])
    for other in (
        append(one, tokens, sorted({edge for edge in edges if edge < count})),
        append(one, tokens.flip(0), []).map(lambda part: part.flip(0)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(other).values(), strict=True))
    shapes = vars(one.empty(2, torch.device("meta"), count))
    for name, tensor in vars(whole).items():
        assert tensor.shape == shapes[name].shape and tensor.dtype == shapes[name].dtype


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 2]))
def test_a_cut_store_is_that_of_the_first_tokens(count, kept, nbits):
    one, kept = coder({"latent_nbits": nbits}), min(kept, count)
    tokens = random_tokens(1, count)
    cut, short = one.cut(append(one, tokens, []), kept), append(one, tokens[:, :kept], [])
    assert all(torch.equal(a, b) for a, b in zip(vars(cut).values(), vars(short).values(), strict=True))


@given(st.integers(1, 40), st.integers(0, 39), st.sampled_from([0, 4]))
def test_any_range_reads_back_the_same(count, start, nbits):
    one, start = coder({"latent_nbits": nbits}), min(start, count - 1)
    store = append(one, random_tokens(2, count), [])
    everything, part = decode(one, store, count), torch.full((2, count - start, WIDTH), torch.nan)
    scratch = torch.empty(2, 2 * count * WIDTH)
    for piece, pick in one.decode(store, one.references(store), start, count, scratch):
        pick(part).copy_(piece)
    torch.testing.assert_close(part, everything[:, start:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nbits", [0, 4])
def test_a_cache_holds_what_the_compressor_says(nbits):
    model = tiny_model("llama")
    made = learned_compressor(model, nbits)
    cache = DeltaKVCache(model, compressor=made, **TIGHT_WINDOW)
    model(prompt(2, 60), past_key_values=cache)
    report = cache.memory_report()
    held = report.compressed_share * report.compressed_dense_bytes
    assert held == pytest.approx(made.bytes_per_token() * report.compressed_tokens, rel=0.1)
    assert report.compressor_bytes == made.nbytes > 0


def test_a_folder_gives_the_compressor_back(tmp_path):
    made = learned_compressor(tiny_model("llama"), 4)
    made.save_pretrained(tmp_path / "made")
    again = KVCompressor.from_pretrained(tmp_path / "made")
    assert again.fingerprint == made.fingerprint
    assert "learned" in (tmp_path / "made" / "README.md").read_text()


def test_latents_of_another_width_are_another_compressor():
    made = learned_compressor(tiny_model("llama"), 0)
    small = made.with_latents(4, 16)
    assert small.bytes_per_token() < made.bytes_per_token()
    assert small.fingerprint != made.fingerprint and small.tensors is made.tensors
    assert small.with_latents(0).bytes_per_token() == made.bytes_per_token()
    for nbits, group_size in ((3, 8), (4, 5), (4, 64), (16, 8), (True, 8)):
        with pytest.raises(InvalidOptionError, match="nbits|group_size"):
            made.with_latents(nbits, group_size)


DAMAGE = {
    "missing": (lambda tensors, layer: tensors.pop("layers.0.up.weight"), "`up`"),
    "foreign": (lambda tensors, layer: tensors.update({"layers.0.up.more": torch.ones(1)}), "`up`"),
    "narrow": (lambda tensors, layer: tensors.update({"layers.0.up.weight": torch.ones(WIDTH, 3)}), "up.weight"),
    "odd": (lambda tensors, layer: tensors.update({"layers.0.down.w12.weight": torch.ones(5, WIDTH)}), "halves"),
    "integers": (lambda tensors, layer: tensors.update({"layers.0.up.weight": torch.ones(2, 2).int()}), "up.weight"),
    "nan": (lambda tensors, layer: tensors["layers.0.up.weight"].fill_(torch.nan), "finite"),
    "stride": (lambda tensors, layer: layer.update(reference_stride=1), "stride"),
    "top_k": (lambda tensors, layer: layer.update(top_k=0), "references"),
    "nbits": (lambda tensors, layer: layer.update(latent_nbits=3), "bits"),
    "no widths": (lambda tensors, layer: layer.pop("widths"), "widths"),
    "growth": (lambda tensors, layer: layer.update(reference_growth=-1), "growth"),
    "group": (lambda tensors, layer: layer.update(latent_nbits=4, latent_group_size=7), "groups"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tensors_that_do_not_belong_together_are_refused(damage):
    change, word = DAMAGE[damage]
    tensors = {f"layers.0.{name}": tensor for name, tensor in random_networks(WIDTH, LATENT).items()}
    record = dict(RECORD)
    change(tensors, record)
    with pytest.raises(CompressorError, match=word):
        read_learned(tensors, record, 0, "a test")
