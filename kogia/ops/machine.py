"""What a device is, what memory it has left, and how fast copies and matrix products are, as measured here and now."""

import os
import platform
import resource
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kogia.ops.cpu import build

_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""A container's own limit and use, of either version of control groups."""


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions that figures depend on."""
    return {
        "device": name_of(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "instructions": instruction_set() if device.type == "cpu" else None,
    }


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def instruction_set() -> str:
    """What the CPU's kernels are compiled for, or why there are none."""
    try:
        build.library()
    except ImportError as error:
        return f"none, {error}"
    return build.level()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: on a GPU of what PyTorch allocated, on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def copy_rate(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second of a large copy, those read and those written: the limit of what is bound by memory."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, repeats)


PRODUCT = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices whose product is the measure of a device."""


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a square matrix product, additions counted: the limit of what is bound by arithmetic."""
    size = PRODUCT[device.type]
    generator = torch.Generator(device).manual_seed(0)  # those of others draw on
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, repeats)


def _seconds(work: Any, device: torch.device, repeats: int) -> float:
    """Median of some runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        finish(device)
        started = time.perf_counter()
        work()
        finish(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def finish(device: torch.device) -> None:
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
