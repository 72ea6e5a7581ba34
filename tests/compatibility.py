"""The compatibility matrix: its cells, what is declared of them, and the page that shows them.

`test_compatibility.py` runs every cell of `CELLS` for every kind of cache. The page is written from the same list, so
it cannot show a cell that no test runs. `python tests/compatibility.py` writes docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from families import FAMILIES, Family, longrope
from helpers import LOSSLESS, TIGHT, prompt
from models import MOE, SMALL, build
from modes import MODES, Mode

from deltakv_hf import CacheStateError, UnsupportedModelError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class CellError:
    """A cell that raises.

    Attributes:
        error, match: what is raised.
        why: said on the page.
        by_host: whether the host itself cannot serve it and raises the same with `DynamicCache`; if not, `DynamicCache`
            gives a wrong answer there without a word.
    """

    error: type[Exception]
    match: str
    why: str
    by_host: bool = True


NO_SDPA = CellError(ValueError, "does not support an attention implementation", "The host has no sdpa for this model.")
STATEFUL = CellError(ValueError, "not supported with stateful models", "The host refuses to draft for this model.")
LINEAR = CellError(
    AttributeError, "no attribute 'batch_repeat_interleave'", "The host's linear layers cannot be widened."
)
RECURRENT = CellError(
    CacheStateError, "can't take a recurrent layer back", "A recurrent layer keeps its last state alone.", by_host=False
)
CELL_ERRORS: dict[tuple[str, str], CellError] = {
    ("gemma2", "sdpa"): NO_SDPA,
    ("gpt_oss", "sdpa"): NO_SDPA,
    ("qwen3_next", "prompt lookup"): STATEFUL,
    ("qwen3_next", "assisted"): STATEFUL,
    ("qwen3_next", "widened for beams"): LINEAR,
    ("qwen3_next", "widened for questions"): LINEAR,
    ("qwen3_next", "crop"): RECURRENT,
    ("qwen3_next", "deep crop"): RECURRENT,
    ("lfm2", "widened for beams"): LINEAR,
    ("lfm2", "widened for questions"): LINEAR,
}


@dataclass(frozen=True)
class Cell:
    """A family in a mode; `error` is None where it works."""

    family: Family
    mode: Mode
    error: CellError | None

    def __str__(self) -> str:
        return f"{self.family.name}-{self.mode.name}".replace(" ", "-")


CELLS = [Cell(family, mode, CELL_ERRORS.get((family.name, mode.name))) for family in FAMILIES for mode in MODES]


# -- what is refused ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """What no cache of this package serves, with the error that says so.

    Attributes:
        name: of the model or the call.
        run: function `make_cache -> None` that must raise.
        error, match: what it raises.
        why: said on the page.
    """

    name: str
    run: Callable
    error: type[Exception]
    match: str
    why: str


def makes(model_class, config: Callable) -> Callable:
    """Makes a cache for a new model."""

    def run(make_cache) -> None:
        with torch.random.fork_rng():
            model = model_class(config())
        make_cache(model)

    return run


def t5() -> tf.PretrainedConfig:
    return tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)


def bert() -> tf.PretrainedConfig:
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return tf.BertConfig(**sizes)


def deepseek() -> tf.PretrainedConfig:
    ranks = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
    return tf.DeepseekV3Config(**SMALL | MOE | ranks, n_routed_experts=4, n_group=1, topk_group=1)


def dynamic_ntk() -> tf.PretrainedConfig:
    return tf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


def gpt_neo() -> tf.PretrainedConfig:
    sizes = dict(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=512)
    return tf.GPTNeoConfig(**sizes, attention_types=[[["global"], 2]])


def longrope_model():
    return build(longrope(64))


def cross_in_one_call(make_cache) -> None:
    model = longrope_model()
    model.generate(prompt(1, 60), past_key_values=make_cache(model), max_new_tokens=12, do_sample=False)


def cross_between_turns(make_cache) -> None:
    """The host drops the cache before it is used: nothing but the guard can see it."""
    model = longrope_model()
    cache, options = make_cache(model), {"do_sample": False, "max_new_tokens": 5}
    first = model.generate(prompt(1, 48), past_key_values=cache, **options)
    model.generate(torch.cat([first, prompt(1, 20)], dim=1), past_key_values=cache, **options)


def four_dimensions(make_cache) -> None:
    model = FAMILIES[0].model()
    model(prompt(), attention_mask=torch.zeros(1, 1, 48, 48), past_key_values=make_cache(model))


def mask_of_new_tokens(make_cache) -> None:
    model = FAMILIES[0].model()
    cache = make_cache(model)
    model(prompt(), past_key_values=cache)
    model(prompt(1, 1), attention_mask=torch.ones(1, 1, dtype=torch.long), past_key_values=cache)


REFUSALS = [
    Refusal("encoder-decoders (T5)", makes(tf.T5ForConditionalGeneration, t5), UnsupportedModelError,
            "encoder-decoder", "They have a second cache for the encoder, which never grows."),
    Refusal("encoders (BERT)", makes(tf.BertModel, bert), UnsupportedModelError, "`model`",
            "What reads in both directions has no cache."),
    Refusal("multi-head latent attention (DeepSeek)", makes(tf.DeepseekV3ForCausalLM, deepseek),
            UnsupportedModelError, "kv_lora_rank=8", "Its cache is compressed already."),
    Refusal("dynamic NTK", makes(tf.LlamaForCausalLM, dynamic_ntk), UnsupportedModelError, "dynamic",
            "Its frequencies change while it reads, so old keys and new ones do not fit."),
    Refusal("state-space models (Mamba)", makes(tf.MambaForCausalLM, lambda: tf.MambaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2)), UnsupportedModelError, "`model`",
            "They hold no keys and values."),
    Refusal("GPT-Neo", makes(tf.GPTNeoForCausalLM, gpt_neo), UnsupportedModelError, "stored none",
            "Its attention modules do not say which layer they are (`layer_idx`)."),
    Refusal("crossing Phi-3's longrope switch in one `generate`", cross_in_one_call, CacheStateError,
            "original_max_position_embeddings", "The host drops the cache there, as its frequencies change."),
    Refusal("crossing it between two turns", cross_between_turns, CacheStateError,
            "original_max_position_embeddings", "As above."),
    Refusal("4-D `attention_mask`", four_dimensions, CacheStateError, "4-D",
            "Padding cannot be read from it."),
    Refusal("an `attention_mask` of the new tokens alone", mask_of_new_tokens, CacheStateError, "whole sequence",
            "As in the host, a mask has a column for every token held."),
]  # fmt: skip


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = """# Compatibility

