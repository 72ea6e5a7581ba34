"""A stream beside the model's: a layer's prompt is coded there while the model computes the next layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


class SideStream:
    """Does one piece of work at a time beside what the device goes on with.

    The work reads what was there when it began; what it makes may be read after `join`. A device that is no GPU does
    it at once.
    """

    def __init__(self):
        self._running: tuple[torch.cuda.Stream, tuple[torch.Tensor, ...]] | None = None

    def run(self, device: torch.device, work: Callable[[], None], *read: torch.Tensor) -> None:
        """Begins `work` on `device`; `read` are the tensors that nobody else may hold on to until it is done."""
        if device.type != "cuda":
            work()
            return
        self.join()
        stream = _stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # held: else the allocator would give their memory to the next layer
        self._running = stream, read
        with torch.cuda.stream(stream):
            work()

    def join(self) -> None:
        """What the device does from now on comes after the work."""
        if self._running is not None:
            stream, _ = self._running
            torch.cuda.current_stream(stream.device).wait_stream(stream)
            self._running = None


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
