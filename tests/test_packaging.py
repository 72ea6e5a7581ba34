"""The kernels import as `deltakv_hf.kernels` however the package reaches the path, and never as `kernels`.

transformers imports a distribution named `kernels` on every import of a model. Anything of ours under that name breaks
every model, so each test here is about the name as much as about our own imports.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parents[1]
IMPORT_KERNELS = """
import sys
import deltakv_hf.kernels.reference, deltakv_hf.kernels.triton_ops
print(deltakv_hf.__file__, deltakv_hf.kernels.reference.__file__, deltakv_hf.kernels.triton_ops.__file__, sep="\\n")
"""
IMPORT_MODELS = """
from transformers.models.llama import modeling_llama
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""
# every name is a decorator factory that changes nothing, which is how transformers uses them while it is imported
FAKE_KERNELS = """
def _factory(*args, **kwargs):
    return lambda decorated: decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _factory
"""


def run_python(code: str, cwd: Path, *path: Path) -> list[str]:
    """Runs `code` in a new interpreter with `path` as its PYTHONPATH; returns the lines it printed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def without_editable_install(code: str) -> str:
    """`code`, run as if no editable install had registered its import hook."""
    hooks = (
        "sys.meta_path[:] = [hook for hook in sys.meta_path if '__editable__' not in getattr(hook, '__module__', '')]"
    )
    return f"import sys\n{hooks}\n{code}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built without the network, from a copy so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("deltakv_hf", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", output, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(output.glob("*.whl"))


def test_wheel_holds_kernels_only_below_deltakv_hf(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "deltakv_hf/kernels/reference/__init__.py" in names
    assert "deltakv_hf/kernels/triton_ops/__init__.py" in names
    # every source file of ours is in, and nothing is at the top but the package and its metadata
    for source in (*ROOT.glob("kernels/**/*.py"), *ROOT.glob("deltakv_hf/**/*.py")):
        name = source.relative_to(ROOT).as_posix()
        assert (f"deltakv_hf/{name}" if name.startswith("kernels/") else name) in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"deltakv_hf"}


def test_wheel_declares_one_top_level_name(wheel):
    archive = zipfile.ZipFile(wheel)
    top_level = next(name for name in archive.namelist() if name.endswith(".dist-info/top_level.txt"))
    assert archive.read(top_level).decode().split() == ["deltakv_hf"]


def test_wheel_imports_kernels(wheel, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    files = run_python(without_editable_install(IMPORT_KERNELS), tmp_path, installed)
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_bare_checkout_imports_kernels(tmp_path):
    files = run_python(without_editable_install(IMPORT_KERNELS), tmp_path, ROOT)
    assert [Path(file).relative_to(ROOT).parts[0] for file in files] == ["deltakv_hf", "kernels", "kernels"]


def installed_editable() -> bool:
    for distribution in importlib.metadata.distributions(name="deltakv-hf"):
        # an egg-info folder in the checkout has no such file: it describes a build, not an install
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            return True
    return False


@pytest.mark.skipif(not installed_editable(), reason="deltakv-hf is not installed editable here; make does that")
def test_editable_install_imports_kernels(tmp_path):
    files = run_python(IMPORT_KERNELS, tmp_path)
    assert [Path(file).relative_to(ROOT).parts[0] for file in files] == ["deltakv_hf", "kernels", "kernels"]


def test_no_distribution_of_ours_claims_the_name_kernels():
    assert "deltakv-hf" not in importlib.metadata.packages_distributions().get("kernels", [])


@pytest.mark.skipif("kernels" in importlib.metadata.packages_distributions(), reason="the real `kernels` is installed")
def test_models_import_from_the_checkout_without_the_kernels_distribution():
    assert run_python(IMPORT_MODELS, ROOT) == ["False"]


def test_models_import_from_the_checkout_with_the_kernels_distribution(tmp_path):
    version = import_utils.KERNELS_MIN_VERSION
    metadata = tmp_path / f"kernels-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    fake = tmp_path / "kernels" / "__init__.py"
    fake.parent.mkdir()
    fake.write_text(FAKE_KERNELS)

    # cwd is the checkout, so our folder comes first on the path and must still give way
    available, file = run_python(IMPORT_MODELS + "import kernels; print(kernels.__file__)", ROOT, tmp_path)
    assert available == "True"
    assert Path(file) == fake


def test_the_oldest_host_is_tested():
    """What `make test-oldest` installs is the lower bound that setup.py and the import hold users to."""
    lower = re.search(r'"transformers>=([\d.]+),', (ROOT / "setup.py").read_text())[1]
    pinned = re.search(r"^transformers==([\d.]+)$", (ROOT / "requirements-oldest.txt").read_text(), re.MULTILINE)[1]
    assert Version(pinned) == Version(lower)
    assert f'Version("{lower}")' in (ROOT / "deltakv_hf" / "hf_compat.py").read_text()
