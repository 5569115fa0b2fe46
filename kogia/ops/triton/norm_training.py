"""RMSNorm in training, alone and behind a residual sum: one pass forward, one backward.

The gradient of the weight is added up in two stages, by a number of programs and then over them: no atomics, so that
two runs are equal bit for bit.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import LAUNCH, PDL, kernel, trained_refusal, wait_for_inputs

_TILE = 2048
"""Numbers that a program takes at a time."""
_WIDEST = 16384
_PROGRAMS = 528
"""Of the backward pass, at most: four for each multiprocessor of a Hopper GPU."""
_STAGES = 3
"""Tiles that a program reads ahead: 133 us for 32,768 rows of 2,048, where one after the other takes 156 on an H200."""


@kernel
def _forward(
    x, delta, weight, total, out, scale, eps, num_rows, dim, x_row,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (n < dim)[None, :]
    at = row[:, None] * dim + n[None, :]
    factor = tl.load(weight + n, n < dim, 0.0)
    value = tl.load(x + row[:, None] * x_row + n[None, :], inside, 0.0)
    if ADD:
        value = value + tl.load(delta + at, inside, 0.0)  # rounded to the dtype, as the reference is
        tl.store(total + at, value, inside)
    wide = value.to(tl.float32)
    by_row = tl.rsqrt(tl.sum(wide * wide, 1) / dim + eps)
    tl.store(scale + row, by_row, row < num_rows)
    tl.store(out + at, (wide * by_row[:, None]).to(value.dtype) * factor[None, :], inside)


@kernel
def _backward(
    grad, x, weight, scale, added, grad_x, parts, num_rows, dim, x_row, grad_x_row,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs take turns at tiles of rows, the next of which are read meanwhile, and leave their shares of the
    gradient of the weight in `parts`."""
    wait_for_inputs(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    n = tl.arange(0, BLOCK)
    factor = tl.load(weight + n, n < dim, 0.0).to(tl.float32)[None, :]
    shares = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, (num_rows + ROWS - 1) // ROWS, programs, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        there = row < num_rows
        inside = there[:, None] & (n < dim)[None, :]
        at = row[:, None] * dim + n[None, :]
        by_row = tl.load(scale + row, there, 0.0)[:, None]
        normed = tl.load(x + row[:, None] * x_row + n[None, :], inside, 0.0).to(tl.float32) * by_row
        product = tl.load(grad + at, inside, 0.0).to(tl.float32)
        shares += product * normed
        product *= factor
        inner = tl.sum(product * normed, 1) / dim
        value = (product - normed * inner[:, None]) * by_row
        if ADD:
            value += tl.load(added + at, inside, 0.0).to(tl.float32)
        tl.store(grad_x + row[:, None] * grad_x_row + n[None, :], value.to(grad_x.dtype.element_ty), inside)
    tl.store(parts + program.to(tl.int64) * dim + n, tl.sum(shares, 0), n < dim)


@kernel
def _column_sums(parts, out, num_parts, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, num_parts, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < num_parts)[:, None] & (n < dim)[None, :]
        sums += tl.load(parts + row[:, None].to(tl.int64) * dim + n[None, :], inside, 0.0)
    tl.store(out + n, tl.sum(sums, 0).to(out.dtype.element_ty), n < dim)


def norm_forward(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(x + delta or x itself, its norm, 1 / root mean square of each row) of rows that may lie apart."""
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(out)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        tile = _tile(dim)
        _forward[(triton.cdiv(rows, tile["ROWS"]),)](
            x, x if delta is None else delta, weight, total, out, scale, eps, rows, dim, x.stride(0),
            ADD=delta is not None, **tile, PDL=PDL, **LAUNCH,
        )  # fmt: skip
    return total, out, scale


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(gradient of x, plus `added`; gradient of the weight). Rows of x and of `out`, where given, may lie apart."""
    rows, dim = x.shape
    grad_x = torch.empty(rows, dim, dtype=x.dtype, device=x.device) if out is None else out
    grad_weight = torch.zeros_like(weight) if not rows else torch.empty_like(weight)
    if not rows:
        return grad_x, grad_weight
    tile = _tile(dim)
    programs = min(triton.cdiv(rows, tile["ROWS"]), _PROGRAMS)
    parts = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        grad.contiguous(), x, weight, scale, grad if added is None else added.contiguous(), grad_x, parts, rows, dim,
        x.stride(0), grad_x.stride(0), ADD=added is not None, **tile, STAGES=_STAGES, PDL=PDL, **LAUNCH,
    )  # fmt: skip
    _column_sums[(triton.cdiv(dim, 32),)](
        parts, grad_weight, programs, dim, ROWS=32, BLOCK=32, PDL=PDL, num_warps=4, **LAUNCH
    )
    return grad_x, grad_weight


def _tile(dim: int) -> dict[str, int]:
    padded = triton.next_power_of_2(dim)
    return {
        "ROWS": max(1, min(16, _TILE // padded)), "BLOCK": padded, "num_warps": 4 if padded <= _TILE else 8,
    }  # fmt: skip


class _AddRMSNorm(torch.autograd.Function):
    """Both sums that end in a residual stream are made with the norm: its own, and that of its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        flat, dim = x.shape, x.shape[-1]
        total, out, scale = norm_forward(x.reshape(-1, dim), weight, eps, delta.reshape(-1, dim))
        ctx.save_for_backward(total, weight, scale)
        return total.view(flat), out.view(flat)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, scale = ctx.saved_tensors
        grad_total, grad = (each.reshape(total.shape) for each in grads)
        grad_x, grad_weight = norm_backward(grad, total, weight, scale, grad_total)
        grad_x = grad_x.view(grads[0].shape)
        return grad_x, grad_x, grad_weight, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat, out, scale = norm_forward(x.reshape(-1, x.shape[-1]), weight, eps)
        ctx.save_for_backward(flat, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = norm_backward(grads[0].reshape(x.shape), x, weight, scale)
        return grad_x.view(grads[0].shape), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def rms_norm_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return norm_refusal(x, weight)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x, delta, weight, eps)  # pyright: ignore[reportReturnType]


def add_rms_norm_supports(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.shape != delta.shape or not (x.is_contiguous() and delta.is_contiguous()):
        return f"it adds contiguous tensors of one shape, not {tuple(x.shape)} and {tuple(delta.shape)}"
    return norm_refusal(x, delta, weight)


def norm_refusal(*tensors: Tensor) -> str | None:
    """Why a norm with gradients cannot take these tensors, the weight last; or None."""
    if tensors[-1].shape[0] > _WIDEST:
        return f"it takes rows of at most {_WIDEST} numbers, not {tensors[-1].shape[0]}"
    return trained_refusal(*tensors)
