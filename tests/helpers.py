"""Drives a cache with given keys and values, and looks at what it holds."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import pytest
import torch
from hypothesis import strategies as st
from models import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from deltakv_hf import DeltaKVCache, JointEncodedCache, reading
from deltakv_hf.config import FREE
from deltakv_hf.layer import DeltaKVLayer

# compresses nearly everything of a short text
TIGHT = dict(recent_window=8, block_size=4, num_sink_tokens=2, reference_stride=4)
LOSSLESS = dict(recent_window=4096)
NUM_LAYERS = 2


def options_of(cache: DeltaKVCache) -> dict:
    """What makes another cache like `cache` for its model."""
    if cache.compressor is None:
        return asdict(cache.options)
    if isinstance(cache, JointEncodedCache):
        return {"residual": cache.compressor} | asdict(cache.options)
    return {"compressor": cache.compressor} | {name: getattr(cache.options, name) for name in FREE}


# -- given keys and values ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Keys and values of a batch, as a model would hand them over.

    Attributes:
        keys, values: `[layers, batch, heads, columns, head_dim]`, keys after rotation.
        cos, sin: `[1 or batch, columns, head_dim]`.
        mask: `[batch, columns]` int64, or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None

    def __len__(self) -> int:
        return self.keys.shape[3]

    def columns(self, idx) -> Tokens:
        """The columns `idx` (slice, mask or index tensor)."""
        mask = None if self.mask is None else self.mask[:, idx]
        parts = self.keys[..., idx, :], self.values[..., idx, :], self.cos[:, idx], self.sin[:, idx]
        return Tokens(*parts, mask)

    def rows(self, idx: list[int]) -> Tokens:
        """The rows `idx`, padding and all."""
        cos, sin = (self.cos, self.sin) if self.cos.shape[0] == 1 else (self.cos[idx], self.sin[idx])
        return Tokens(self.keys[:, idx], self.values[:, idx], cos, sin, None if self.mask is None else self.mask[idx])

    def alone(self, row: int) -> Tokens:
        """One row without its padding."""
        own = self.rows([row])
        return own if own.mask is None else replace(own.columns(own.mask[0].bool()), mask=None)


def rope_tables(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin `[rows, columns, width]` of int positions `[rows, columns]`, each angle held twice."""
    frequency = 1000.0 ** -(torch.arange(width // 2) / (width // 2))
    angles = positions[..., None].float() * frequency
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def make_tokens(
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 8,
    mask: torch.Tensor | None = None,
    layers: int = NUM_LAYERS,
    seed: int = 0,
) -> Tokens:
    """Random tokens that repeat themselves a little, so that a search for similar ones has something to find."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, batch, heads, length, head_dim)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    if length:
        topics = torch.randint(0, 5, (length,), generator=generator) % length
        keys, values = (part * 0.5 + part[..., topics, :] for part in (keys, values))
    positions = torch.arange(length)[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    return Tokens(keys, values, *rope_tables(positions, head_dim), mask)


def feed(cache: DeltaKVCache, tokens: Tokens, chunks: list[int], past: int = 0) -> list[tuple]:
    """Feeds columns `past ..` of `tokens` in calls of the given lengths; returns the last call's view of each layer.

    The mask of each call is the one of the whole sequence, as the model hands it over.
    """
    views = []
    for length in chunks:
        part = tokens.columns(slice(past, past + length))
        past += length
        mask = None if tokens.mask is None else tokens.mask[:, :past]
        cache._ledger.note_mask(mask, outermost=True)
        cos, sin = part.cos.clone(), part.sin.clone()
        views = []
        for layer_idx, layer in enumerate(cache.layers):
            layer.receive_tables(cos, sin)
            views.append(cache.update(part.keys[layer_idx].clone(), part.values[layer_idx].clone(), layer_idx))
    assert past == len(tokens), "the chunks must cover the tokens"
    return views


def driven(tokens: Tokens, chunks: list[int] | None = None, *, flush: bool = True, **options) -> DeltaKVCache:
    """A cache that was fed `tokens` (in one call unless told), flushed."""
    cache = DeltaKVCache(tiny_model("llama"), **TIGHT | options)
    feed(cache, tokens, chunks or [len(tokens)])
    if flush:
        cache.flush()
    return cache


def dense(view: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain tensors of a pair that `update` returned."""
    keys, values = view
    return torch.clone(keys), torch.clone(values)


def state_tensors(layer: DeltaKVLayer) -> dict[str, torch.Tensor]:
    """Every tensor of a layer's state by name, those of the store included."""
    return layer.state.raw() | {f.name: getattr(layer.state.store, f.name) for f in fields(layer.state.store)}


def row_records(cache: DeltaKVCache, layer_idx: int, row: int) -> dict[str, torch.Tensor]:
    """What a flushed layer holds of one row, without the unused places behind shorter rows."""
    layer = cache.layers[layer_idx]
    compressed, tail = cache._ledger.compressed[row], cache._ledger.tail_lengths[row]
    num_references = layer.compressor.lattice.count(compressed)
    counts = {"pending": 0, "tail": tail, "sink": cache.options.num_sink_tokens if compressed else 0}
    records = {}
    for name, tensor in state_tensors(layer).items():
        own = tensor[row]
        if name.endswith(("_keys", "_values")):
            records[name] = own[:, : counts[name.split("_")[0]]]
        elif name in ("reference_codes", "reference_levels"):
            records[name] = own[:num_references]
        else:
            records[name] = own[: compressed - num_references]
    return records


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Both hold the same names, shapes, types and bytes."""
    assert left.keys() == right.keys()
    for name in left:
        a, b = left[name], right[name]
        assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        assert torch.equal(_bytes(a), _bytes(b)), f"{name} differs"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # NaN is equal to itself here, and -0 is not 0
    return tensor.flatten().view(torch.uint8)


def assert_same_state(left: DeltaKVCache, right: DeltaKVCache) -> None:
    """Byte for byte the same stored tensors in every layer."""
    for a, b in zip(left.own_layers, right.own_layers, strict=True):
        assert_same_tensors(state_tensors(a), state_tensors(b))


# -- hypothesis --------------------------------------------------------------------------------------------------------


def cuts(length: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut `length` columns into calls."""
    places = st.sets(st.integers(1, max(1, length - 1)), max_size=12) if length > 1 else st.just(set())
    return places.map(lambda chosen: _lengths(sorted(chosen), length))


def _lengths(places: list[int], length: int) -> list[int]:
    edges = [0, *places, length]
    return [stop - start for start, stop in zip(edges, edges[1:], strict=False)]


def option_sets() -> st.SearchStrategy[dict]:
    """Options over their whole range, small counts preferred."""
    return st.fixed_dictionaries(
        {
            "num_sink_tokens": st.integers(0, 5),
            "recent_window": st.integers(0, 12),
            "block_size": st.integers(1, 9),
            "reference_stride": st.integers(1, 7),
            "reference_growth": st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.3]),
            "top_k": st.integers(1, 3),
            "nbits": st.sampled_from([2, 4, 8]),
            "reference_nbits": st.sampled_from([4, 8]),
            "group_size": st.sampled_from([1, 5, 8, 64]),
        }
    )


