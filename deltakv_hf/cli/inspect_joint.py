"""`deltakv inspect --joint`: what blocks that share storage save in each layer, beside what was predicted of them."""

from __future__ import annotations

import contextlib
import io
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..compressor.fused_blocks import LEAST_BLOCKS
from ..errors import InvalidOptionError, UnsupportedModelError
from ..evaluation.model import DEMO_MODEL, load_by_name
from ..evaluation.texts import BUNDLED_TEXT, read_documents
from ..files import write_atomically
from ..joint import JointEncodedCache
from ..joint_config import JointEncodingConfig
from ..rate_distortion import GRID
from ..support import max_positions
from . import joint_figures as fig
from .arguments import check_output
from .console import console

ROWS, LENGTH, PASSAGES = 4, 1024, 8
# unless an error or a ratio is asked for
MAX_RELATIVE_ERROR = 0.4


@dataclass(frozen=True)
class JointSettings:
    """What the command line says; `options` are those of `JointEncodingConfig` that were given."""

    model: str
    options: dict
    text: list[Path]
    rows: int | None
    length: int | None
    png: Path | None
    device: str | None
    dtype: str | None


def run_inspect_joint(settings: JointSettings, as_json: bool) -> None:
    """Reads a batch with a cache whose similar blocks share storage; prints its plans and what has come of them."""
    config = _checked(settings)
    documents = [text for path in settings.text for text in read_documents(path, "--text") if text.strip()]
    # the loaders of transformers draw bars of their own
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = load_by_name(settings.model, settings.dtype, settings.device)
    length = _length(model, settings.length)
    texts = documents or [BUNDLED_TEXT.read_text(encoding="utf-8")]
    rows = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    if documents:
        rows = [row[:length] for row in rows if row]
    else:
        rows = passages_in_orders(rows[0], settings.rows or ROWS, length, config.block_size)
    # equal blocks alone, to tell what similar ones add
    exact_ratio = read_rows(model, rows, JointEncodingConfig(block_size=config.block_size)).memory_report().ratio
    fused = read_rows(model, rows, config)
    plans = fused.rate_distortion()
    _check_plans(fused, len(plans))
    figures = {
        "model": DEMO_MODEL if settings.model == "demo" else settings.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": len(rows),
        "tokens": max(map(len, rows)),
        "options": asdict(config),
        "errors": GRID,
        "layers": [asdict(plan) for plan in plans],
        "thresholds": fig.thresholds(plans),
        "total": totals(fused, exact_ratio),
    }
    if settings.png:
        write_atomically(settings.png, fig.chart(figures, plans))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    console.print(fig.layer_table(figures, plans))
    console.print(fig.threshold_table(figures["thresholds"]))
    console.print(fig.total_line(figures["total"]))
    if settings.png:
        console.print(f"chart: {settings.png}")


def _checked(settings: JointSettings) -> JointEncodingConfig:
    """The cache's options; refuses what can be refused before the model is loaded."""
    check_output("--png", settings.png)
    if settings.text and settings.rows is not None:
        raise InvalidOptionError(
            f"`--rows` must be left out with `--text`, whose documents are the rows, got {settings.rows}."
        )
    has_aim = settings.options.keys() & {"max_relative_error", "target_ratio"}
    aim = {} if has_aim else {"max_relative_error": MAX_RELATIVE_ERROR}
    config = JointEncodingConfig.from_options(settings.options | aim)
    if not config.fuses:
        raise InvalidOptionError(
            "`--max-relative-error` must be above 0 for similar blocks to share storage, got "
            f"{config.max_relative_error}: raise it, or give `--target-ratio`."
        )
    if config.scope == "none":
        raise InvalidOptionError(
            "`--scope` must let similar blocks share storage for anything to be predicted, got 'none': leave it out."
        )
    return config


def _length(model, asked: int | None) -> int:
    """Most tokens of a row: the model must have positions for them."""
    limit = max_positions(model)
    if asked and limit and asked > limit:
        raise InvalidOptionError(f"`--length` must fit the {limit} positions of the model, got {asked}: lower it.")
    return asked or min(LENGTH, limit or LENGTH)


def passages_in_orders(ids: list[int], num_rows: int, length: int, block_size: int) -> list[list[int]]:
    """Rows of the same passages: all begin with one (a system prompt), the others come in another order in each (as
    retrieved).

    Passages are whole blocks: a text that begins at another place in a block makes other blocks.
    """
    if length > len(ids):
        raise InvalidOptionError(
            f"`--length` must be at most the {len(ids)} tokens of the bundled text, got {length}: lower it, or give "
            "`--text`."
        )
    width = max(1, length // (PASSAGES * block_size)) * block_size
    end = length - length % width
    passages = [ids[start : start + width] for start in range(0, end, width)]
    rows = []
    for number in range(num_rows):
        others = random.Random(number).sample(passages[1:], max(0, len(passages) - 1))
        rows.append([token for passage in passages[:1] + others for token in passage] + ids[end:length])
    return rows


@torch.no_grad()
def read_rows(model, rows: list[list[int]], config: JointEncodingConfig) -> JointEncodedCache:
    """A cache that has read `rows`, shorter ones padded at the left."""
    cache, width = JointEncodedCache(model, **vars(config)), max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    # as `generate` counts them: equal beginnings stand at equal positions, whatever pads them
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = {} if mask.all() else {"attention_mask": mask, "position_ids": positions}
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **padded)
    return cache


def _check_plans(cache: JointEncodedCache, num_plans: int) -> None:
    """Refuses a batch that says nothing about similarity."""
    if not cache.own_layers:
        raise UnsupportedModelError(
            "`model` must have layers with full attention for blocks to share storage, got none."
        )
    if num_plans == 0:
        raise InvalidOptionError(
            f"`--length` must give the rows at least {LEAST_BLOCKS} different blocks for a prediction, got "
            f"{cache.num_blocks} of {cache.options.block_size} tokens: raise it or `--rows`, lower `--block-size`, or "
            "give longer or more texts with `--text`."
        )


def totals(cache: JointEncodedCache, exact_ratio: float) -> dict:
    """Bytes of the whole cache beside those of the full one; `exact_ratio` is that of equal blocks alone."""
    report, plans = cache.memory_report(), cache.rate_distortion()
    return {
        "cached_layers": len(cache.layers),
        "planned_layers": len(plans),
        "sharing_layers": sum(plan.achieved_kept < 1 for plan in plans),
        "left_alone_layers": sum(plan.is_left_alone for plan in plans),
        "blocks": cache.num_blocks,
        "dense_bytes": report.dense_bytes,
        "stored_bytes": report.stored_bytes,
        "ratio": report.ratio,
        "exact_ratio": exact_ratio,
    }
