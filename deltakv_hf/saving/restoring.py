"""Parts of a saved cache, checked against the model and the counts, and put into a new cache."""

from __future__ import annotations

from dataclasses import asdict, fields

import torch

from .. import host_layers
from ..errors import CacheStateError
from ..hf_compat import execution_device, host_version
from ..rope import RopeForm, RopeTables
from .encoding import decode


class Saved:
    """The content of a file; a tensor that was taken is gone.

    Attributes:
        content: what `saving.save` described.
    """

    def __init__(self, content: dict, tensors: dict[str, torch.Tensor]):
        self.content = content
        self._tensors = tensors

    def take(self, name: str) -> torch.Tensor:
        """A tensor, perhaps a view of the file: copy it before it is kept."""
        if name not in self._tensors:
            raise CacheStateError(f"the saved cache must hold a tensor {name!r}, but it is missing. Save it again.")
        return self._tensors.pop(name)

    def peek(self, name: str) -> torch.Tensor | None:
        """A tensor that is left where it is, or None if there is none."""
        return self._tensors.get(name)

    def check_used_up(self) -> None:
        """Raises if a tensor belongs to nothing."""
        if self._tensors:
            raise CacheStateError(
                f"the saved cache must hold no tensor {min(self._tensors)!r}, got one. Save it again."
            )


def layer_devices(cache, records: list[dict]) -> list[torch.device]:
    """Where each layer of the model runs; for a bare config where it ran, if there is such a device here."""
    if len(records) != len(cache.layers):
        raise CacheStateError(f"the saved cache must have {len(cache.layers)} layers, got {len(records)}.")
    if cache._model is None:
        return [_available(torch.device(record["device"])) for record in records]
    root = cache._model()
    found = {}
    for module in root.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int):
            found.setdefault(layer_idx, execution_device(module))
    found |= {layer_idx: execution_device(probe.module()) for layer_idx, probe in cache._probes.items()}
    default = execution_device(root) or torch.device("cpu")
    return [found.get(layer_idx) or default for layer_idx in range(len(records))]


def _available(device: torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError):
        return torch.device("cpu")


def restore_ledger(cache, saved: Saved) -> None:
    """The counts, after a check that they fit together."""
    ledger, counts, row_columns = cache._ledger, saved.content["ledger"], None
    expected = ledger.counts()
    if counts.keys() - {"released"} != expected.keys() or counts["num_layers"] != expected["num_layers"]:
        raise _wrong("ledger", "the counts of this version and model", counts)
    seen, columns, merged = counts["seen"], counts["columns"], counts["merged"]
    if any(len(value) != counts["batch_size"] for value in counts.values() if isinstance(value, list)):
        raise _wrong("ledger", f"{counts['batch_size']} numbers for as many rows", counts)
    if saved.content["padded"]:
        flat = saved.take("ledger.row_columns")
        if flat.dtype != torch.int64 or flat.shape != (sum(seen),):
            raise _wrong("ledger.row_columns", f"int64 [{sum(seen)}]", _shape(flat))
        row_columns = [part.clone() for part in flat.split(seen)]
        bounds = torch.tensor([-1]), torch.tensor([columns])
        if any((torch.cat([bounds[0], part, bounds[1]]).diff() <= 0).any() for part in row_columns):
            raise _wrong("ledger.row_columns", f"columns below {columns} in rising order", "others")
    elif seen != [columns] * counts["batch_size"]:
        raise _wrong("`seen`", f"{columns} in every row", seen)
    sinks = cache.options.num_sink_tokens
    sorted_in = [merged] * len(seen) if row_columns is None else [int((part < merged).sum()) for part in row_columns]
    stored = [c + (sinks if c else 0) + t for c, t in zip(counts["compressed"], counts["tail_lengths"], strict=True)]
    if stored != sorted_in or not merged <= columns or max(counts["tail_lengths"], default=0) > counts["tail_width"]:
        raise _wrong("ledger", "sinks, compressed and tail tokens that add up to those sorted in", counts)
    ledger.restore(counts, row_columns, {name: saved.take(f"ledger.{name}").clone() for name in ledger.held()})


