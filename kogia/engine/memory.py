"""How much memory is left for a cache."""

import torch

from kogia.ops.machine import free_memory

SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of the free memory, what a cache may take: the rest is for the activations of a step, and on a CPU for others."""


def cache_budget(device: torch.device) -> int:
    """Bytes that a cache may take on a device whose model has been loaded."""
    return int(free_memory(device) * SHARE.get(device.type, SHARE["cuda"]))
