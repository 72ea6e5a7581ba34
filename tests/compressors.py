"""Compressors with random numbers for any tiny model: right in form, made in no time."""

from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from deltakv_hf import DeltaKVCache, KVCompressor
from deltakv_hf.calibration.capture import Observer
from deltakv_hf.calibration.vectors import to_grid
from deltakv_hf.compressor.base_model import describe_model
from deltakv_hf.compressor.codebook import Codebook
from deltakv_hf.compressor.transform_tensors import transform_tensors

# options of a cache that compresses nearly everything of a short text
TIGHT_WINDOW = dict(recent_window=8, block_size=4, num_sink_tokens=2)


def random_codebook(width: int, sizes: list[int], scale: float, generator: torch.Generator) -> Codebook:
    """Codebooks of groups of `sizes` components, one after the other as far as `width` goes."""
    starts, tables, steps, place = [], [], [], 0
    for size in sizes:
        if place + size > width:
            break
        table, step = to_grid(torch.randn(1, 256, size, generator=generator) * scale)
        starts.append(place)
        tables.append(table)
        steps.append(step)
        place += size
    return Codebook(starts, tables, steps, width)


def random_transform(
    key_width: int, value_width: int, stride: int = 4, splits: int = 1, seed: int = 0, scale: float = 1.0
) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors of layer 0 and its record, for components of about `scale`."""
    generator = torch.Generator().manual_seed(seed)
    width = key_width + value_width
    size = width // splits
    basis = torch.stack([torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(splits)])
    sizes = [1] * (width // 2) + [2] * (width // 8) + [3] * width
    books = {
        "reference": random_codebook(width, sizes, 1.5 * scale, generator),
        "residual": random_codebook(width, sizes[2:] if stride > 1 else [], 1.5 * scale, generator),
    }
    mean = torch.randn(width, generator=generator) * 0.1
    weights = torch.rand(width, generator=generator) + 0.5
    prediction = torch.rand(width, generator=generator)
    tensors, starts = transform_tensors(0, mean, weights, basis, prediction, books)
    return tensors, {"widths": [key_width, value_width], "reference_stride": stride, **starts}


def random_compressor(model: PreTrainedModel, stride: int = 4, splits: int = 1) -> KVCompressor:
    """A compressor for `model`: of two layers the second has no references."""
    observer = Observer(model)
    seen = observer.read(torch.arange(1, 12)[None] % model.config.get_text_config().vocab_size).tokens
    tensors, records = {}, [None] * (max(observer.widths) + 1)
    for place, (layer_idx, widths) in enumerate(observer.widths.items()):
        made, records[layer_idx] = random_transform(
            *widths, 1 if place % 2 else stride, splits, layer_idx, scale=seen[layer_idx].std().item()
        )
        tensors |= {name.replace("layers.0.", f"layers.{layer_idx}."): tensor for name, tensor in made.items()}
    return KVCompressor({"kind": "transform", "model": describe_model(model), "layers": records}, tensors)


def random_networks(
    width: int, latent_width: int, down: str = "mlp_swiglu", up: str = "linear", bias: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Weights of `down.*` and `up.*` of one layer; what goes in comes back about as large."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * width

    def linear(name: str, ins: int, outs: int) -> dict[str, torch.Tensor]:
        made = {f"{name}weight": torch.randn(outs, ins, generator=generator) * ins**-0.5}
        return made | ({f"{name}bias": torch.randn(outs, generator=generator)} if bias else {})

    weights = {}
    for part, kind, ins, outs in (("down", down, width, latent_width), ("up", up, latent_width, width)):
        maps = {
            "linear": [("", ins, outs)],
            "mlp_gelu": [("0.", ins, hidden), ("2.", hidden, outs)],
            "mlp_swiglu": [("w12.", ins, 2 * hidden), ("w3.", hidden, outs)],
        }
        for name, *sizes in maps[kind]:
            weights |= linear(f"{part}.{name}", *sizes)
    return weights


def learned_compressor(model: PreTrainedModel, nbits: int = 4, stride: int = 6) -> KVCompressor:
    """A learned compressor for `model` that is about right: its networks are a rotation of tokens and back."""
    tensors, records, widths = {}, [None] * model.config.get_text_config().num_hidden_layers, Observer(model).widths
    for layer_idx, own in widths.items():
        size = sum(own)
        rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(layer_idx)))[0]
        tensors |= {f"layers.{layer_idx}.down.weight": rotation, f"layers.{layer_idx}.up.weight": rotation.T.clone()}
        records[layer_idx] = {
            "widths": list(own),
            "reference_stride": stride,
            "reference_growth": 0.0,
            "top_k": 2,
            "latent_nbits": nbits,
            "latent_group_size": size,
        }
    return KVCompressor({"kind": "learned", "model": describe_model(model), "layers": records}, tensors)


def append(coder, tokens, edges):
    """The store after tokens `[batch, n, width]` came in pieces that end at `edges`."""
    store, start = coder.empty(tokens.shape[0], tokens.device), 0
    for stop in [*edges, tokens.shape[1]]:
        store = coder.append(store, None, start, stop, lambda a, b: prepared(coder, tokens[:, a:b]))
        start = stop
    return store


def prepared(coder, tokens):
    """Tokens `[batch, n, width]` that stand joined, as they are coded: like keys of one head, not rotated."""
    return coder.prepare(tokens[:, None], tokens[:, None, :, :0])


def decode(coder, store, count):
    """Tokens `0 .. count - 1` of every row."""
    out = torch.full((store.reference_idx.shape[0], count, coder.width), torch.nan)
    for tokens, pick in coder.decode(store, coder.references(store), 0, count):
        pick(out).copy_(tokens)
    return out


_MADE: WeakKeyDictionary[PreTrainedModel, dict] = WeakKeyDictionary()


def compressor_of(model: PreTrainedModel, make=random_compressor) -> KVCompressor | None:
    """The compressor that `make` gives for a model, made once; None if all its layers are the host's."""
    if not DeltaKVCache(model).own_layers:
        return None
    made = _MADE.setdefault(model, {})
    if make not in made:
        made[make] = make(model)
    return made[make]
