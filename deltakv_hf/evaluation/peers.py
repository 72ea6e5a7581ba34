"""Caches of others by name: those that run in the same process, and the bytes that they hold."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, QuantizedCache
from transformers.cache_utils import HQQQuantizedLayer

from ..errors import InvalidOptionError
from ..hf_compat import Cache
from ..memory import held_bytes
from .kivi import KiviCache


@dataclass(frozen=True)
class Peer:
    """A cache to measure against.

    Attributes:
        about: what it is, with its settings.
        make: makes an empty one from a model's config.
        module, package: what it imports and what is to be installed for that, or None.
    """

    about: str
    make: Callable[..., Cache]
    module: str | None = None
    package: str | None = None


def _kivi(nbits: int, group_size: int) -> Peer:
    options = {"nbits": nbits, "group_size": group_size, "residual_length": group_size}
    return Peer(f"KIVI, {nbits} bits, groups of {group_size}", lambda config: KiviCache(config, **options))


def _quantized(backend: str, nbits: int, axis: int, module: str, package: str) -> Peer:
    # the axes that the host's documentation names for each; all else as it comes
    options = {"nbits": nbits, "axis_key": axis, "axis_value": axis}
    about = f"transformers' QuantizedCache, {backend}, {nbits} bits"

    def make(config) -> Cache:
        cache = QuantizedCache(backend, config, **options)
        if backend == "hqq":
            for layer in cache.layers:
                layer.__class__ = PaddedHQQLayer
        return cache

    return Peer(about, make, module, package)


class PaddedHQQLayer(HQQQuantizedLayer):
    """The host's layer, but that the last token is repeated until hqq can pack what it is handed.

    The host hands it any number of tokens, and with an odd number of heads hqq breaks at those that are no multiple of
    two (4 bits) or four (2 bits). What was repeated is cut off again.
    """

    def _quantize(self, tensor, axis):
        num_tokens = tensor.shape[2]
        more = tensor[:, :, -1:].expand(-1, -1, -num_tokens % (8 // self.nbits), -1)
        return super()._quantize(torch.cat([tensor, more], dim=2), axis), num_tokens

    def _dequantize(self, qtensor):
        quantized, num_tokens = qtensor
        return super()._dequantize(quantized)[:, :, :num_tokens]


PEERS = {
    "kivi4": _kivi(4, 32),
    "kivi4-g64": _kivi(4, 64),
    "kivi2": _kivi(2, 32),
    "quanto4": _quantized("quanto", 4, 0, "optimum.quanto", "optimum-quanto"),
    "quanto2": _quantized("quanto", 2, 0, "optimum.quanto", "optimum-quanto"),
    "hqq4": _quantized("hqq", 4, 1, "hqq", "hqq"),
    "hqq2": _quantized("hqq", 2, 1, "hqq", "hqq"),
}

# of kvpress, measured by a process of its own (`presses.py`): what each is called in tables, and where no byte is freed
PRESSES = {
    "snapkv": "SnapKV {}",
    "chunkkv": "ChunkKV over SnapKV {}",
    "expected_attention": "ExpectedAttention {}",
    "kvzip": "KVzip {}, masked",
    "keydiff": "KeyDiff {}",
    "streaming_llm": "StreamingLLM {}",
    "think": "ThinK {}, zeroed",
}


def pick_peer(name: str) -> Peer:
    """The peer called `name`.

    Raises:
        InvalidOptionError: there is none, or its package is not installed.
    """
    if name not in PEERS:
        known = [*PEERS, *(f"{press}-0.5" for press in PRESSES)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise InvalidOptionError(f"`peer` must be one of {', '.join(known)}, got {name!r}.{hint}")
    peer = PEERS[name]
    if peer.module and not _importable(peer.module):
        raise InvalidOptionError(
            f"`peer` must be one whose package is installed, got {name!r}, which needs `{peer.package}`: "
            f"pip install {peer.package}"
        )
    return peer


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def stored_share(model: PreTrainedModel, cache: Cache) -> float:
    """Bytes of all tensors that the layers of `cache` hold, over those of a dense cache of its tokens (one row)."""
    text = model.config.get_text_config(decoder=True)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    token_bytes = 2 * text.num_hidden_layers * heads * width * model.dtype.itemsize
    held = held_bytes([tensor for layer in cache.layers for tensor in _plain_tensors(vars(layer))])
    return held / (cache.get_seq_length() * token_bytes)


def copy_cache(cache: Cache) -> Cache:
    """A copy that may be fed while `cache` stays as it is."""
    if not isinstance(cache, QuantizedCache):
        return copy.deepcopy(cache)
    # quanto's tensors cannot be copied, and need not be: the host puts others in their place
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def _plain_tensors(held: object) -> Iterator[torch.Tensor]:
    """The plain tensors in `held`: of dicts, sequences, and tensors that are made of others, as quanto's are."""
    if isinstance(held, torch.Tensor):
        if type(held) is not torch.Tensor and hasattr(held, "__tensor_flatten__"):
            yield from _plain_tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
        else:
            yield held
    elif isinstance(held, dict):
        yield from _plain_tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from _plain_tensors(part)
