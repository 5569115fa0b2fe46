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
        self._tensors: dict[str, Tensor] = {}

    def put(self, name: str, array: NDArray) -> None:
        """Integers arrive as int64, floats as float32. Empty arrays travel as well."""
        self._arrays[name] = array

    def send(self) -> None:
        """Start the copy. Floats travel behind the integers, as the bits of float64, which an int64 buffer holds."""
        floats = {name: array for name, array in self._arrays.items() if array.dtype.kind == "f"}
        integers = {name: array for name, array in self._arrays.items() if name not in floats}
        num_integers = sum(array.size for array in integers.values())
        num_floats = sum(array.size for array in floats.values())
        buffer, host = self._staging.next_buffer(num_integers + num_floats)
        _fill(host[:num_integers], integers)
        _fill(host[num_integers : num_integers + num_floats].view(np.float64), floats)
        sent = buffer[: num_integers + num_floats].to(self._staging.device, non_blocking=True)
        self._tensors = _unpack(sent[:num_integers], integers)
        if floats:
            self._tensors |= _unpack(sent[num_integers:].view(torch.float64).float(), floats)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Let a name of what was sent stand for what the device has computed instead."""
        if name in self._tensors:
            self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        """The array on the device."""
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str) -> Tensor | None:
        """The same, or None where there is no such array."""
        return self._tensors.get(name)


class Download:
    """Named tensors that travel together to the host. The copy starts at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Of one device, int64 or floating. Floats travel as the bits of float64."""
        self._tensors = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in tensors.items()}
        numbers = torch.cat([_as_integers(tensor) for tensor in tensors.values()])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._landed: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._landed = torch.cuda.Event()
            self._landed.record()

    def wait(self) -> dict[str, NDArray]:
        """Block until they are there. Floats arrive as float32."""
        if self._landed is not None:
            self._landed.synchronize()
        host, arrays, start = self._numbers.numpy(), {}, 0
        for name, (shape, is_float) in self._tensors.items():
            part = host[start : start + shape.numel()]
            start += len(part)
            arrays[name] = (part.view(np.float64).astype(np.float32) if is_float else part).reshape(shape)
        return arrays


def _as_integers(tensor: Tensor) -> Tensor:
    return (tensor.double().view(torch.int64) if tensor.is_floating_point() else tensor).flatten()


def _fill(host: NDArray, arrays: dict[str, NDArray]) -> None:
    start = 0
    for array in arrays.values():
        host[start : start + array.size] = array.ravel()
        start += array.size


def _unpack(numbers: Tensor, arrays: dict[str, NDArray]) -> dict[str, Tensor]:
    parts = numbers.split([array.size for array in arrays.values()])
    return {n: part if a.ndim == 1 else part.view(a.shape) for (n, a), part in zip(arrays.items(), parts, strict=True)}