def restore_tables(cache, saved: Saved, devices: list[torch.device]) -> dict[tuple[int, torch.device], RopeTables]:
    """RoPE tables by number and device: layers share those that they shared, on the same device."""
    ledger, records = cache._ledger, saved.content["layers"]
    restored = {}
    for number, form in enumerate(saved.content["tables"]):
        cos, sin = (saved.take(f"rope.{number}.{name}") for name in ("cos", "sin"))
        fits = cos.ndim == 3 and cos.shape[0] in (1, ledger.batch_size) and cos.shape[1] == ledger.columns
        if not fits or sin.shape != cos.shape or sin.dtype != cos.dtype or not cos.is_floating_point():
            shape = f"equal tables [1 or {ledger.batch_size}, {ledger.columns}, pairs]"
            raise _wrong(f"rope.{number}", shape, f"{_shape(cos)} and {_shape(sin)}")
        for record, device in zip(records, devices, strict=True):
            if record.get("tables") == number and (number, device) not in restored:
                tables = RopeTables(RopeForm(**form))
                tables.cos, tables.sin = (table.to(device, copy=True) for table in (cos, sin))
                restored[number, device] = tables
    cache._registry.tables.extend(restored.values())
    return restored


def restore_own_layer(cache, layer_idx: int, saved: Saved, device: torch.device, tables: dict) -> None:
    """State and tables of a layer that compresses."""
    layer, ledger, record = cache.layers[layer_idx], cache._ledger, saved.content["layers"][layer_idx]
    name = f"layers.{layer_idx}"
    if record["class"] != class_of(layer):
        raise _wrong(name, f"a {class_of(layer)}", record["class"])
    if record["state"] is None:
        return
    # made as if by a first token, which also says what the state must look like
    example = [_example(saved, f"{name}.state.{part}") for part in ("tail_keys", "tail_values")]
    layer.lazy_initialization(*(part[:, :, :0].to(device) for part in example))
    if record["compressor"] != type(layer.compressor).__name__:
        raise _wrong(name, f"written by a {type(layer.compressor).__name__}", record["compressor"])
    classes = {type(part).__name__: type(part) for part in (layer.state, layer.state.store)}
    state = decode(record["state"], lambda name, _: saved.take(name), lambda device: device, classes)
    _check_state(state, layer, ledger, name)
    layer.state = state.map(lambda tensor: tensor.to(device, copy=True))
    if cache.offloading:
        layer.offload()
    _give_tables(layer, record["tables"], tables, device, name)


def class_of(layer) -> str:
    """What a layer is called in a file: one of fixed size holds what a growing one does."""
    return getattr(layer, "saved_as", type(layer).__name__)


def _example(saved: Saved, name: str) -> torch.Tensor:
    tensor = saved.peek(name)
    if tensor is None or tensor.ndim != 4 or not tensor.is_floating_point():
        raise _wrong(name, "floats [batch, heads, tokens, head_dim]", None if tensor is None else _shape(tensor))
    return tensor


def _check_state(state, layer, ledger, name: str) -> None:
    """Every tensor must have the shape and dtype that the counts say, every count be the ledger's."""
    most = max(ledger.compressed, default=0)
    sinks = ledger.config.num_sink_tokens if most else 0
    widths = {"sink": sinks, "tail": ledger.tail_width, "pending": ledger.columns - ledger.merged}
    for field in fields(state):
        value, empty = getattr(state, field.name), getattr(layer.state, field.name)
        if field.name == "store":
            expected = layer.expected_store(value)
            for part in fields(value):
                _check_same(getattr(value, part.name), getattr(expected, part.name), f"{name}.state.store.{part.name}")
        elif torch.is_tensor(empty):
            batch_size, heads, _, head_dim = empty.shape
            width = widths[field.name.split("_")[0]]
            expected = torch.empty(ledger.batch_size, heads, width, head_dim, dtype=empty.dtype, device="meta")
            _check_same(value, expected, f"{name}.state.{field.name}")
        elif value != getattr(ledger, field.name):
            raise _wrong(f"{name}.state.{field.name}", f"the ledger's {getattr(ledger, field.name)}", value)


