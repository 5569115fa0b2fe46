"""How much memory is left for a cache."""

import os
from pathlib import Path

import torch

SHARE = {"cuda": 0.8, "cpu": 0.5}
"""Of the free memory, what a cache may take: the rest is for the activations of a step, and on a CPU for others."""
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""A container's own limit and use, of either version of control groups."""


def cache_budget(device: torch.device) -> int:
    """Bytes that a cache may take on a device whose model has been loaded."""
    return int(free_memory(device) * SHARE.get(device.type, SHARE["cuda"]))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; on a CPU within this process's container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by PyTorch for itself
        return free + unused
    return min([_available(), *(room for limit, use in _GROUPS if (room := _room(limit, use)) is not None)])


def _available() -> int:
    """Of the whole machine: what Linux could give without swapping, elsewhere half of all."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kilobytes[0] << 10 if kilobytes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _room(limit: Path, use: Path) -> int | None:
    """What a control group has left; None where there is none, or it has no limit."""
    try:
        most, used = limit.read_text(encoding="ascii").strip(), use.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return max(0, int(most) - int(used)) if most.isdecimal() else None
