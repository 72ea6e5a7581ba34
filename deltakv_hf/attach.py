"""What this package does to a model: forward pre-hooks that tell a cache what only the model knows.

`transformers` gives `Cache.update` neither positions nor padding. Two stateless module-level hooks, registered once per
model, hand over the RoPE tables (on every attention module) and the 2-D padding mask (on the model and the text
decoder inside it). They do nothing in a forward whose cache is not ours. `detach` removes them. (A longrope model gets
one method more, see `longrope.py`.)
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .hf_compat import DynamicCache
from .longrope import guard, unguard
from .rope import RopeForm, unrotated_tokens
from .rotary import RotaryCall, RotaryWatch

PROBE_TOKENS = 7


@dataclass(frozen=True)
class LayerProbe:
    """What was learnt about one attention layer by running it.

    Attributes:
        module: weak reference to the attention module.
        kind: "rope" (keys are un-rotated before they are compressed), "none" (the layer does not rotate),
            "opaque" (nothing is known that would undo its rotation; keys are compressed as received).
        form: how "rope" layers rotate, else None.
        key_shape: its `(num_key_value_heads, head_dim)` as stored.
        rotary: the call that made the layer's tables, if it was found.
    """

    module: weakref.ref
    kind: str
    form: RopeForm | None
    key_shape: tuple[int, int]
    rotary: RotaryCall | None = None


_PROBES: weakref.WeakKeyDictionary[nn.Module, dict[int, LayerProbe]] = weakref.WeakKeyDictionary()


# arguments of a model that say no more than ids, padding and positions do
TEXT = (
    *("input_ids", "attention_mask", "position_ids", "cache_position", "labels"),
    *("logits_to_keep", "num_logits_to_keep", "past_key_values", "use_cache"),
)


def attach(model: PreTrainedModel) -> dict[int, LayerProbe]:
    """Registers the hooks once and probes once; returns what is known of each layer that stores keys.

    Args:
        model: a decoder-only `transformers` model (wrappers by PEFT or `torch.compile` are looked through).
    """
    root = unwrap(model)
    # modules may have been replaced since (quantised, patched)
    known = _PROBES.get(root)
    if known is None or any(probe.module() is None for probe in known.values()):
        _PROBES[root] = _probe(root)
    for module in _mask_modules(root):
        _hook_once(module, note_forward)
    for probe in _PROBES[root].values():
        _hook_once(probe.module(), hand_tables)
    guard(root)
    return _PROBES[root]


def detach(model: PreTrainedModel) -> None:
    """Removes every hook of this package from a model; caches made for it raise on their next use.

    Args:
        model: that caches were made for (wrappers by PEFT or `torch.compile` are looked through).

    Raises:
        UnsupportedModelError: it is no `transformers` model.

    Examples:
        >>> detach(model)
        >>> cache.crop(0)  # a cache that is there already keeps what it holds
    """
    root = unwrap(model)
    for module in root.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (note_forward, hand_tables):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    unguard(root)
    _PROBES.pop(root, None)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The `PreTrainedModel` inside `model`."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and isinstance(inner, nn.Module):
        inner = next((m for m in inner.modules() if isinstance(m, PreTrainedModel)), inner)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"`model` must be a transformers PreTrainedModel or a PretrainedConfig, got {type(model).__name__}."
        )
    return inner


def note_forward(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Hook of the model and its text decoder: tells the cache the padding mask of the coming forward.

    The cache may answer with a mask that the model is to be given instead.
    """
    given = _named(module, args, kwargs)
    cache = given.get("past_key_values")
    if hasattr(cache, "note_forward"):
        names = ("attention_mask", "input_ids", "use_cache", "position_ids")
        is_text = not any(torch.is_tensor(value) for name, value in given.items() if name not in TEXT)
        mask = cache.note_forward(module, *(given.get(name) for name in names), is_text)
        if mask is not None and "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": mask}
    return None


