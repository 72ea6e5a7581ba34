"""The model card of a compressor: README.md with the metadata that the Hub reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

TEMPLATE = Path(__file__).parents[1] / "data" / "model_card.md"
TAGS = ["kv-cache", "compression", "deltakv"]
# columns that have a better name than their key
COLUMNS = {"kl": "KL", "top1": "top-1", "delta_nll": "ΔNLL", "bytes_per_token": "bytes a token"}
NOTHING = "–"


def model_card(config: dict, repo_id: str | None = None) -> str:
    """The text of README.md for a compressor. Entries of `config` that are missing are said to be.

    Args:
        config: of the compressor. Read are `model` (`id`, `revision`), `kind`, `share` (bytes compressed over bytes in
            the full cache), `license`, `limits` (list of sentences), `measured` (list of rows, each a dict from column
            to value) and `calibration` with `text` (list of dicts: `source`, `license`, anything more), `command`,
            `device`, `seconds` (dict from stage to number) and `versions` (dict), and `training` with `steps`,
            `held_out_kl` (`before`, `after`) and the same entries.
        repo_id: "owner/name" of the compressor on the Hub, for the title and the example.
    """
    model, calibration = _dict(config.get("model")), _dict(config.get("calibration"))
    base = _plain(model.get("id"))
    share, licence = config.get("share"), config.get("license")
    on_hub = _is_repo_id(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="deltakv-hf",
        license=_plain(licence) or None if isinstance(licence, str) else None,
        tags=TAGS,
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=_text(repo_id or f"A compressor for {base or 'a model'}"),
        base_model=f"[{_text(base)}](https://huggingface.co/{base})" if on_hub else _text(base or "an unknown model"),
        revision=re.sub(r"[^\w./-]", "", _plain(model.get("revision"))),
        kind=_text(config.get("kind") or NOTHING),
        share=f"{share:.1%}" if isinstance(share, (int, float)) else "not noted",
        model_literal=json.dumps(base or "the model", ensure_ascii=False),
        id_literal=json.dumps(_plain(repo_id) or "path/of/this/folder", ensure_ascii=False),
        measured=_table(config.get("measured")),
        texts=[_source(one) for one in _list(calibration.get("text"))],
        made=_made(calibration) + _trained(_dict(config.get("training"))),
        limits=[_text(one) for one in _list(config.get("limits"))],
    )
    return f"{str(card).rstrip()}\n"


def _table(measured: object) -> dict:
    """Names of the columns, in order of their first appearance, and the cells of each row."""
    rows = [row for row in _list(measured) if isinstance(row, dict) and row]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "names": [_text(COLUMNS.get(key, key)) for key in keys],
        "rows": [[_number(row.get(key)) for key in keys] for row in rows],
    }


def _source(text: object) -> str:
    """One text that was calibrated on, with its licence."""
    entries = dict(text) if isinstance(text, dict) else {"source": text}
    source, licence = (_text(entries.pop(name, None) or "unknown") for name in ("source", "license"))
    more = "".join(f"; {_text(name)}: {_number(value)}" for name, value in entries.items())
    return f"{source} (licence: {licence}){more}"


def _made(calibration: dict) -> list[str]:
    """Command, seconds and versions, as far as they are known."""
    made = []
    if command := _plain(calibration.get("command")):
        # a code span may hold everything but a backtick
        made.append("`" + command.replace("`", "'") + "`")
    if seconds := _dict(calibration.get("seconds")):
        stages = ", ".join(f"{_text(stage)} {_number(value)}" for stage, value in seconds.items())
        made.append(f"seconds on {_text(calibration.get('device') or 'an unknown device')}: {stages}")
    if versions := _dict(calibration.get("versions")):
        made.append(", ".join(f"{_text(name)} {_text(version)}" for name, version in sorted(versions.items())))
    return made


def _trained(training: dict) -> list[str]:
    """What training did, if there was any."""
    kl = _dict(training.get("held_out_kl"))
    if not kl:
        return []
    change = f"KL on held-out text {_number(kl.get('before'))} before, {_number(kl.get('after'))} after"
    texts = ", ".join(_source(one) for one in _list(training.get("text")))
    made = [f"trained through the model in {_number(training.get('steps'))} steps: {change}"]
    return made + ([f"trained on {texts}"] if texts else []) + _made(training)


def _number(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _text(value)


def _text(value: object) -> str:
    """`value` on one line, with nothing in it that Markdown or HTML would read as theirs."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$!])", r"\\\1", _plain(value))


def _plain(value: object) -> str:
    """`value` on one line and printable; empty for None."""
    words = ("" if value is None else str(value)).split()
    return "".join(letter for letter in " ".join(words) if letter.isprintable())


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list:
    return value if isinstance(value, list) else []
