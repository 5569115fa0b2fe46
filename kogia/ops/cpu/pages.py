"""Memory for weights in large pages: streaming through pages of 4 KiB takes a fifth longer. And memory that is kept."""

import ctypes
import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 1 << 21


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`; on a CPU, where the system knows large pages, big tensors ask for them.

    It is a wish: where there are none to be had, pages are small.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, -(-nbytes // _HUGE) * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes).view(dtype).view(shape)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""As <malloc.h> numbers them."""
_KEPT = 1 << 30
_MOST_OF_OLD = 1 << 25
"""Older versions refuse more."""


def keep_freed() -> None:
    """Let this process keep what it frees, blocks up to a gigabyte, for the next time.

    A training step takes and frees the same tensors over and over. By default glibc gives what is free at the end of a
    step back to the system, which clears and maps it again page by page: thousands of faults a step. Other C libraries
    are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(_MMAP_THRESHOLD, _KEPT):
            mallopt(_MMAP_THRESHOLD, _MOST_OF_OLD)
        mallopt(_TRIM_THRESHOLD, _KEPT)
