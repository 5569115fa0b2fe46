"""Packed sequences as padded grids for dense kernels: sequences of similar length share one [seqs, width] grid.

Padding stays below a factor of two, and the copies in and out are gathers both forward and backward: deterministic.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


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


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length laid out as a [seqs, width] grid."""

    seqs: Tensor | None  # which sequences; None when the bucket holds them all, in order
    rows: Tensor | None  # their packed rows; None likewise
    slots: Tensor  # grid slot of each row
    num_seqs: int
    width: int

    def to_grid(self, x: Float[Tensor, "tokens ..."]) -> Float[Tensor, "seqs width ..."]:
        """This bucket's rows of packed `x`, zeros behind the end of each sequence."""
        picked: Tensor = x if self.rows is None else _FromGrid.apply(x, self.rows)  # pyright: ignore
        if self.width == 1:
            return picked.unsqueeze(1)
        padded = _ToGrid.apply(picked, self.slots, self.num_seqs * self.width)
        return padded.view(self.num_seqs, self.width, *x.shape[1:])  # pyright: ignore[reportAttributeAccessIssue]

    def from_grid(self, x: Float[Tensor, "seqs width ..."]) -> Float[Tensor, "rows ..."]:
        """The rows of a grid without its padding, as they lie in the packed order of this bucket."""
        flat = x.reshape(self.num_seqs * self.width, *x.shape[2:])
        return flat if self.width == 1 else _FromGrid.apply(flat, self.slots)  # pyright: ignore[reportReturnType]


def buckets_by_length(cu_seqlens: Int[Tensor, " seqs_plus_1"], max_seqlen: int) -> list[Bucket]:
    """Group sequences whose lengths share a power of two. One bucket, without copies, when all lengths are alike."""
    starts = cu_seqlens[:-1]
    lengths = cu_seqlens[1:] - starts
    num_tokens = int(cu_seqlens[-1])
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=num_tokens)
    offset = torch.arange(num_tokens, device=lengths.device) - starts[owner]
    if len(lengths) * max_seqlen <= 1.25 * num_tokens + 256:
        return [Bucket(None, None, owner * max_seqlen + offset, len(lengths), max_seqlen)]
    powers = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    buckets = []
    for power in powers.unique().tolist():
        seqs = (powers == power).nonzero().flatten()
        rank = torch.full_like(lengths, -1)
        rank[seqs] = torch.arange(len(seqs), device=seqs.device)
        rows = (rank[owner] >= 0).nonzero().flatten()
        width = int(lengths[seqs].max())
        buckets.append(Bucket(seqs, rows, rank[owner[rows]] * width + offset[rows], len(seqs), width))
    return buckets
