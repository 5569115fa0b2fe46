"""Products of many rows in float32, with gradients: most of what training a small model computes.

PyTorch calls MKL for them, which uses half the width of AVX-512 on processors that are not Intel's: in one thread of a
Zen 5 core it makes 100 GFLOP/s of 4096 rows of 96 numbers times 384, and this kernel 240, forward and backward.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.cpu.common import Kernel, plain_refusal
from kogia.ops.linear import are_rounded
from kogia.ops.linear import product as multiply
from kogia.ops.packed import Packed

_product = Kernel("kogia_product", "3q 3q 3q 5q")
WORTH = 1 << 18
"""Multiplications below which what stands around the kernel costs more than it gains."""


def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """Of rows, or of transposed ones, as they lie in memory."""
    return _write(a, b, torch.empty(a.shape[0], b.shape[0]))


def _write(a: Tensor, b: Tensor, out: Tensor, *, adds: bool = False) -> Tensor:
    """`product` into `out`, or added to what that holds; its rows may lie apart."""
    a, b = (each if 1 in each.stride() else each.contiguous() for each in (a, b))
    _product(
        a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(),
        out.data_ptr(), out.stride(0), adds, *out.shape, a.shape[1], torch.get_num_threads(), are_rounded(),
    )  # fmt: skip
    return out


def product_supports(a: Tensor, b: Tensor) -> str | None:
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return "it has no backward of its own"
    return _refusal(a, b, size=a.numel() * b.shape[0])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return _write(a, b, total, adds=True)


def add_product_supports(total: Tensor, a: Tensor, b: Tensor) -> str | None:
    if total.stride(1) != 1:
        return "it adds to rows whose numbers lie side by side"
    if total.shape != (len(a), len(b)):
        return f"it adds to a matrix of shape {(len(a), len(b))}, not {tuple(total.shape)}"
    return product_supports(a, b) or plain_refusal(total)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (needs_x, needs_weight) = ctx.saved_tensors, ctx.needs_input_grad
        grad_x = multiply(grads[0], weight.T) if needs_x else None
        return grad_x, multiply(grads[0].T, x.T) if needs_weight else None


def linear(x: Float[Tensor, "... in"], weight: Tensor, bias: Tensor | None = None) -> Float[Tensor, "... out"]:
    """`product`, and what it needs for gradients."""
    rows = x.flatten(0, -2)
    made = _Product.apply(rows, weight) if torch.is_grad_enabled() else multiply(rows, weight)
    made = made.view(*x.shape[:-1], len(weight))  # pyright: ignore[reportOptionalMemberAccess]
    return made if bias is None else made + bias


def linear_supports(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> str | None:
    if isinstance(weight, Packed):
        return "it takes dense weights"
    if x.ndim < 2:
        return "it takes rows"
    return _refusal(x, weight, size=x.numel() * weight.shape[0])


class _Grouped(torch.autograd.Function):
    """Rows in expert order times [experts, out, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _by_expert(x, weight, sizes)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return _by_expert(grads[0], weight.mT, ctx.sizes), _outer(grads[0], x, ctx.sizes), None


def _by_expert(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    """Rows of each expert times its matrix of [experts, out, in]."""
    out = torch.empty(x.shape[0], weight.shape[1])
    for rows, matrix, place in zip(x.split(sizes), weight, out.split(sizes), strict=True):
        _write(rows, matrix, place)
    return out


def _outer(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    """a_e^T b_e; zeros of who has no rows."""
    out = torch.zeros(len(sizes), a.shape[1], b.shape[1])
    for rows, others, place in zip(a.split(sizes), b.split(sizes), out, strict=True):
        _write(rows.T, others.T, place)
    return out


def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Tensor, counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """One product per expert. Rows that are nobody's go to the last one."""
    sizes: list[int] = counts.tolist()
    sizes[-1] += x.shape[0] - sum(sizes)
    return _Grouped.apply(x, weight.flatten(1, -2), sizes)  # pyright: ignore[reportReturnType]


def grouped_linear_supports(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> str | None:
    if isinstance(weight, Packed):
        return "it takes dense weights"
    return _refusal(x, weight, size=x.shape[0] * weight[0].numel() // len(weight))


def grouped_outer(
    a: Float[Tensor, "routed out"], b: Float[Tensor, "routed in"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "experts out in"]:
    """One product per expert."""
    sizes: list[int] = counts.tolist()
    return _outer(a[: sum(sizes)], b[: sum(sizes)], sizes)


def grouped_outer_supports(a: Tensor, b: Tensor, counts: Tensor) -> str | None:
    return _refusal(a, b, size=a.numel() * b.shape[1] // len(counts))


def _refusal(*tensors: Tensor, size: int) -> str | None:
    if size < WORTH:
        return f"it is for {WORTH} multiplications and more, not {size}"
    return plain_refusal(*tensors)
