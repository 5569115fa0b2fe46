"""Attention over packed sequences without a cache, with gradients: sequences stay where they lie, without padding.

Sixty-four queries of a head at a time: their scores over all keys that the last of them sees, in memory that the caches
hold. Only the logarithm of each query's sum is kept for the backward pass, which makes the weights again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kogia.ops.cpu.common import Kernel, plain_refusal
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors

_FIELDS = "3q 6q q 5q d 3q 4q"
_forward = Kernel("kogia_varlen_forward", _FIELDS)
_backward = Kernel("kogia_varlen_backward", _FIELDS)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        tokens, heads, _ = q.shape
        out, lse = torch.empty(tokens, heads, v.shape[2]), torch.empty(tokens, heads)
        _forward(*_fields(q, k, v, cu_seqlens, scale, out, lse), 0, 0, 0, 0)
        ctx.save_for_backward(q, k, v, cu_seqlens, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
        grad, grad_q, grad_k, grad_v = (
            grads[0].contiguous(),
            torch.empty(q.shape),
            torch.zeros(k.shape),
            torch.zeros(v.shape),
        )
        made = (each.data_ptr() for each in (grad, grad_q, grad_k, grad_v))
        _backward(*_fields(q, k, v, cu_seqlens, ctx.scale, out, lse), *made)
        return grad_q, grad_k, grad_v, None, None


def _fields(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, out: Tensor, lse: Tensor
) -> tuple[float, ...]:
    strides = (each.stride(axis) for each in (q, k, v) for axis in (0, 1))
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *strides, cu_seqlens.data_ptr(),
        len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2], v.shape[2], scale,
        out.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    keys: Segments | None = None,
) -> Tensor:
    """A thread takes a sequence's key head at a time."""
    return _Attention.apply(q, k, v, segments.cu_seqlens, scale)  # pyright: ignore[reportReturnType]


def varlen_attention_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    keys: Segments | None = None,
) -> str | None:
    if index is not None or keys is not None:
        return "it attends within sequences, without an indexer"
    for each in (q, k, v):
        if each.shape[2] % 16 or each.stride(2) != 1:
            return f"it takes queries, keys and values of a multiple of 16 numbers side by side, not {each.shape[2]}"
    return plain_refusal(q, k, v)