# (key-value heads, head_dim); 7 * 20 and 1 * 6 give groups that no power of two divides
SHAPES = [(1, 4), (1, 20), (2, 8), (3, 20), (4, 6)]


# -- memory ------------------------------------------------------------------------------------------------------------


def reachable_tensors(root: object) -> list[tuple[str, torch.Tensor]]:
    """(path, tensor) of every tensor that an object keeps alive through attributes and containers."""
    found, seen, todo = [], set(), [("cache", root)]
    while todo:
        path, value = todo.pop()
        if id(value) in seen or isinstance(value, (type, str, int, float, torch.dtype, torch.device)):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append((path, value))
        elif isinstance(value, dict):
            todo += [(f"{path}[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [(f"{path}[{place}]", item) for place, item in enumerate(value)]
        elif isinstance(value, functools.partial):
            todo += [(f"{path}.args", value.args), (f"{path}.keywords", value.keywords)]
        elif getattr(value, "__closure__", None):
            todo += [(f"{path}.closure", [cell.cell_contents for cell in value.__closure__])]
        elif hasattr(value, "__dict__") and not callable(value):
            todo += [(f"{path}.{name}", item) for name, item in vars(value).items()]
        elif isinstance(value, torch.nn.Module):
            todo += [(f"{path}.buffers", dict(value.named_buffers()))]
    return found


def held_storages(root: object) -> dict[str, int]:
    """Bytes of each distinct storage that an object keeps alive, by the first path that leads to it."""
    found = {}
    for path, tensor in reachable_tensors(root):
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found.setdefault(storage.data_ptr(), (path, storage.nbytes()))
    return dict(found.values())


class StorageTracker(TorchDispatchMode):
    """Bytes of the storages made while it is active and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(a.untyped_storage()) for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                self.note(tensor)
        self.peak = max(self.peak, self.live())
        return out

    def note(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor from now on."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._known[reference.cdata] = (reference, tensor.untyped_storage().nbytes())

    def live(self) -> int:
        """Bytes alive now."""
        self._known = {key: held for key, held in self._known.items() if not held[0].expired()}
        return sum(size for _, size in self._known.values())


def set_scratch_bytes(monkeypatch, size: int) -> None:
    """Decodes in tiles of so many bytes."""
    held = reading.SCRATCH_BYTES
    monkeypatch.setattr(reading, "SCRATCH_BYTES", dict.fromkeys(held, size) if isinstance(held, dict) else size)


# -- models ------------------------------------------------------------------------------------------------------------


def prompt(batch: int = 1, length: int = 48, seed: int = 0) -> torch.Tensor:
    """Random token ids without the padding id 0."""
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of prompts of the given lengths."""
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return {"input_ids": prompt(len(lengths), longest, seed) * mask, "attention_mask": mask}


def greedy(model, inputs, cache, max_new_tokens: int = 12, **options):
    """Greedy generation; `inputs` are token ids or keyword inputs."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": max_new_tokens} | options
    return model.generate(**inputs, past_key_values=cache, **options)


def full_cache(model) -> DynamicCache:
    """What the model would use without us."""
    return DynamicCache(config=model.config)


def teacher_forced(model, ids: torch.Tensor, cache, num_prompt: int, chunk: int = 1, **inputs) -> torch.Tensor:
    """Logits of `ids` fed as a prompt and then in calls of `chunk` tokens."""
    mask = inputs.pop("attention_mask", None)
    edges = [0, *range(num_prompt, ids.shape[1], chunk), ids.shape[1]]
    logits = []
    for start, stop in zip(edges, edges[1:], strict=False):
        now = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if mask is not None:
            now["position_ids"] = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:stop]
        logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **now, **inputs).logits)
    return torch.cat(logits, dim=1)


@contextmanager
def poisoned_memory():
    """`torch.empty` with NaN in it where that is possible: nothing may be read before it is written."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield
