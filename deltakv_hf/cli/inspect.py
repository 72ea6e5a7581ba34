"""`deltakv inspect`: what the cache would do with each layer of a model."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass

import torch
from rich.table import Table

from ..attach import LayerProbe, attach
from ..cache import DeltaKVCache
from ..evaluation.model import DEMO_MODEL, load_by_name
from ..layer import DeltaKVLayer
from .console import console

TRIAL_TOKENS = 2
ROPE = {
    "none": "none",
    "opaque": "not undone",
    "unprobed": "not probed",
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        layer: its number.
        kind: what the host calls it ("full_attention", "sliding_attention", ...).
        compressed: whether it is stored by this package; the others are stored as the host does.
        rope: how keys are un-rotated before they are compressed: pairing and table of the `RopeForm`, "none" (the
            layer does not rotate), "not undone" or "not probed" (keys are compressed as received).
        dense_bytes: bytes a token takes in the full cache (0 if the layer stores no keys).
        stored_bytes: bytes a compressed token takes, references shared out; None if not compressed.
    """

    layer: int
    kind: str
    compressed: bool
    rope: str
    dense_bytes: int
    stored_bytes: float | None


def run_inspect(name: str, options: dict, device: str | None, dtype: str | None, as_json: bool) -> None:
    """Prints the plan of every layer of model `name` ("demo" for the one that comes from PyPI)."""
    # the loaders of transformers draw bars of their own
    with contextlib.redirect_stderr(io.StringIO()):
        model, _ = load_by_name(name, dtype, device)
    name = DEMO_MODEL if name == "demo" else name
    plans = plan_layers(model, options)
    dtype = str(model.dtype).removeprefix("torch.")
    if as_json:
        layers = [vars(plan) for plan in plans]
        print(json.dumps({"model": name, "dtype": dtype, "layers": layers, "total": totals(plans)}, indent=2))
        return
    console.print(layer_table(name, dtype, plans))
    console.print(total_line(totals(plans)))


@torch.no_grad()
def plan_layers(model, options: dict) -> list[LayerPlan]:
    """Feeds two tokens to an empty cache and reads what its layers became."""
    cache, probes = DeltaKVCache(model, **options), attach(model)
    ids = torch.arange(1, TRIAL_TOKENS + 1, device=model.device) % model.get_input_embeddings().weight.shape[0]
    model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(cache.layers)
    return [_plan(i, kinds[i], layer, probes.get(i)) for i, layer in enumerate(cache.layers)]


def _plan(layer_idx: int, kind: str, layer, probe: LayerProbe | None) -> LayerPlan:
    rope = _rope_words(probe)
    if not isinstance(layer, DeltaKVLayer):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        return LayerPlan(layer_idx, kind, False, rope, _token_bytes(keys, values), None)
    raw = [(layer.state.sink_keys, layer.state.tail_keys, layer.state.pending_keys)]
    raw += [(layer.state.sink_values, layer.state.tail_values, layer.state.pending_values)]
    # with two tokens all of them are raw, in one of the parts
    dense = _token_bytes(*(torch.cat(parts, dim=2) for parts in raw))
    return LayerPlan(layer_idx, kind, True, rope, dense, layer.compressor.bytes_per_token())


def _token_bytes(keys: torch.Tensor | None, values: torch.Tensor | None) -> int:
    """Bytes of one token in `[1, heads, n, head_dim]` keys and values."""
    return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (keys, values) if torch.is_tensor(x) and x.ndim == 4)


def _rope_words(probe: LayerProbe | None) -> str:
    if probe is None:
        return "stores no keys"
    if probe.form is None:
        return ROPE[probe.kind]
    return f"{probe.form.pairing} ({probe.form.table})"


def totals(plans: list[LayerPlan]) -> dict:
    """Sums over the layers; `dense_bytes` and `stored_bytes` are of those that are compressed."""
    own = [plan for plan in plans if plan.compressed]
    dense, stored = sum(plan.dense_bytes for plan in own), sum(plan.stored_bytes for plan in own)
    return {
        "layers": len(plans),
        "compressed_layers": len(own),
        "dense_bytes": dense,
        "stored_bytes": stored,
        "ratio": stored / dense if dense else None,
    }


def layer_table(name: str, dtype: str, plans: list[LayerPlan]) -> Table:
    """One line for each run of equal layers."""
    table = Table(title=f"{name}, {dtype}: bytes of a token in each layer", title_justify="left")
    for header in ("layers", "kind", "RoPE"):
        table.add_column(header)
    for header in ("full cache", "compressed", "share"):
        table.add_column(header, justify="right")
    for first, last, plan in _runs(plans):
        cells = [f"{first}" if first == last else f"{first}-{last}", plan.kind]
        cells += [plan.rope, f"{plan.dense_bytes:,}"]
        cells += (
            [f"{plan.stored_bytes:,.1f}", f"{plan.stored_bytes / plan.dense_bytes:.1%}"] if plan.compressed else ["no"]
        )
        table.add_row(*cells)
    return table


def _runs(plans: list[LayerPlan]) -> list[tuple[int, int, LayerPlan]]:
    """Consecutive layers that differ in nothing but their number: first, last, what they share."""
    runs = []
    for plan in plans:
        if runs and vars(runs[-1][2]) | {"layer": plan.layer} == vars(plan):
            runs[-1] = runs[-1][0], plan.layer, runs[-1][2]
        else:
            runs.append((plan.layer, plan.layer, plan))
    return runs


def total_line(total: dict) -> str:
    """The sums in words."""
    if not total["compressed_layers"]:
        return f"none of the {total['layers']} layers is compressed"
    return (
        f"{total['compressed_layers']} of {total['layers']} layers compressed: a token takes {total['dense_bytes']:,} "
        f"bytes in the full cache, {total['stored_bytes']:,.0f} compressed ({total['ratio']:.1%}); sinks and the "
        "recent window stay as they are"
    )