Written by `make compatibility` from the declarations that `tests/test_compatibility.py` runs; do not edit it.

Every cell is tested twice, on a tiny random model of the family:

* **lossless** (`recent_window={window}`): tokens and logits are those of `DynamicCache`, bit for bit.
* **compressed** ({options}):
  the cache holds compressed tokens and less than the dense bytes, the prompt's own logits are those of `DynamicCache`,
  and the mode says what the same cache says in plain generation: a row of a batch what it says alone, beams the scores
  of their tokens, drafts and crops leave no trace, and so on (`tests/modes*.py`).

`✓`: both hold. `host (n)`: the host itself raises there, with `DynamicCache` as with ours; note n says why.
`error (n)`: ours raises, where `DynamicCache` says something wrong without a word.
"""


def page() -> str:
    """The text of docs/compatibility.md."""
    options = ", ".join(f"`{name}={value}`" for name, value in TIGHT.items())
    notes = list(dict.fromkeys(cell.error for cell in CELLS if cell.error is not None))
    lines = [HEAD.format(window=LOSSLESS["recent_window"], options=options)]
    lines += ["| family | attention |", "| --- | --- |"]
    lines += [f"| {family.name} | {family.about} |" for family in FAMILIES]
    for group in dict.fromkeys(mode.group for mode in MODES):
        lines += ["", f"## {group}", "", *_table([mode for mode in MODES if mode.group == group], notes)]
    lines += ["", "## Notes", ""]
    lines += [
        f"{place}. {note.why} `{note.error.__name__}: ... {note.match} ...`" for place, note in enumerate(notes, 1)
    ]
    lines += ["", "## Refused", "", "| what | error | why |", "| --- | --- | --- |"]
    lines += [f"| {refusal.name} | `{refusal.error.__name__}` | {refusal.why} |" for refusal in REFUSALS]
    return "\n".join(lines) + "\n"


def _table(modes: list[Mode], notes: list[CellError]) -> list[str]:
    lines = ["| family | " + " | ".join(mode.name for mode in modes) + " |", "| --- |" + " --- |" * len(modes)]
    for family in FAMILIES:
        cells = [cell for cell in CELLS if cell.family is family and cell.mode in modes]
        lines.append(f"| {family.name} | " + " | ".join(_mark(cell, notes) for cell in cells) + " |")
    return lines


def _mark(cell: Cell, notes: list[CellError]) -> str:
    if cell.error is None:
        return "✓"
    return f"{'host' if cell.error.by_host else 'error'} ({notes.index(cell.error) + 1})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
