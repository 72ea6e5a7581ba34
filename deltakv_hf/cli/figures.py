"""The demo's figures: worked out from what was measured, shown as tables, or written as JSON."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import asdict

import torch
from rich.table import Table

from ..config import FREE
from ..evaluation.fidelity import compare
from .answers import Answer, same_inputs
from .chart import Point
from .console import size
from .task import Ask, Task

PACKAGES = ("deltakv-hf", "torch", "transformers")


def answer_fidelity(pairs: list[tuple[Answer, Answer]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, vocabulary]` of the full cache and of the other at all answer positions that had the same input."""
    counts = [same_inputs(*pair) for pair in pairs]
    full, other = (
        torch.stack([logits for pair, n in zip(pairs, counts, strict=True) for logits in pair[which].logits[:n]])
        for which in (0, 1)
    )
    return full, other


def fidelity_figures(answers: tuple, continuation: tuple | None, targets: torch.Tensor | None) -> dict:
    """Agreement of the caches.

    Args:
        answers: logits `[n, vocabulary]` of the full cache and of the other, at answer positions.
        continuation: the same over the text behind the prompt, or None.
        targets: true next tokens `[n]` of that text.
    """
    full, other = answers
    kl, top1, _, _ = compare(other, full, full.argmax(-1))
    figures = {"answer_positions": len(full), "kl_answers": kl, "top1_answers": top1, "positions": len(full)}
    if continuation is None:
        return figures | {"kl": kl, "top1": top1}
    full, other = continuation
    text_kl, text_top1, nll, full_nll = compare(other, full, targets)
    figures |= {"text_positions": len(targets), "kl_text": text_kl, "top1_text": text_top1}
    figures |= {"nll_text": nll, "full_nll_text": full_nll}
    count, total = figures["answer_positions"], figures["answer_positions"] + len(targets)
    kl = (kl * count + text_kl * len(targets)) / total
    top1 = (top1 * count + text_top1 * len(targets)) / total
    return figures | {"positions": total, "kl": kl, "top1": top1}


def speed_figures(prefill_seconds: float, answers: list[Answer]) -> dict:
    """Seconds of one cache."""
    steps = [seconds for answer in answers for seconds in answer.step_seconds]
    firsts = [answer.first_seconds for answer in answers]
    return {
        "prefill": prefill_seconds,
        "question": sum(firsts) / len(firsts),
        "answer_token": sum(steps) / len(steps) if steps else None,
    }


def memory_figures(points: list[Point], dense: int, report) -> dict:
    """Bytes of both caches after the prompt, and as it was read."""
    growth = [
        {"tokens": point.tokens, "dense_bytes": point.dense_bytes, "stored_bytes": point.report.stored_bytes}
        for point in points
    ]
    return {
        "dense_bytes": dense,
        "stored_bytes": report.stored_bytes,
        "ratio": report.stored_bytes / dense,
        "parts": report.parts,
        "compressed_tokens": report.compressed_tokens,
        "compressor_bytes": report.compressor_bytes,
        "break_even_tokens": report.break_even_tokens,
        "growth": growth,
    }


def setting_figures(model, name: str, task: Task, options, compressor) -> dict:
    """What ran, where and with which versions."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "machine": {
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compressor": compressor and compressor.name,
        # a compressor fixes all others
        "options": {name: value for name, value in asdict(options).items() if compressor is None or name in FREE},
        "prompt": {
            "tokens": len(task.ids),
            "sha256": hashlib.sha256(torch.tensor(task.ids).numpy().tobytes()).hexdigest(),
        },
    }


def answer_table(task: Task, texts: list[tuple[str, str]]) -> Table:
    """Questions and both answers, as far as they are known: `texts[i]` are those to question `i`."""
    known = task.asks[0].expected is not None
    table = Table(title="Answers", title_justify="left")
    if known:
        table.add_column("token", justify="right")
    table.add_column("question", ratio=None if known else 1)
    if known:
        table.add_column("true", justify="right")
    for name in ("full cache", "DeltaKVCache"):
        table.add_column(name, ratio=None if known else 2)
    for ask, pair in zip(task.asks, texts, strict=False):
        cells = [_mark(ask, text) for text in pair]
        table.add_row(*([f"{ask.place[0]:,}", ask.title, ask.expected] if known else [ask.title]), *cells)
    return table


def _mark(ask: Ask, text: str):
    from rich.text import Text

    if ask.expected is None:
        return Text(text)
    return Text(text, style="green" if text == ask.expected else "" if ask.expected.startswith(text) else "red")


def memory_table(figures: dict) -> Table:
    """Bytes by part."""
    memory, tokens = figures["memory"], figures["prompt"]["tokens"]
    table = Table(title=f"Memory after {tokens:,} tokens, {figures['dtype']}", title_justify="left")
    table.add_column("")
    table.add_column("held", justify="right")
    table.add_column("of full", justify="right")
    for part, held in memory["parts"].items():
        if held:
            table.add_row(part, size(held), f"{held / memory['dense_bytes']:.1%}")
    table.add_section()
    stored = memory["stored_bytes"]
    table.add_row("DeltaKVCache", size(stored), f"{memory['ratio']:.1%}", style="bold")
    table.add_row("full cache", size(memory["dense_bytes"]), "100.0%", style="bold")
    if figures["dtype"] == "float32":
        half = memory["dense_bytes"] / 2
        table.add_row("full cache, were it 16-bit", size(half), "50.0%")
        table.caption = f"DeltaKVCache is {stored / half:.1%} of a 16-bit full cache"
        table.caption_justify = "left"
    if memory["compressor_bytes"]:
        table.add_section()
        table.add_row("compressor, shared by all caches", size(memory["compressor_bytes"]))
        table.add_row("  as much as is saved by", f"{memory['break_even_tokens']:,} tokens")
    return table


def summary_table(figures: dict) -> Table:
    """Quality and speed of both caches."""
    table = Table(title="Full cache and DeltaKVCache", title_justify="left")
    for name, justify in (("", "left"), ("full cache", "right"), ("DeltaKVCache", "right")):
        table.add_column(name, justify=justify)
    if "right" in figures:
        asked = figures["asked"]
        table.add_row("answers right", *(f"{figures['right'][name]} of {asked}" for name in ("full", "deltakv")))
    fidelity, seconds = figures["fidelity"], figures["seconds"]
    table.add_row(f"same top token, {fidelity['positions']} positions", "", f"{fidelity['top1']:.2%}")
    table.add_row("KL to the full cache, nats a token", "", f"{fidelity['kl']:.5f}")
    table.add_row("  at the answers", "", f"{fidelity['kl_answers']:.5f}")
    if "kl_text" in fidelity:
        table.add_row(
            f"  in the next {fidelity['text_positions']} tokens of the text", "", f"{fidelity['kl_text']:.5f}"
        )
        table.add_row("  loss (NLL) there", f"{fidelity['full_nll_text']:.4f}", f"{fidelity['nll_text']:.4f}")
    for key, label in (("prefill", "prompt, s"), ("question", "question, s"), ("answer_token", "answer token, s")):
        pair = [seconds[name][key] for name in ("full", "deltakv")]
        table.add_row(label, *("" if value is None else f"{value:.2f}" for value in pair))
    return table
