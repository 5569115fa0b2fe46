"""Counts how often code crosses between host and device, on a CPU, where nothing else would show it.

A *synchronisation* is what would make the host wait for a GPU: a value read off a tensor, and an operation whose output
has a size that only its input's values tell. An *upload* brings host data to the device.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten.nonzero.default, aten.bincount.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.equal.default,
    aten.is_nonzero.default, aten._local_scalar_dense.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # on a CPU these never reach the dispatcher
MAKES = {torch.tensor, torch.as_tensor, torch.asarray}


@dataclass
class Crossings:
    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    dispatches: int = 0


class _Dispatches(TorchDispatchMode):
    def __init__(self, found: Crossings) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self.found.dispatches += 1
        if func in SIZED_BY_VALUES and (kwargs or {}).get("output_size") is None:
            self.found.syncs[str(func)] += 1
        if func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found.syncs[f"{func} by a mask"] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, found: Crossings) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            self.found.syncs[func.__name__] += 1
        if func in MAKES or (func is torch.Tensor.to and kwargs.get("non_blocking") and args[1:] != ("cpu",)):
            self.found.uploads[func.__name__] += 1
        return func(*args, **kwargs)


@contextmanager
def counting() -> Iterator[Crossings]:
    """Count within the block."""
    found, from_numpy = Crossings(), torch.from_numpy

    def noted(array: Any) -> torch.Tensor:
        found.uploads["from_numpy"] += 1
        return from_numpy(array)

    with _Dispatches(found), _Calls(found):
        torch.from_numpy = noted  # no mode sees it
        try:
            yield found
        finally:
            torch.from_numpy = from_numpy
