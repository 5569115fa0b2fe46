"""What a device is and how fast its memory and its matrix products are, as measured here and now."""

import os
import platform
import time
from statistics import median
from typing import Any

import torch

from kogia.ops.cpu import build


def describe(device: torch.device) -> dict[str, Any]:
    """Names and versions that figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "instructions": instruction_set() if device.type == "cpu" else None,
    }


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


def copy_rate(device: torch.device, repeats: int = 7) -> float:
    """Bytes per second of a large copy, those read and those written: the limit of what is bound by memory."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, repeats)


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a square matrix product, additions counted: the limit of what is bound by arithmetic."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, repeats)


def _seconds(work: Any, device: torch.device, repeats: int) -> float:
    """Median of some runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _finish(device)
        started = time.perf_counter()
        work()
        _finish(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
