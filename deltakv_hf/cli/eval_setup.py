"""What the `deltakv eval` commands share: the model, the caches to measure, the file with the result."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from transformers import PreTrainedModel

from ..cache import DeltaKVCache
from ..compressor.kv_compressor import KVCompressor
from ..errors import InvalidOptionError
from ..evaluation.candidates import OURS, PAPER, PEER, Candidate
from ..evaluation.model import DEMO_MODEL, find_source, load_by_name
from ..evaluation.peers import pick_peer
from ..evaluation.press_environment import versions
from ..evaluation.presses import Press, PressModel, pick_press
from ..evaluation.steps import environment
from ..files import write_atomically
from ..hf_compat import Cache
from ..joint import JointEncodedCache
from .arguments import check_output, command_line
from .console import console, size

# the class of an option's "cache", and the argument that takes a compressor
KINDS = {"deltakv": (DeltaKVCache, "compressor"), "joint": (JointEncodedCache, "residual")}


@dataclass(frozen=True)
class EvalSettings:
    """What the command line says; `options` are JSON texts."""

    model: str
    options: list[str]
    compressors: list[str]
    peers: list[str]
    device: str | None
    dtype: str | None
    threads: int | None
    json_file: Path | None


def candidates(settings: EvalSettings) -> list[Candidate]:
    """The caches asked for, or `DeltaKVCache` as it comes; none is made yet."""
    texts = settings.options or ([] if settings.compressors or settings.peers else ["{}"])
    found = [_with_options(text) for text in texts] + [_with_compressor(name) for name in settings.compressors]
    found += [_of_others(name) for name in settings.peers]
    return list({candidate.name: candidate for candidate in found}.values())


def _with_options(text: str) -> Candidate:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidOptionError(f"`--options` must be JSON like '{{\"nbits\": 8}}', got {text!r}: {error}.") from error
    if not isinstance(options, dict):
        raise InvalidOptionError(f"`--options` must be a JSON object like '{{\"nbits\": 8}}', got {text!r}.")
    name = ", ".join(f"{option}={value}" for option, value in options.items()) or "DeltaKVCache"
    made = dict(options)
    kind = made.pop("cache", "deltakv")
    if kind not in KINDS:
        raise InvalidOptionError(f'`--options` must name a "cache" of {" or ".join(KINDS)}, got {kind!r}.')
    make, argument = KINDS[kind]
    if isinstance(made.get(argument), str):
        made[argument] = KVCompressor.from_pretrained(made[argument])
    role = _role(made.get(argument))
    return Candidate(name, {"options": options}, lambda model: make(model, **made), role)


def _with_compressor(name: str) -> Candidate:
    compressor = KVCompressor.from_pretrained(name)
    source = {"compressor": name}
    return Candidate(name, source, lambda model: DeltaKVCache(model, compressor=compressor), _role(compressor))


def _of_others(name: str) -> Candidate:
    press = pick_press(name)
    if press:
        return Candidate(press.about, {"peer": name, "peer_environment": versions()}, None, PEER, press)
    peer = pick_peer(name)
    return Candidate(peer.about, {"peer": name}, lambda model: peer.make(model.config), PEER)


def _role(compressor: object) -> str:
    learned = isinstance(compressor, KVCompressor) and compressor.config["kind"] == "learned"
    return PAPER if learned else OURS


def prepare(settings: EvalSettings, chunks: dict[str, int] | None = None):
    """Refuses what cannot work, then loads the model; returns it, its tokenizer and the candidates by name.

    Args:
        chunks: how a context is fed, by option; None if caches generate, which presses do not.
    """
    check_output("--json", settings.json_file)
    caches = candidates(settings)
    if any(cache.press for cache in caches):
        _check_presses(settings, chunks)
    model, tokenizer = load(settings)
    for cache in caches:
        # an option that is refused is refused before hours of work
        if cache.make:
            cache.make(model)
    return model, tokenizer, {cache.name: cache for cache in caches}


def _check_presses(settings: EvalSettings, chunks: dict[str, int] | None) -> None:
    if chunks is None:
        raise InvalidOptionError(
            f"`peer` must be a cache that compresses what it generates, got {', '.join(settings.peers)}: a press "
            "compresses once. Measure it with `deltakv eval fidelity`, `tasks` or `all`."
        )
    for name, num_tokens in chunks.items():
        if num_tokens:
            raise InvalidOptionError(
                f"`--{name.replace('_', '-')}` must be 0 with a press, which compresses once, behind a context that it "
                f"reads in one call, got {num_tokens}. Measure presses in a run of their own."
            )


def load(settings: EvalSettings):
    """The model and its tokenizer."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = DEMO_MODEL if settings.model == "demo" else settings.model
    # transformers draws bars of its own
    with console.status(f"load {name}"), contextlib.redirect_stderr(io.StringIO()):
        return load_by_name(settings.model, settings.dtype, settings.device)


def makers(model: PreTrainedModel, caches: dict[str, Candidate]) -> dict[str, Callable[[], Cache]]:
    """Of those candidates that are measured in this process."""
    return {name: partial(cache.make, model) for name, cache in caches.items() if cache.make}


def presses(caches: dict[str, Candidate]) -> dict[str, Press]:
    """Of those that are not."""
    return {name: cache.press for name, cache in caches.items() if cache.press}


def press_model(settings: EvalSettings, model: PreTrainedModel) -> PressModel:
    """The model for the process that measures presses."""
    return PressModel.like(model, find_source(settings.model))


def print_compressor(name: str, num_bytes: float, break_even_tokens: float) -> None:
    """What a table's shares leave out: the compressor itself. Nothing is printed of a cache without one."""
    if num_bytes:
        even = f"as many as {break_even_tokens:,.0f} compressed tokens save"
        console.print(f"{name}: the compressor itself, shared by all caches, takes {size(num_bytes)}, {even}.")


def own_share(share: float) -> str:
    """Of compressed tokens alone; nothing for caches that do not tell them apart."""
    return f"{share:.1%}" if share else ""


def progress(description: str) -> Callable:
    """A bar over an iteration."""
    return partial(track, description=description, console=console)


def write_result(settings: EvalSettings, model, how: dict, rows: list[dict]) -> None:
    """Writes command, device, versions and rows, whole or not at all."""
    if settings.json_file is None:
        return
    result = (
        {"command": command_line(), "environment": environment(model.device, model.dtype)} | how | {"results": rows}
    )
    write_atomically(settings.json_file, (json.dumps(result, indent=2) + "\n").encode())
