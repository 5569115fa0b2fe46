"""What a GPU's graphs are to its kernels: calls that are recorded once and then made again in one go.

Decoding one token of a small model takes a hundred kernels of some microseconds each; reaching them through Python,
with caches full of weights, costs as much again. A recording keeps the kernels' arguments, which are addresses, and all
memory that they name, and runs one kernel after the other from C++. What PyTorch computes in between is called again
where it stood, into the memory it filled before; views are not, for they still show the same memory. Numbers that the
host decided upon are as they were: whoever records must give bounds, as for a GPU's graph.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kogia.ops.cpu.build import library

_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_OF_TYPES = {"aten::promote_types", "aten::result_type", "aten::can_cast"}
"""Their answers hang on the types of tensors, which are as they were, and not on what is in them."""


class Recording:
    """Kernels and PyTorch's operations in their order."""

    def __init__(self) -> None:
        self._parts: list[Callable[[], None]] = []
        self._calls: list[tuple[int, bytes]] = []
        """Kernels since the last operation: the function's address and its arguments."""
        self._kept: list[Any] = []
        """Whatever has an address among the arguments."""
        self.num_bytes = 0
        """Of the tensors that were made while it was recorded, all of which it keeps."""
        self._thread = threading.get_ident()

    def replay(self) -> None:
        """Everything once more. The results stand where they stood."""
        for part in self._parts:
            part()

    def add_kernel(self, function: Any, arguments: bytes) -> None:
        if threading.get_ident() == self._thread:
            address = ctypes.cast(function, ctypes.c_void_p).value
            assert address is not None, "a function has an address"
            self._calls.append((address, arguments))

    def add_operation(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Raises RuntimeError for one that asks for a number: what follows may depend on it."""
        self._kept.append((args, kwargs, result))
        name, schema = function.name().split(".")[0], function._schema
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
        if not is_view and not schema.is_mutable:
            self.num_bytes += sum(each.nbytes for each in _tensors(result))
        if name in _ALLOCATIONS or name in _OF_TYPES or is_view:
            return
        if isinstance(result, int | float | complex):
            raise RuntimeError(f"a step that asks for a number of its tensors ({name}) cannot be recorded")
        self.close()
        self._parts.append(lambda: _again(function, args, kwargs, None if schema.is_mutable else result))

    def close(self) -> None:
        """Make one part of the kernels since the last operation."""
        if not self._calls:
            return
        arguments = [ctypes.create_string_buffer(each, len(each)) for _, each in self._calls]
        pairs = [(address, ctypes.addressof(each)) for (address, _), each in zip(self._calls, arguments, strict=True)]
        table = (ctypes.c_void_p * (2 * len(pairs)))(*(number for pair in pairs for number in pair))
        run = library().kogia_replay
        run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_int64], None
        self._kept.append((arguments, table))
        at, count = ctypes.addressof(table), len(pairs)
        self._parts.append(lambda: run(at, count))
        self._calls = []


def _tensors(result: Any) -> Iterator[Tensor]:
    """Of what an operation returned."""
    several = result if isinstance(result, tuple | list) else (result,)
    return (each for each in several if isinstance(each, Tensor))


@torch.no_grad()
def _again(function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Call an operation, and move what it makes to where it was; `result` is None if it works in place. With gradients
    on, views of weights that have been trained since would be refused."""
    made = function(*args, **kwargs)
    if isinstance(result, Tensor):
        result.copy_(made)
    elif result is not None:
        for old, new in zip(result, made, strict=True):
            old.copy_(new)


class _Watch(TorchDispatchMode):
    """Tells a recording of every operation of PyTorch's."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch's own hook: else it loads its compiler, for seconds, to keep that from looking in here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._recording.add_operation(func, args, kwargs, result)
        return result


active: list[Recording] = []
"""The recording under way, if there is one: kernels tell it what they are called with."""


_one_at_a_time = threading.Lock()


@contextmanager
def recording() -> Iterator[Recording]:
    """Within the block, this thread's kernels and operations run and are recorded. Another thread, which serves another
    model, waits until it may record."""
    with _one_at_a_time:
        made = Recording()
        active.append(made)
        try:
            with torch.no_grad(), _Watch(made):
                yield made
            made.close()
        finally:
            active.clear()
