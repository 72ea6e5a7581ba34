"""Runs the notebooks of examples/ from top to bottom: python tests/notebooks.py [NAME...] writes what they print.

The kernel is this Python with this checkout; nothing is downloaded.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from deltakv_hf.files import replacing

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SECONDS = 900


class ThisPython(AsyncKernelManager):
    """Without folders to look in, the kernel "python3" is the Python that runs here."""

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def read(name: str) -> nbformat.NotebookNode:
    """A notebook as it is committed."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(name: str) -> nbformat.NotebookNode:
    """The notebook with new outputs; a cell that fails raises."""
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        how = {"timeout": SECONDS, "startup_timeout": SECONDS, "record_timing": False, "coalesce_streams": True}
        place = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, kernel_manager_class=ThisPython, resources=place, **how)
        client.execute(env=env)
    return notebook


def main(names: list[str]) -> None:
    """Executes notebooks in their place."""
    for name in names or NAMES:
        print(name, flush=True)
        kept, made = read(name), execute(name)
        # what a kernel says of itself differs from one Python to the next
        made.metadata = kept.metadata
        with replacing(FOLDER / f"{name}.ipynb") as path:
            nbformat.write(made, path)


if __name__ == "__main__":
    main(sys.argv[1:])
