"""What kind of card a tensor is on, for the tables of tiles."""

import torch


def capability(device: torch.device) -> int:
    """75 for a T4, 90 for an H100; the interpreter takes what most cards take."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor
