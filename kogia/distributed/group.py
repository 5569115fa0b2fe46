"""Processes that run one model together, and what they exchange: sums, parts side by side, copies.

Groups stand beside `torch.distributed`'s default group and need none. GPUs talk through NCCL, on the stream of the
caller, so that what they exchange is recorded in graphs like any kernel; CPUs through gloo on the loopback.
"""

import ctypes
import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others: one may be compiling kernels."""


@dataclass(frozen=True, eq=False)
class Group:
    """This process's end of the connection."""

    rank: int
    size: int
    device: torch.device
    """Where this rank computes."""
    _backend: Any
    """PyTorch's, of whose methods its stubs know nothing."""

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of a contiguous tensor over the ranks, in its place, the same bits on each."""
        options = dist.AllreduceOptions()
        options.asyncOp = False
        _finish(self._backend.allreduce([x], options))
        return x

    def side_by_side(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows all_widths"]:
        """The columns of all ranks in their order."""
        parts = x.new_empty(self.size, *x.shape)
        options = AllgatherOptions()
        options.asyncOp = False
        _finish(self._backend._allgather_base(parts.flatten(0, 1), x.contiguous(), options))
        return parts.transpose(0, 1).reshape(x.shape[0], -1)

    def copy_from_first_(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Replace a contiguous tensor by that of rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, False
        _finish(self._backend.broadcast([x], options))
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = dist.ReduceOp(dist.ReduceOp.MIN), False
        found = torch.tensor([number], device=self.device)
        _finish(self._backend.allreduce([found], options))
        return int(found)

    def abort(self) -> None:
        """Give up what is under way, so that nobody waits for it. The group is of no more use."""
        self._backend.abort()


def _finish(work: Any) -> None:
    """What runs on the stream of the caller has nothing to wait for, and may be None."""
    if work is not None:
        work.wait()


def join(rank: int, size: int, meeting_place: str, kind: str) -> Group:
    """Wait for the other ranks at a file that none of them has used before.

    `kind` of device is "cuda", of which rank r takes number r, or "cpu". NVLink multicast is left off unless the
    environment says otherwise. Raises RuntimeError where the ranks do not all come within `TIMEOUT`.
    """
    store = dist.FileStore(meeting_place, size)
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        backend = dist.ProcessGroupNCCL(store, rank, size, options)
        _keep_for_good(backend)
    else:
        device = torch.device("cpu")
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = TIMEOUT
        backend = dist.ProcessGroupGloo(store, rank, size, options)
    group = Group(rank, size, device, backend)
    group.least(0)  # connections are made by the first exchange
    return group


def _keep_for_good(backend: Any) -> None:
    """Never destroy it, the process takes it along: NCCL's end waits for recorded graphs and for ranks that are gone.
    Where it was destroyed behind a closed engine, on two H200, the process went no further."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
