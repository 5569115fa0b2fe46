"""The numbers of a step on their way to the device: one buffer, one copy that nothing waits for."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """Host buffers for uploads, used in turns: a copy may still be under way while the next step is prepared."""

    def __init__(self, device: torch.device, turns: int = 2) -> None:
        """The upload made `turns` before another must have been read when that one is sent."""
        self.device = device
        self._buffers = [self._buffer(1 << 14) for _ in range(turns)]
        self._turn = 0

    def next_buffer(self, size: int) -> tuple[Tensor, NDArray[np.int64]]:
        """int64 host memory for at least `size` numbers, as a tensor and as an array; pinned beside a GPU."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if len(self._buffers[self._turn][1]) < size:
            self._buffers[self._turn] = self._buffer(2 * size)
        return self._buffers[self._turn]

    def _buffer(self, size: int) -> tuple[Tensor, NDArray[np.int64]]:
        memory = torch.empty(size, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return memory, memory.numpy()


class Upload:
    """Named arrays that travel together. `put` them all, `send` once, then take tensors by name."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._arrays: dict[str, NDArray] = {}
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, array: NDArray) -> None:
        """Integers arrive as int64, floats as float32. Empty arrays travel as well."""
        self._arrays[name] = array

    def send(self) -> None:
        """Start the copy."""
        buffer, host = self._staging.next_buffer(sum(array.size for array in self._arrays.values()))
        start = 0
        for array in self._arrays.values():
            # floats travel as the bits of float64, which an int64 buffer holds exactly
            numbers = array.astype(np.float64).view(np.int64) if array.dtype.kind == "f" else array
            host[start : start + array.size] = numbers.ravel()
            start += array.size
        self._unpack(buffer[:start].to(self._staging.device, non_blocking=True))

    def _unpack(self, sent: Tensor) -> None:
        start = 0
        for name, array in self._arrays.items():
            numbers = sent[start : start + math.prod(array.shape)].view(array.shape)
            self._tensors[name] = numbers.view(torch.float64).float() if array.dtype.kind == "f" else numbers
            start += array.size

    def __getitem__(self, name: str) -> Tensor:
        """The array on the device."""
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The same, or None where there is no such array."""
        return self._tensors.get(name)
