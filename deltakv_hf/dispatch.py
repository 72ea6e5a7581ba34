"""The only place that imports kernels: one function per op, backend chosen here."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F

from .errors import InvalidOptionError
from .kernels import reference
from .kernels.reference import (
    INT4_GROUP,
    LINEAR_MAPS,
    Attended,
    Fusion,
    Groups,
    KeyMap,
    References,
    Rotation,
    ValueMap,
    Vectors,
    dequantize,
    feed_forward,
    grid_limit,
    group_runs,
    int4_dense,
    int4_encode,
    paired,
    predict,
    quantize,
    reconstruct,
    score,
    weigh,
)

__all__ = [
    "INT4_GROUP",
    "LINEAR_MAPS",
    "Attended",
    "Fusion",
    "Groups",
    "KeyMap",
    "References",
    "Rotation",
    "ValueMap",
    "Vectors",
    "analyse",
    "analyse_states",
    "attend",
    "attend_blocks",
    "attend_many",
    "block_directions",
    "choose",
    "compare_blocks",
    "dequantize",
    "feed_forward",
    "grid_limit",
    "group_runs",
    "int4_decode",
    "int4_dense",
    "int4_encode",
    "nearest_references",
    "paired",
    "predict",
    "quantize",
    "reconstruct",
    "reconstruct_and_attend",
    "residuals",
    "score",
    "score_leading",
    "unrotate",
    "vector_dequantize",
    "vector_quantize",
    "weigh",
]

BACKENDS = ("reference", "triton")
LEAST_CAPABILITY = (7, 5)
# what a GPU does with Triton by itself (docs/kernels.md)
CHOSEN = (
    "analyse",
    "analyse_states",
    "attend",
    "attend_blocks",
    "block_directions",
    "choose",
    "compare_blocks",
    "int4_decode",
    "nearest_references",
    "reconstruct_and_attend",
    "residuals",
    "score_leading",
    "unrotate",
    "vector_dequantize",
    "vector_quantize",
)


def analyse(
    tokens: torch.Tensor,
    mean: torch.Tensor,
    weights: torch.Tensor,
    inverse: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/analyse.py`; backends differ in the order of sums, by a millionth of a token."""
    return _op("analyse", backend, tokens.device)(tokens, mean, weights, inverse)


