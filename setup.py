import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# read, not imported: an import would need torch and transformers in the build environment
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "deltakv_hf" / "__init__.py").read_text(), re.MULTILINE)[1]

# everything `deltakv demo` needs: a GGUF reader for the model that comes from PyPI, the command line, the chart
DEMO = ["gguf>=0.10", "matplotlib>=3.8", "rich>=13.8", "typer>=0.15"]
# what published benchmarks are scored with: Chinese words and their two kinds of ROUGE; and processes that measure at
# once store their results one after the other
EVAL = ["filelock>=3.12", "jieba>=0.42", "rouge>=1.0", "rouge-score>=0.1.2"]
# setuptools and wheel are here because the packaging tests build a wheel without the network
DEV = [
    *["build>=1.2", "hypothesis>=6.100", "peft>=0.17", "pytest>=8.2", "pytest-xdist>=3.6", "ruff>=0.9"],
    # what runs the notebooks; without ipywidgets progress bars warn in their outputs
    *["ipykernel>=6.29", "ipywidgets>=8.1", "nbclient>=0.10", "nbformat>=5.10"],
    *["setuptools>=77", "wheel"],
]

# the pages as a site
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]

setup(
    name="deltakv-hf",
    version=VERSION,
    description="A small, fast and faithful compressed KV cache for Hugging Face transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The deltakv-hf authors",
    license="Apache-2.0",
    keywords=["transformers", "kv-cache", "compression", "quantization", "long-context", "llm"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.1",
        "huggingface_hub>=1.0",
        "safetensors>=0.4.3",
        "torch>=2.8",
        "transformers>=5.17,<6",
        "triton>=3.4; platform_system == 'Linux'",
    ],
    extras_require={"demo": DEMO, "eval": DEMO + EVAL, "docs": DOCS, "dev": DEMO + EVAL + DEV + DOCS},
    # kernels/ has no __init__.py and is no package of its own: a top-level `kernels` would shadow the distribution of
    # that name which transformers imports. In a wheel its folders become deltakv_hf.kernels.*.
    packages=[
        *find_packages(include=["deltakv_hf", "deltakv_hf.*"]),
        "deltakv_hf.kernels.reference",
        "deltakv_hf.kernels.triton_ops",
    ],
    package_dir={
        "deltakv_hf.kernels.reference": "kernels/reference",
        "deltakv_hf.kernels.triton_ops": "kernels/triton_ops",
    },
    package_data={"deltakv_hf": ["data/**/*", "checkpoints/**/*"]},
    entry_points={"console_scripts": ["deltakv = deltakv_hf.cli.main:app"]},
)
