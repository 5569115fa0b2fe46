"""Sums of several tensors in one pass: residual streams, and gradients of what has several readers."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import LAUNCH, PDL, kernel, trained_refusal, training_refusal, wait_for_inputs

_BLOCK = 2048
_MOST = 4


@kernel
def _sum(a, b, c, d, out, numel, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < numel
    total = tl.load(a + n, inside, 0.0).to(tl.float32) + tl.load(b + n, inside, 0.0).to(tl.float32)
    if NUMBER > 2:
        total += tl.load(c + n, inside, 0.0).to(tl.float32)
    if NUMBER > 3:
        total += tl.load(d + n, inside, 0.0).to(tl.float32)
    tl.store(out + n, total.to(out.dtype.element_ty), inside)


def summed(*parts: Tensor) -> Tensor:
    """Of two to four, rounded once."""
    parts = tuple(part.contiguous() for part in parts)
    out, numel = torch.empty_like(parts[0]), parts[0].numel()
    a, b, c, d = (*parts, *parts[:1] * (_MOST - len(parts)))
    if numel:
        _sum[(triton.cdiv(numel, _BLOCK),)](
            a, b, c, d, out, numel, NUMBER=len(parts), BLOCK=_BLOCK, PDL=PDL, num_warps=8, **LAUNCH
        )
    return out


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.number = len(parts)
        return summed(*parts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads * ctx.number


def residual_sum(x: Tensor, delta: Tensor, *more: Tensor) -> Tensor:
    return _ResidualSum.apply(x, delta, *more)  # pyright: ignore[reportReturnType]


def residual_sum_supports(x: Tensor, delta: Tensor, *more: Tensor) -> str | None:
    if not more or len(more) > _MOST - 2:
        return f"it adds three or four tensors, not {2 + len(more)}"
    if len({each.shape for each in (x, delta, *more)}) > 1:
        return "it adds tensors of one shape"
    return trained_refusal(x, delta, *more)


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, number: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(number))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(*grads), None


def branches(x: Tensor, number: int) -> tuple[Tensor, ...]:
    return _Branches.apply(x, number)  # pyright: ignore[reportReturnType]


def branches_supports(x: Tensor, number: int) -> str | None:
    if not 2 < number <= _MOST:
        return f"it has three or four readers, not {number}"
    return training_refusal() or trained_refusal(x)
