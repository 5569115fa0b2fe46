"""Processes that run one model together, and what they exchange: sums, parts side by side, copies.

Groups stand beside `torch.distributed`'s default group and need none. GPUs talk through NCCL, on the stream of the
caller, so that what they exchange is recorded in graphs like any kernel; CPUs through gloo on the loopback.
"""

import datetime
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, _SymmetricMemory
from torch.distributed import _symmetric_memory as symmetric_memory

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
    _mailbox: "_Mailbox | None" = None

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum of a contiguous tensor over the ranks, the same bits on each. `x` may be overwritten."""
        if self._mailbox is not None and self._mailbox.takes(x):
            return self._mailbox.total(x)
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
        if self._mailbox is not None:  # beside what follows: the device may be waiting for either
            threading.Thread(target=self._mailbox.abort, name="kogia-abort", daemon=True).start()
        self._backend.abort()


def _finish(work: Any) -> None:
    """What runs on the stream of the caller has nothing to wait for, and may be None."""
    if work is not None:
        work.wait()


@dataclass(frozen=True, eq=False)
class _Mailbox:
    """Memory of two GPUs that both read: a small sum is one kernel, and takes a third of NCCL's time.

    Of more than two ranks each would add up in an order of its own, and not all would have the same bits.
    """

    memory: Shaped[Tensor, " bytes"]
    group: str
    signals: tuple[Tensor, Tensor]
    """By which kernels of both ranks wait for each other: this rank's and the other's."""

    @classmethod
    def open(cls, rank: int, store: dist.Store, device: torch.device, group: str) -> "_Mailbox | None":
        """For two ranks, which both call this; None where a GPU cannot read the other's memory."""
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        try:
            _SymmetricMemory.set_group_info(group, rank, 2, dist.PrefixStore("mailbox", store))
            memory = symmetric_memory.empty(MAILBOX_BYTES, dtype=torch.uint8, device=device)
            handle = _SymmetricMemory.rendezvous(memory, group)
            assert handle is not None, "what was made for it can be shared"
            own, other = (handle.get_signal_pad(each, dtype=torch.int32) for each in (rank, 1 - rank))
        except RuntimeError:
            return None
        return cls(memory, group, (own, other))

    def takes(self, x: Tensor) -> bool:
        return 0 < x.nbytes <= len(self.memory) and x.nbytes % 16 == 0 and x.dtype in (torch.bfloat16, torch.float32)

    def total(self, x: Tensor) -> Tensor:
        shared = self.memory[: x.nbytes].view(x.dtype)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.view(-1), "sum", self.group).view(x.shape)

    def abort(self) -> None:
        """Give the signals of a rank that is gone, on a stream of their own, until nothing has waited for a second."""
        own, other = self.signals
        waiting = torch.cuda.default_stream(self.memory.device)
        idle_since = time.monotonic()
        with torch.cuda.stream(torch.cuda.Stream(self.memory.device)):
            while time.monotonic() - idle_since < 1.0:
                if not waiting.query():
                    idle_since = time.monotonic()
                own.fill_(1)
                other.zero_()
                torch.cuda.current_stream().synchronize()


MAILBOX_BYTES = 1 << 20
"""Larger sums are NCCL's: they are bound by what goes over the wire, which is the same."""


def join(rank: int, size: int, meeting_place: str, kind: str) -> Group:
    """Wait for the other ranks at a file that none of them has used before.

    `kind` of device is "cuda", of which rank r takes number r, or "cpu". NVLink multicast is left off unless the
    environment says otherwise. Raises RuntimeError where the ranks do not all come within `TIMEOUT`.
    """
    store, mailbox = dist.FileStore(meeting_place, size), None
    if kind == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = TIMEOUT
        backend = dist.ProcessGroupNCCL(store, rank, size, options)
        if size == 2:
            mailbox = _Mailbox.open(rank, store, device, meeting_place)
    else:
        device = torch.device("cpu")
        options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = TIMEOUT
        backend = dist.ProcessGroupGloo(store, rank, size, options)
    group = Group(rank, size, device, backend)
    has_mailbox = group.least(int(mailbox is not None))  # connections are made by this first exchange
    return replace(group, _mailbox=mailbox) if has_mailbox else group