def hand_tables(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hook of every attention module: hands its RoPE tables to the cache layer that it is about to update."""
    cache = kwargs.get(_cache_name(kwargs))
    if hasattr(cache, "note_attention"):
        cache.note_attention(module, _named(module, args, kwargs).get("position_embeddings"))


def _cache_name(kwargs: dict) -> str:
    """What an attention module calls its cache: older model files (gpt_neox, gptj, falcon) differ from all others."""
    return "layer_past" if "layer_past" in kwargs else "past_key_values"


def _named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """All arguments by name."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | kwargs


def _hook_once(module: nn.Module, hook) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _mask_modules(root: PreTrainedModel) -> list[nn.Module]:
    return [module for module in root.modules() if isinstance(module, PreTrainedModel)]


class _Recorder(DynamicCache):
    """A host cache that notes which module updated which layer."""

    def __init__(self, config):
        super().__init__(config=config)
        self.active: list[nn.Module] = []
        self.updated_by: dict[int, nn.Module] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.active:
            self.updated_by[layer_idx] = self.active[-1]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode, and each that was not back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _probe(root: PreTrainedModel) -> dict[int, LayerProbe]:
    """Runs a few fixed tokens through the model and finds out how each layer rotates its keys.

    Each attention module is called a second time with tables that rotate by nothing, which yields its own un-rotated
    keys; the form that turns these into the first call's keys is the layer's form. No random number is drawn.
    """
    config = root.config.get_text_config(decoder=True)
    recorder, calls = _Recorder(config), {}
    modules = list(root.modules())
    candidates = [m for m in modules if isinstance(getattr(m, "layer_idx", None), int)]

    def enter(module, args, kwargs):
        recorder.active.append(module)
        calls[module] = (args, dict(kwargs))

    def leave(module, args, kwargs, output):
        recorder.active.pop()

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in candidates]
    handles += [m.register_forward_hook(leave, with_kwargs=True) for m in candidates]
    watch = RotaryWatch(root)
    embedding = root.get_input_embeddings().weight
    device = "cpu" if embedding.device.type == "meta" else embedding.device
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device) % embedding.shape[0]
    # a compiled forward would be compiled for the probe's length
    forward = getattr(root.forward, "_torchdynamo_orig_callable", root.forward)
    try:
        with evaluation_mode(root), torch.no_grad():
            forward(input_ids=ids[None], past_key_values=recorder, use_cache=True)
            for handle in (*handles, watch):
                handle.remove()
            found = {
                layer_idx: _probe_layer(module, *calls[module], recorder, config, watch)
                for layer_idx, module in sorted(recorder.updated_by.items())
            }
    except TypeError as error:
        raise UnsupportedModelError(f"`model` must read `input_ids` with `past_key_values`: {error}.") from error
    finally:
        for handle in (*handles, watch):
            handle.remove()
    if not all(getattr(recorder.updated_by[layer_idx], "is_causal", True) for layer_idx in found):
        raise UnsupportedModelError(
            f"`model` must be causal, got {type(root).__name__}, which reads in both directions."
        )
    if not found:
        raise UnsupportedModelError(f"`model` must store keys and values, but {type(root).__name__} stored none.")
    return found


def _probe_layer(module: nn.Module, args, kwargs, first: _Recorder, config, watch: RotaryWatch) -> LayerProbe:
    """Compares the keys that the call `(args, kwargs)` stored in `first` with those of a call that does not rotate."""
    rotated = first.layers[module.layer_idx].keys
    key_shape = rotated.shape[1], rotated.shape[3]
    tables = kwargs.get("position_embeddings")
    if not (isinstance(tables, tuple) and len(tables) == 2 and tables[0].ndim == 3):
        return LayerProbe(weakref.ref(module), "opaque", None, key_shape)
    # a sliding layer keeps its newest keys only
    cos, sin = (table[:, table.shape[1] - rotated.shape[2] :] for table in tables)
    recorder = DynamicCache(config=config)
    still = torch.ones_like(tables[0]), torch.zeros_like(tables[1])
    module(*args, **(kwargs | {_cache_name(kwargs): recorder, "position_embeddings": still}))
    plain = recorder.layers[module.layer_idx].keys
    if torch.equal(plain, rotated):
        return LayerProbe(weakref.ref(module), "none", None, key_shape)
    for form in _forms(cos, rotated.shape[-1]):
        if _explains(form, plain, rotated, cos, sin):
            return LayerProbe(weakref.ref(module), "rope", form, key_shape, watch.find(tables))
    return LayerProbe(weakref.ref(module), "opaque", None, key_shape)


def _forms(cos: torch.Tensor, head_dim: int) -> list[RopeForm]:
    """Forms to try; a table is cut short only if its other half says the same."""
    width, tables = cos.shape[-1], []
    if width % 2 == 0 and width <= head_dim:
        if torch.equal(cos[..., : width // 2], cos[..., width // 2 :]):
            tables.append("halves")
        if torch.equal(cos[..., ::2], cos[..., 1::2]):
            tables.append("pairs")
    if 2 * width <= head_dim:
        tables.append("single")
    return [RopeForm(pairing, table) for table in tables for pairing in ("half", "interleaved")]


def _explains(form: RopeForm, plain: torch.Tensor, rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    tolerance = 4 * torch.finfo(rotated.dtype).eps
    angles = tuple(form.angles(table).float() for table in (cos, sin))
    there = torch.empty(plain.shape, dtype=torch.float32, device=plain.device)
    form.apply(plain.float(), *(part.unsqueeze(1) for part in angles), there)
    back = unrotated_tokens(form, rotated, rotated[..., :0], angles).unflatten(-1, (rotated.shape[1], -1))
    back = back.transpose(1, 2)
    pairs = ((there, rotated.float()), (back, plain.float()))
    return all((a - b).norm() <= tolerance * b.norm() for a, b in pairs)
