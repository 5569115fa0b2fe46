"""Sequences laid end to end, and the padded grids in which dense reference kernels see them.

Lengths are known twice: on the host, where sizes are decided, and on the device, where positions are computed. Nothing
here waits for the device. A fused kernel reads `cu_seqlens` alone; the grids are a cached property it never asks for.

Sequences of similar length share one [seqs, width] grid: padding stays below a factor of two, and the copies in and out
are gathers both forward and backward, hence deterministic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
_POWERS = 40  # sequences of up to 2**40 tokens


class once(Generic[T]):
    """`functools.cached_property` without the lock that it takes in Python 3.11, which torch.compile cannot trace."""

    def __init__(self, compute: Callable[..., T]) -> None:
        self.compute = compute

    def __get__(self, instance: "Segments", owner: type) -> T:
        value = instance.__dict__[self.compute.__name__] = self.compute(instance)
        return value


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each packed sequence lies. Make it with `segments_of`."""

    cu_seqlens: Int[Tensor, " seqs_plus_1"]
    """Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]; the first entry is 0, the last the number of tokens."""
    lengths: Int[np.ndarray, " seqs"]
    """The same on the host."""
    num_tokens: int = field(init=False)
    longest: int = field(init=False)
    """Tokens of the longest sequence."""

    def __post_init__(self) -> None:
        if len(self.cu_seqlens) != len(self.lengths) + 1 or self.cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"Segments: cu_seqlens of shape {tuple(self.cu_seqlens.shape)} and {self.cu_seqlens.dtype} beside "
                f"{len(self.lengths)} lengths; must be int32 or int64 and have one entry more than there are lengths"
            )
        if len(self.lengths) == 0 or self.lengths.min() < 1:
            raise ValueError(f"Segments: lengths {self.lengths.tolist()}; every sequence needs at least one token")
        object.__setattr__(self, "num_tokens", int(self.lengths.sum()))
        object.__setattr__(self, "longest", int(self.lengths.max()))

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    @once
    def device_lengths(self) -> Int[Tensor, " seqs"]:
        """`lengths` on the device."""
        return self.cu_seqlens.diff()

    @once
    def owner(self) -> Int[Tensor, " tokens"]:
        """The sequence of each row."""
        return torch.repeat_interleave(self.device_lengths, output_size=self.num_tokens)

    @once
    def offsets(self) -> Int[Tensor, " tokens"]:
        """The place of each row in its sequence."""
        return torch.arange(self.num_tokens, device=self.cu_seqlens.device) - self.cu_seqlens[:-1][self.owner]

    @once
    def later_rows(self) -> Int[Tensor, " rows"]:
        """All rows but the first of each sequence: those that something before them predicts."""
        return torch.nonzero_static(self.offsets, size=self.num_tokens - self.num_seqs).flatten()

    @once
    def buckets(self) -> list["Bucket"]:
        """Grids of sequences whose lengths share a power of two; one without copies when all lengths are alike."""
        return _buckets(self)

    def to(self, device: torch.device | str) -> "Segments":
        return Segments(self.cu_seqlens.to(device), self.lengths)


def segments_of(lengths: Sequence[int] | NDArray[np.int64], device: torch.device | str = "cpu") -> Segments:
    """Sequences of these lengths, end to end."""
    host = np.asarray(lengths, dtype=np.int64)
    cu_seqlens = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(host)])
    return Segments(torch.from_numpy(cu_seqlens).to(device), host)


class _ToGrid(torch.autograd.Function):
    """Copy packed rows into a zeroed grid. Slots are unique, so the backward is a plain gather, no accumulation."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros((num_slots, *x.shape[1:])).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _FromGrid(torch.autograd.Function):
    """Read packed rows back out of a grid; the transpose of `_ToGrid`."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad.new_zeros((ctx.num_slots, *grad.shape[1:])).index_copy_(0, ctx.saved_tensors[0], grad), None


def take_rows(x: Float[Tensor, "tokens ..."], rows: Int[Tensor, " rows"]) -> Float[Tensor, "rows ..."]:
    """`x[rows]` of rows that are all different: the backward pass copies them back, nothing is added up."""
    return _FromGrid.apply(x, rows)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Sequences of similar length laid out as a [seqs, width] grid."""

    members: Int[np.ndarray, " seqs"]
    """Which sequences, on the host."""
    seqs: Int[Tensor, " seqs"] | None
    """The same on the device; None when the bucket holds them all, in order."""
    rows: Int[Tensor, " rows"] | None
    """Their packed rows; None likewise."""
    slots: Int[Tensor, " rows"] | None
    """Grid slot of each row; None when the grid has no padding."""
    width: int

    @property
    def num_seqs(self) -> int:
        return len(self.members)

    def to_grid(self, x: Float[Tensor, "tokens ..."]) -> Float[Tensor, "seqs width ..."]:
        """This bucket's rows of packed `x`, zeros behind the end of each sequence."""
        picked = x if self.rows is None else take_rows(x, self.rows)
        if self.slots is not None:
            picked = _ToGrid.apply(picked, self.slots, self.num_seqs * self.width)  # pyright: ignore
        return picked.view(self.num_seqs, self.width, *x.shape[1:])

    def from_grid(self, x: Float[Tensor, "seqs width ..."]) -> Float[Tensor, "rows ..."]:
        """The rows of a grid without its padding, as they lie in the packed order of this bucket."""
        flat = x.reshape(self.num_seqs * self.width, *x.shape[2:])
        return flat if self.slots is None else take_rows(flat, self.slots)


def _buckets(segments: Segments) -> list[Bucket]:
    width, area = segments.longest, segments.num_seqs * segments.longest
    everyone = np.arange(segments.num_seqs)
    if area == segments.num_tokens:
        return [Bucket(everyone, None, None, None, width)]
    owner, offsets = segments.owner, segments.offsets
    if area <= 1.25 * segments.num_tokens + 256:
        return [Bucket(everyone, None, None, owner * width + offsets, width)]
    # both sides sort by the smallest p with 2**p >= length, stably: the host knows the sizes, the device the places
    device = owner.device
    host_class = np.searchsorted(2 ** np.arange(_POWERS), segments.lengths)
    powers = 2 ** torch.arange(_POWERS, device=device)
    length_class = torch.bucketize(segments.device_lengths, powers)
    by_class = length_class.argsort(stable=True)
    rank = torch.empty_like(by_class).index_copy_(0, by_class, torch.arange(len(by_class), device=device))
    rows_by_class = length_class[owner].argsort(stable=True)
    buckets, first_seq, first_row = [], 0, 0
    for members in (np.flatnonzero(host_class == c) for c in np.unique(host_class)):
        width, num_rows = int(segments.lengths[members].max()), int(segments.lengths[members].sum())
        seqs, rows = by_class[first_seq : first_seq + len(members)], rows_by_class[first_row : first_row + num_rows]
        slots = None if num_rows == len(members) * width else (rank[owner[rows]] - first_seq) * width + offsets[rows]
        buckets.append(Bucket(members, seqs, rows, slots, width))
        first_seq, first_row = first_seq + len(members), first_row + num_rows
    return buckets