def _check_same(value: object, expected: object, name: str) -> None:
    if not torch.is_tensor(expected):
        if value != expected:
            raise _wrong(name, repr(expected), value)
    elif not torch.is_tensor(value) or value.dtype != expected.dtype or value.shape != expected.shape:
        raise _wrong(name, _shape(expected), _shape(value) if torch.is_tensor(value) else value)


def _give_tables(layer, number: int | None, tables: dict, device: torch.device, name: str) -> None:
    if (number is None) != (layer.form is None):
        raise _wrong(name, f"with keys rotated as {layer.form}", "another rotation")
    if number is None:
        return
    layer.tables = tables.get((number, device))
    if layer.tables is None or layer.tables.form != layer.form:
        raise _wrong(name, f"with keys rotated as {layer.form}", layer.tables and asdict(layer.tables.form))
    if 2 * layer.tables.cos.shape[2] > layer.state.tail_keys.shape[3]:
        raise _wrong(name, "tables no wider than a head", _shape(layer.tables.cos))


def restore_host_layer(cache, layer_idx: int, saved: Saved, device: torch.device) -> None:
    """Attributes of a layer of the host's, which must be those that the running version knows."""
    layer, record = host_layers.growing(cache.layers[layer_idx]), saved.content["layers"][layer_idx]
    name, home = f"layers.{layer_idx}", torch.device(record["device"])

    def place(held: torch.device) -> torch.device:
        # what was put aside to the CPU stays there
        return held if held.type == "cpu" and home.type != "cpu" else device

    attributes = {}
    if record["class"] == type(layer).__name__ and "attributes" in record:
        attributes = decode(record["attributes"], lambda n, held: saved.take(n).to(place(held), copy=True), place)
    misfit = _misfit(attributes, layer)
    if misfit:
        raise CacheStateError(
            f"the saved cache must fit the layers of transformers {host_version()}, but its layer {layer_idx}, a "
            f"{record['class']} of transformers {saved.content['host']}, {misfit}. Load it with that version, or save "
            "it again with this one."
        )
    keys = attributes.get("keys")
    if keys is not None and keys.numel() and keys.shape[0] != cache._ledger.batch_size and cache.own_layers:
        raise _wrong(f"{name}.keys", f"of {cache._ledger.batch_size} rows", _shape(keys))
    vars(layer).update(attributes)
    host_layers.put(cache.layers, layer_idx, layer)


def _misfit(attributes: dict, layer) -> str | None:
    """What keeps saved attributes from being those of `layer`, a new one of the running version."""
    if not attributes:
        return f"is not the {type(layer).__name__} that stands there"
    known = {n for cls in type(layer).__mro__ for f in vars(cls).values() for n in getattr(_code(f), "co_names", ())}
    for name, value in vars(layer).items():
        if name not in attributes:
            return f"has no attribute `{name}`"
        # an attribute that starts as None or a dict of such is filled later
        if value is not None and type(attributes[name]) is not type(value):
            return f"has an attribute `{name}` of type {type(attributes[name]).__name__}"
        if isinstance(value, dict) and value.keys() != attributes[name].keys():
            return f"has an attribute `{name}` with other keys"
    unknown = [name for name in attributes if name not in vars(layer) and name not in known]
    return f"has an attribute `{unknown[0]}`, which is not known" if unknown else None


def _code(function: object):
    return getattr(function, "__code__", None)


def _wrong(name: str, rule: str, value: object) -> CacheStateError:
    return CacheStateError(
        f"{name} of the saved cache must be {rule}, got {value}: it was written by another version or for another "
        "model. Save the cache again."
    )


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
