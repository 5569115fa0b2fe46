"""The numbers of a step on their way to the device and back: one copy each way, and nothing waits for the first."""

from collections.abc import Mapping

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
        self._sent: tuple[Tensor, Tensor] | None = None
        """All integers, and all floats, on the device."""
        self._starts: dict[str, int] = {}
        self._tensors: dict[str, Tensor] = {}
        """Those that were asked for."""

    def put(self, name: str, array: NDArray) -> None:
        """Integers arrive as int64, floats as float32. Empty arrays travel as well."""
        self._arrays[name] = array

    def send(self) -> None:
        """Start the copy. Floats travel behind the integers, two in the place of one; each array begins at a multiple
        of 16 bytes, which kernels are compiled for."""
        ends = {False: 0, True: 0}
        for name, array in self._arrays.items():
            is_float = array.dtype.kind == "f"
            self._starts[name] = ends[is_float]
            per_line = 4 if is_float else 2
            ends[is_float] += -(-array.size // per_line) * per_line
        num_integers, size = ends[False], ends[False] + ends[True] // 2
        buffer, host = self._staging.next_buffer(size)
        floats = host[num_integers:size].view(np.float32)
        for name, array in self._arrays.items():
            start = self._starts[name]
            (floats if array.dtype.kind == "f" else host)[start : start + array.size] = array.ravel()
        sent = buffer[:size].to(self._staging.device, non_blocking=True)
        self._sent = sent[:num_integers], sent[num_integers:].view(torch.float32)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Let a name of what was sent stand for what the device has computed instead."""
        if name in self._arrays:
            self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        """The array on the device."""
        if name not in self._tensors:
            assert self._sent is not None, "nothing was sent yet"
            array, start = self._arrays[name], self._starts[name]
            part = self._sent[array.dtype.kind == "f"][start : start + array.size]
            self._tensors[name] = part if array.ndim == 1 else part.view(array.shape)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def get(self, name: str) -> Tensor | None:
        """The same, or None where there is no such array."""
        return self[name] if name in self._arrays else None


class Bundle:
    """Named tensors of one device side by side, int64 or floating. Floats are there as the bits of float64."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.numbers = torch.cat([_as_integers(tensor) for tensor in tensors.values()])
        self._shapes = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in tensors.items()}

    def split(self, numbers: NDArray[np.int64]) -> dict[str, NDArray]:
        """The same on the host. Floats arrive as float32."""
        arrays, start = {}, 0
        for name, (shape, is_float) in self._shapes.items():
            part = numbers[start : start + shape.numel()]
            start += len(part)
            arrays[name] = (part.view(np.float64).astype(np.float32) if is_float else part).reshape(shape)
        return arrays


class Download:
    """A bundle on its way to the host. The copy starts at once."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._numbers = bundle.numbers.to("cpu", non_blocking=True)
        self._landed: torch.cuda.Event | None = None
        if bundle.numbers.device.type == "cuda":
            self._landed = torch.cuda.Event()
            self._landed.record()

    def wait(self) -> dict[str, NDArray]:
        """Block until it is there."""
        if self._landed is not None:
            self._landed.synchronize()
        return self._bundle.split(self._numbers.numpy())


class Arrived:
    """What stands on the host already."""

    def __init__(self, arrays: dict[str, NDArray]) -> None:
        self._arrays = arrays

    def wait(self) -> dict[str, NDArray]:
        return self._arrays


def _as_integers(tensor: Tensor) -> Tensor:
    return (tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor).flatten()
