"""RMSNorm, alone, behind a residual sum and two side by side; rounded where the reference is.

In float32 with gradients, too: one pass forward, and one backward, which takes the root mean square of each row again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kogia.ops.cpu.common import DTYPES, Kernel, address, alike_refusal, plain_refusal, vector_refusal

_norm = Kernel("kogia_norm", "9q d q")
_backward = Kernel("kogia_norm_backward", "8q d q")
_sum = Kernel("kogia_sum", "6q")
_BLOCK = 64
"""Rows that share a part of the gradient of the weight, as the kernel has it."""


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return *norm_gradients(grads[0], x, weight, ctx.eps), None


class _AddRMSNorm(torch.autograd.Function):
    """The gradient of the sum is added to in the same pass."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = _added_and_normed(x.contiguous(), delta.contiguous(), weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, weight = ctx.saved_tensors
        grad_x, grad_weight = norm_gradients(grads[1], total, weight, ctx.eps, grads[0].contiguous())
        return grad_x, grad_x, grad_weight, None


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(of x, plus `added`; of the weight)."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    grad, grad_x, shares = grad.contiguous(), torch.empty(x.shape), torch.empty(-(-rows // _BLOCK), dim)
    _backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), address(added), grad_x.data_ptr(), shares.data_ptr(),
        rows, dim, eps, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, shares.sum(0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if _takes_gradients(x, weight):
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return _normed(x, weight, eps)


def _takes_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _normalise(x, weight, eps, out, x.shape[-1])
    return out


def _normalise(x: Tensor, weight: Tensor, eps: float, out: Tensor, out_row: int) -> None:
    """Into rows of `out` that are so far apart."""
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr(),
        x.numel() // dim, dim, out_row, eps, torch.get_num_threads(),
    )  # fmt: skip


def rms_norm_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    takes = plain_refusal if _takes_gradients(x, weight) else alike_refusal
    return takes(x, weight) or vector_refusal(weight, x.shape[-1])


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _takes_gradients(x, delta, weight):
        return _AddRMSNorm.apply(x, delta, weight, eps)  # pyright: ignore[reportReturnType]
    return _added_and_normed(x, delta, weight, eps)


def _added_and_normed(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), delta.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
        x.numel() // dim, dim, dim, eps, torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def add_rms_norm_supports(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.shape != delta.shape:
        return f"{x.shape} and {delta.shape} are not alike"
    takes = plain_refusal if _takes_gradients(x, delta, weight) else alike_refusal
    return takes(x, delta, weight) or vector_refusal(weight, x.shape[-1])


def residual_sum(x: Tensor, delta: Tensor, *more: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _sum(
        DTYPES[x.dtype], x.data_ptr(), delta.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()
    )  # fmt: skip
    return out


def residual_sum_supports(x: Tensor, delta: Tensor, *more: Tensor) -> str | None:
    if more:
        return f"it adds two tensors, not {2 + len(more)}"
    return alike_refusal(x, delta) if x.shape == delta.shape else f"{x.shape} and {delta.shape} are not alike"


def paired_norms(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor], eps: float) -> Tensor:
    rows, dim = first.shape
    out = torch.empty(rows, 2 * dim, dtype=first.dtype)
    _normalise(first, weights[0], eps, out, 2 * dim)
    _normalise(second, weights[1], eps, out[:, dim:], 2 * dim)
    return out


def paired_norms_supports(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor], eps: float) -> str | None:
    if first.shape != second.shape:
        return f"{first.shape} and {second.shape} are not alike"
    reasons = (vector_refusal(each, first.shape[-1]) for each in weights)
    return alike_refusal(first, second, *weights) or next((each for each in reasons if each), None)