def analyse_states(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    mean: torch.Tensor,
    weights: torch.Tensor,
    inverse: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/analyse_states.py`; backends differ in the order of sums, by a millionth of a token."""
    states = key_states, value_states, angles, interleaved
    return _op("analyse_states", backend, key_states.device)(*states, mean, weights, inverse)


def attend(
    query: torch.Tensor,
    parts: list[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Attended:
    """See `kernels/reference/attend.py`; backends differ in the order of sums, in 16 bits in rounding."""
    return _op("attend", backend, query.device)(query, parts, mask, scale)


def attend_blocks(
    query: torch.Tensor,
    blocks: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: int,
    value_dim: int,
    fusion: Fusion | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Attended:
    """See `kernels/reference/attend_blocks.py`; backends differ in the order of sums, in 16 bits in rounding."""
    op = _op("attend_blocks", backend, query.device)
    kind = fusion, rotation, mask, lengths, before
    return op(query, blocks, block_table, num_tokens, value_dim, *kind, scale, dtype)


def attend_many(
    query: torch.Tensor,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> Attended:
    """See `kernels/reference/attend.py`; on CUDA by the kernel of torch that never holds the scores."""
    sizes = query.shape[-1] % 8, value_states.shape[-1] % 8
    if query.device.type != "cuda" or torch.version.hip is not None or any(sizes):
        return reference.attend_many(query, key_states, value_states, mask, scale)
    if mask is not None:
        # the kernel wants rows at whole words, and numbers: a query may see nothing here
        mask = mask.clamp(min=torch.finfo(query.dtype).min / 2).to(query.dtype)
        mask = F.pad(mask, (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
        mask = mask.expand(*query.shape[:3], -1)
    out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key_states, value_states, mask, True, scale=scale
    )
    sums = sums[..., : query.shape[2], None]
    return Attended(out.float(), sums)


def block_directions(
    blocks: torch.Tensor,
    places: torch.Tensor,
    mean: torch.Tensor,
    key_width: int,
    dtype: torch.dtype,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels/reference/block_directions.py`; backends differ in the order of sums."""
    return _op("block_directions", backend, blocks.device)(blocks, places, mean, key_width, dtype)


def compare_blocks(
    blocks: torch.Tensor,
    members: torch.Tensor,
    leaders: torch.Tensor,
    mean: torch.Tensor,
    key_width: int,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels/reference/compare_blocks.py`; backends differ in the order of sums."""
    return _op("compare_blocks", backend, blocks.device)(blocks, members, leaders, mean, key_width)


def choose(scores: torch.Tensor, log_total: torch.Tensor, budget: int, backend: str | None = None) -> torch.Tensor:
    """See `kernels/reference/choose.py`; backends differ where weights are a thousandth apart."""
    return _op("choose", backend, scores.device)(scores, log_total, budget)


def nearest_references(
    tokens: torch.Tensor,
    references: torch.Tensor,
    num_visible: torch.Tensor,
    top_k: int,
    places: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/nearest_references.py`; every backend gives the same references."""
    return _op("nearest_references", backend, tokens.device)(tokens, references, num_visible, top_k, places)


def residuals(
    tokens: torch.Tensor,
    places: torch.Tensor,
    references: torch.Tensor,
    reference_idx: torch.Tensor,
    prediction: torch.Tensor,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/residuals.py`; every backend gives the same numbers."""
    return _op("residuals", backend, tokens.device)(tokens, places, references, reference_idx, prediction)


def vector_quantize(
    x: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    steps: list[torch.Tensor],
    groups: Groups | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/vector_quantize.py`; every backend gives the same bytes."""
    return _op("vector_quantize", backend, x.device)(x, starts, tables, steps, groups)


def vector_dequantize(
    codes: torch.Tensor,
    starts: list[int],
    tables: list[torch.Tensor],
    scale: torch.Tensor,
    scratch: torch.Tensor | None = None,
    groups: Groups | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/vector_quantize.py`; every backend gives the same numbers."""
    op = _op("vector_dequantize", backend, codes.device)
    return op(codes, starts, tables, scale, scratch, groups)


def reconstruct_and_attend(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    value_map: ValueMap,
    references: References | None = None,
    rotation: Rotation | None = None,
    mask: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Attended:
    """See `kernels/reference/reconstruct_and_attend.py`; backends differ in the order of sums."""
    op = _op("reconstruct_and_attend", backend, query.device)
    maps, kind = (key_map, value_map), (references, rotation, mask, slots, slot_map, lengths)
    return op(query, codes, vectors, *maps, *kind, before, scale, dtype)


def score_leading(
    query: torch.Tensor,
    codes: torch.Tensor,
    vectors: Vectors,
    key_map: KeyMap,
    references: References | None = None,
    rotation: Rotation | None = None,
    slots: torch.Tensor | None = None,
    slot_map: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/score_leading.py`; backends differ in the order of sums."""
    op = _op("score_leading", backend, query.device)
    return op(query, codes, vectors, key_map, references, rotation, slots, slot_map, lengths, scale)


def unrotate(
    key_states: torch.Tensor,
    value_states: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """See `kernels/reference/unrotate.py`; every backend gives the same numbers."""
    return _op("unrotate", backend, key_states.device)(key_states, value_states, angles, interleaved)


def int4_decode(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    key_levels: torch.Tensor,
    value_codes: torch.Tensor,
    value_levels: torch.Tensor,
    mask: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    before: Attended | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Attended:
    """See `kernels/reference/int4_decode.py`; backends differ in the order of sums, in 16 bits in rounding."""
    op = _op("int4_decode", backend, query.device)
    encoded, options = (key_codes, key_levels, value_codes, value_levels), (mask, block_table, lengths, scores)
    return op(query, *encoded, *options, before, scale, dtype)


def has_kernels(device: torch.device) -> bool:
    """Whether ops on `device` run as Triton kernels by themselves; a GPU where they cannot is warned about once."""
    return device.type == "cuda" and torch.version.hip is None and _runs_triton(device)


@cache
def _runs_triton(device: torch.device) -> bool:
    # the smallest call there is: Triton may be missing, too old, or without a compiler for what launches a kernel
    try:
        if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            raise RuntimeError(f"its compute capability is below {LEAST_CAPABILITY}")
        tables = [torch.zeros(1, 256, 1, dtype=torch.int16, device=device)]
        steps = [torch.ones(1, device=device)]
        vector_quantize(torch.zeros(1, 1, 1, device=device), [0], tables, steps, backend="triton")
    except Exception as error:
        warnings.warn(f"the cache runs without its kernels on {device}, many times slower: {error}", stacklevel=2)
        return False
    return True


def _op(name: str, backend: str | None, device: torch.device):
    """The function of an op; None takes what is fastest on the device.

    Raises:
        InvalidOptionError: there is no such backend, or it cannot run here.
    """
    if backend not in (None, *BACKENDS):
        raise InvalidOptionError(f"`backend` must be {' or '.join(BACKENDS)}, got {backend!r}.")
    if backend is None:
        backend = "triton" if name in CHOSEN and has_kernels(device) else "reference"
    if backend == "reference":
        return getattr(reference, name)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InvalidOptionError(
            f"`backend` must run on the device of the tensors, got 'triton' and {device.type}: move them to an NVIDIA "
            "GPU, or leave `backend` out."
        )
    try:
        op = getattr(import_module(f".kernels.triton_ops.{name}", __package__), name)
    except ImportError as error:
        raise InvalidOptionError(
            f"`backend` must be installed, got 'triton': {error}. Install triton 3.4 or newer, or leave `backend` out."
        ) from error
    if device.type != "cuda":
        return op

    def run(*arguments):
        # a kernel is launched on the current device, which need not be that of its tensors
        with torch.cuda.device(device):
            return op(*arguments)

    return run
