"""Writes docs/reference/cli.md from the commands: `make reference`."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from deltakv_hf.cli.main import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
INTRODUCTION = "Written by `make reference` from the commands; do not edit it."


def page() -> str:
    """The page as it should be."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="deltakv")
    title, text = get_docs_for_click(obj=command, ctx=context, name="deltakv").split("\n\n", 1)
    lines = [line.rstrip() for line in text.replace("$ deltakv", "deltakv").splitlines()]
    return "\n".join([title, "", INTRODUCTION, "", *lines]).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
