"""The kernels, whose sources lie in the checkout's `kernels/`.

A wheel holds them inside this package. In a checkout or an editable install they stay outside it, in a folder without
`__init__.py`: a top-level package named `kernels` would shadow the distribution that transformers imports under that
name. Only `deltakv_hf.dispatch` imports from here.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# both are there in a checkout only, so this does nothing in a wheel
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "triton_ops").is_dir():
    __path__.append(str(_root / "kernels"))
