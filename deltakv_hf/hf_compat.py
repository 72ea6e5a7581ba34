"""Every difference between versions of the host and between devices that the rest of the package must not know."""

from __future__ import annotations

from functools import wraps

import torch
import transformers
from packaging.version import Version
from torch import nn

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "HostCopy",
    "check_versions",
    "execution_device",
    "host_version",
    "sdpa_attention_forward",
    "sdpa_mask",
    "upload",
    "without_autocast",
]


def check_versions() -> None:
    """Refuses a host whose cache contract was never tried."""
    if not Version("5.17") <= Version(transformers.__version__) < Version("6.dev0"):
        raise ImportError(
            f"deltakv_hf needs transformers >=5.17,<6, got {transformers.__version__}: "
            'pip install "transformers>=5.17,<6".'
        )


# first: another host may lack these names, and would be refused with less to go by
check_versions()

from transformers.cache_utils import (  # noqa: E402
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402


def host_version() -> str:
    """The version of transformers."""
    return transformers.__version__


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module runs: with its parameters, or where accelerate brings them; None if it has none."""
    devices = {parameter.device for parameter in module.parameters()}
    running = next((device for device in devices if device.type != "meta"), None)
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            target = getattr(single, "execution_device", None)
            if running is None and target is not None:
                # accelerate numbers GPUs
                running = torch.device("cuda", target) if isinstance(target, int) else torch.device(target)
    return running


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a small CPU tensor to `device` without making the host wait for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def without_autocast(method):
    """Runs a method of an object with a `device` outside of autocast, which would round sums and refuse integers."""

    @wraps(method)
    def run(self, *args):
        if not torch.is_autocast_enabled(self.device.type):
            return method(self, *args)
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args)

    return run


class HostCopy:
    """A copy of a small device tensor on its way to the host; `get` waits only if it has not arrived yet."""

    def __init__(self, tensor: torch.Tensor):
        self._event = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.to("cpu", copy=True)

    def __deepcopy__(self, memo: dict) -> HostCopy:
        return HostCopy(self.get())

    def get(self) -> torch.Tensor:
        """The CPU tensor."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host
