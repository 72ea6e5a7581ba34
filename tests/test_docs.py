"""What the pages show runs, what they link to exists, what they quote is what the package says."""

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cli_reference
import pytest
import torch
import typer
import yaml
from compressors import random_compressor
from models import byte_llama, saved_byte_llama

from deltakv_hf import JointEncodedCache, KVCompressor
from deltakv_hf.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def code(page: Path, *languages: str) -> list[str]:
    """The blocks of a page that are fenced as one of `languages`."""
    return [block for language, block in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder where the names of the pages are tiny models, compressors and texts."""
    monkeypatch.chdir(tmp_path)
    saved_byte_llama(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    for name in ("smollm2-135m-instruct-10x", "owner/name"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_compressor(byte_llama()).save_pretrained(tmp_path / name)
    (tmp_path / "report.txt").write_text("It rains, it pours. " * 40, encoding="utf-8")
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["index.md", "quickstart.md", "hub.md"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_page_runs_from_its_first_block_to_its_last(workplace, monkeypatch, capsys, name):
    pushed = []
    monkeypatch.setattr(KVCompressor, "push_to_hub", lambda self, *args, **options: pushed.append(args))
    names = {"model": byte_llama()}
    for block in code(DOCS / name, "python"):
        exec(compile(block, name, "exec"), names)
    cache = names["cache"]
    shown = {"index.md": "stored", "quickstart.md": "in blocks", "hub.md": ""}[name]
    assert shown in capsys.readouterr().out
    assert bool(pushed) == (name == "hub.md")
    # a page that compressed nothing would show nothing
    assert name == "hub.md" or cache.stats().encoded_tokens > 0


def test_joint_page(workplace):
    """Its three caches: exact, with an error, coded."""
    names = {"model": byte_llama(), "inputs": {"input_ids": torch.arange(200)[None] % 250}}
    for block in code(DOCS / "joint.md", "python"):
        exec(compile(block, "joint.md", "exec"), names)
    assert isinstance(names["cache"], JointEncodedCache) and names["out"].shape[0] == 8


def commands(page: Path) -> list[str]:
    """Lines of a page's blocks that call `deltakv`, without their comments; continued lines are one."""
    blocks = "\n".join(code(page, "", "bash", "console")).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if re.match(r"\s*deltakv [a-z]", line) and "[OPTIONS]" not in line]


COMMANDS = {
    f"{page.relative_to(ROOT)}: {line.split('#')[0].strip()}": line for page in PAGES for line in commands(page)
}


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_one(line):
    """Its words are those that the command line knows; nothing is done."""
    command = typer.main.get_command(app)
    asleep = [command]
    while asleep:
        one = asleep.pop()
        asleep += getattr(one, "commands", {}).values()
        one.callback = lambda **arguments: None
    arguments = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    command.main([word.removesuffix("...") for word in arguments], standalone_mode=False)


def test_commands_were_found():
    assert len(COMMANDS) > 15


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    targets = {link for link in links if not link.startswith(("http", "mailto:"))}
    for target in targets:
        path, _, anchor = target.partition("#")
        place = ROOT / (path or name)
        assert place.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(place), f"{name} links to {target}"


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_contents():
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"'([\w/.-]+\.md)'", str(contents))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`")
def test_the_site_is_built_without_a_warning(tmp_path):
    """As `make docs` does; mkdocs checks links and anchors between pages. Takes five seconds."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(
        build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert result.returncode == 0, result.stderr
    made = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html"))
    # nothing is fetched from elsewhere when a page is read
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"', made)
    assert "DeltaKVCache" in (tmp_path / "site" / "reference" / "caches.html").read_text(encoding="utf-8")


# -- what is written from something else -------------------------------------------------------------------------------


def test_the_command_line_reference_is_current():
    assert cli_reference.PAGE.read_text(encoding="utf-8") == cli_reference.page(), "run `make reference`"


def messages() -> list[str]:
    """Texts in the package, with `...` for what is put in."""
    found = []
    for path in (ROOT / "deltakv_hf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """Errors that stand as headings of the page about them."""
    headings = re.findall(r"^### (`+) ?(.+?) ?\1$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [heading for _, heading in headings]


def test_errors_are_quoted_as_they_are():
    known = messages()
    assert len(quoted()) > 15
    for heading in quoted():
        # a message may put words into others, so that a piece of a heading is a piece of it
        pattern = re.compile(".*".join(re.escape(piece) for piece in heading.split("...")), re.DOTALL)
        assert any(pattern.search(message) for message in known), f"no message says {heading!r}"
