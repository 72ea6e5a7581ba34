"""What all tests share: no network, few threads, two hypothesis profiles, the versions that were asked for."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# read when a kernel is defined
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kinds import FAMILIES, KINDS
from models import tiny_model

settings.register_profile(
    "default", max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=300, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config):
    """A job that is about one version of the host may not quietly test another."""
    expected = os.environ.get("DELTAKV_EXPECT_TRANSFORMERS")
    if expected not in (None, transformers.__version__):
        raise pytest.UsageError(
            f"transformers {expected!r} was expected (DELTAKV_EXPECT_TRANSFORMERS), but {transformers.__version__} was "
            f"imported from {transformers.__file__}"
        )


def pytest_report_header(config):
    """The versions that matter."""
    return ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, huggingface_hub))


@pytest.fixture(autouse=True)
def no_gradients():
    """As in `generate`; and tiny tensors are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request):
    """Each kind of cache."""
    return request.param


@pytest.fixture(params=FAMILIES)
def model(request):
    """A model with full attention alone, and one with windows too."""
    return tiny_model(request.param)
