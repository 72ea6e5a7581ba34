"""Who may import what, read from the source, and what importing the package may not do."""

import ast
import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted((ROOT / "deltakv_hf").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
LOADERS = ("import_module", "__import__")
METADATA_READERS = ("version", "distribution")


def package_of(path: Path) -> str:
    """The package that relative imports in this file start from; kernels/ is `deltakv_hf.kernels`."""
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] == "deltakv_hf" else ("deltakv_hf", *parts))


def imported_names(source: str, package: str) -> Iterator[str]:
    """Every absolute name that `source` imports, at any depth: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in LOADERS and node.args:
            # a name put together at run time is read as far as it is written out
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(first, ast.Constant):
                yield importlib.util.resolve_name(first.value, package)


def is_within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def reads_transformers_version(source: str) -> bool:
    """Whether `source` asks for the version of transformers, from the module or from its metadata."""
    tree = ast.parse(source)
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    roots = {alias: alias.name.split(".")[0] for alias in imports}
    bound = {alias.asname or root for alias, root in roots.items() if root == "transformers"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "__version__" and ast.unparse(node.value) in bound:
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "transformers":
            if "__version__" in [alias.name for alias in node.names]:
                return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in METADATA_READERS and node.args:
            if isinstance(node.args[0], ast.Constant) and node.args[0].value == "transformers":
                return True
    return False


def offenders(paths: list[Path], is_offence) -> list[str]:
    """The files with an import for which `is_offence` holds, each with that import."""
    assert paths, "no source found: the folders moved and this test checks nothing"
    found = []
    for path in paths:
        names = imported_names(path.read_text(encoding="utf-8"), package_of(path))
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if is_offence(name)]
    return found


def test_kernels_import_neither_the_product_nor_transformers():
    def is_offence(name):
        return is_within(name, "transformers") or (
            is_within(name, "deltakv_hf") and not is_within(name, "deltakv_hf.kernels")
        )

    assert offenders(KERNELS, is_offence) == []


def test_only_dispatch_imports_kernels():
    others = [path for path in PRODUCT if path != ROOT / "deltakv_hf" / "dispatch.py"]
    assert offenders(others, lambda name: is_within(name, "deltakv_hf.kernels", "kernels")) == []


def test_only_hf_compat_reads_the_version_of_transformers():
    others = [path for path in PRODUCT if path != ROOT / "deltakv_hf" / "hf_compat.py"]
    assert [path for path in others if reads_transformers_version(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import transformers as tf", ["transformers"]),
        ("from ... import config", ["deltakv_hf.config"]),
        ("def f():\n    from ..reference import pack", ["deltakv_hf.kernels.reference.pack"]),
        ("importlib.import_module('transformers.utils')", ["transformers.utils"]),
        ("import_module(f'deltakv_hf.kernels.{backend}')", ["deltakv_hf.kernels."]),
    ],
)
def test_imported_names_sees_every_form(source, expected):
    assert list(imported_names(source, "deltakv_hf.kernels.triton_ops")) == expected


@pytest.mark.parametrize(
    "source",
    [
        "import transformers as tf\ntf.__version__",
        "import transformers.utils\ntransformers.__version__",
        "from transformers import __version__",
        "from importlib import metadata\nmetadata.version('transformers')",
    ],
)
def test_reads_transformers_version_sees_every_form(source):
    assert reads_transformers_version(source)
    assert not reads_transformers_version(source.replace("transformers", "torch"))


# torch and transformers come first: what their import does is not ours to answer for
IMPORT_QUIETLY = """
import os, random, sys
import numpy, torch, transformers

def state():
    numpy_state = numpy.random.get_state()
    return {
        "torch seed": torch.initial_seed(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": (numpy_state[1].tolist(), numpy_state[2]),
        "random generator": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }

calls = []
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
# an audit hook sees calls made from C and past any copy of `socket.socket`; it lists them because a caller may swallow
# what a hook raises
sys.addaudithook(lambda event, arguments: calls.append((event, arguments)) if event in NETWORK else None)
before = state()
import deltakv_hf
after = state()
assert not calls, f"the import used the network: {calls}"
changed = [name for name in before if before[name] != after[name]]
assert not changed, f"the import changed: {changed}"
"""


def test_importing_the_package_is_quiet(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT_QUIETLY], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REFUSED = 'deltakv_hf needs transformers >=5.17,<6, got {}: pip install "transformers>=5.17,<6".'
# as a host that never had the layer classes, which must not be what the user hears of
IMPORT_WITH_AN_OLD_HOST = """
import transformers, transformers.cache_utils
transformers.__version__ = "4.57.0"
del transformers.cache_utils.CacheLayerMixin
try:
    import deltakv_hf
except ImportError as error:
    print(error)
"""


def test_the_package_refuses_an_old_host(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORT_WITH_AN_OLD_HOST]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [REFUSED.format("4.57.0")]


@pytest.mark.parametrize("version", ["5.16.1", "5.17.0.dev0", "6.0.0.dev0", "6.0.0"])
def test_a_host_that_was_never_tried_is_refused(monkeypatch, version):
    # not the module imported above: some of its own files put a new one in its place
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with pytest.raises(ImportError) as error:
        runpy.run_path(ROOT / "deltakv_hf" / "hf_compat.py")
    assert str(error.value) == REFUSED.format(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.99.0"])
def test_a_host_between_the_bounds_is_taken(monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    runpy.run_path(ROOT / "deltakv_hf" / "hf_compat.py")
