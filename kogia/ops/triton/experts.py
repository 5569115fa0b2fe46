"""What stands around the grouped products of experts in training: each a single pass over rows of token copies."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import (
    LAUNCH,
    PDL,
    cdiv,
    kernel,
    next_power_of_2,
    refusal,
    trained_refusal,
    wait_for_inputs,
)

_TILE = 2048
"""Numbers of gate, and as many of up, that a program takes at a time."""
_WIDEST = 16384


@kernel
def _forward(both, weights, out, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (n < width)[None, :]
    at = both + row[:, None] * (2 * width) + n[None, :]
    g, u = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + width, inside, 0.0).to(tl.float32)
    w = tl.load(weights + row, row < num_rows, 0.0)
    value = g / (1.0 + tl.exp(-g)) * u * w[:, None]
    tl.store(out + row[:, None] * width + n[None, :], value.to(out.dtype.element_ty), inside)


def weighted_silu_mul(both: Tensor, weights: Tensor) -> Tensor:
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width, dtype=both.dtype, device=both.device)
    tile = _tile(width)
    _forward[(cdiv(rows, tile["ROWS"]),)](both, weights, out, rows, width, **tile, PDL=PDL, **LAUNCH)
    return out


def weighted_silu_mul_supports(both: Tensor, weights: Tensor) -> str | None:
    if both.shape[1] > 2 * _WIDEST:
        return f"it takes experts of at most {_WIDEST} numbers, not {both.shape[1] // 2}"
    return refusal(both) or refusal(weights, dtypes=(torch.float32,))


@kernel
def _backward(
    grad, both, weights, grad_both, grad_weights, out, num_rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (n < width)[None, :]
    wide, narrow = row[:, None] * (2 * width) + n[None, :], row[:, None] * width + n[None, :]
    g, u = tl.load(both + wide, inside, 0.0).to(tl.float32), tl.load(both + width + wide, inside, 0.0).to(tl.float32)
    d = tl.load(grad + narrow, inside, 0.0).to(tl.float32)
    w = tl.load(weights + row, row < num_rows, 0.0)[:, None]
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    activated = g * sigmoid
    product, weighted = activated * u, d * w
    grad_gate = weighted * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_both + wide, grad_gate.to(out.dtype.element_ty), inside)
    tl.store(grad_both + width + wide, (weighted * activated).to(out.dtype.element_ty), inside)
    tl.store(grad_weights + row, tl.sum(d * product, 1), row < num_rows)
    tl.store(out + narrow, (product * w).to(out.dtype.element_ty), inside)


def weighted_silu_mul_backward(grad: Tensor, both: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = grad.shape
    grad_both, grad_weights, out = torch.empty_like(both), torch.empty_like(weights), torch.empty_like(grad)
    tile = _tile(width)
    _backward[(cdiv(rows, tile["ROWS"]),)](
        grad, both, weights, grad_both, grad_weights, out, rows, width, **tile, PDL=PDL, **LAUNCH
    )
    return grad_both, grad_weights, out


def weighted_silu_mul_backward_supports(grad: Tensor, both: Tensor, weights: Tensor) -> str | None:
    return weighted_silu_mul_supports(both, weights) or refusal(grad, both)


@kernel
def _silu_mul(
    gate, up, out, num_rows, width, gate_row, up_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (n < width)[None, :]
    g = tl.load(gate + row[:, None] * gate_row + n[None, :], inside, 0.0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_row + n[None, :], inside, 0.0)
    value = (g / (1.0 + tl.exp(-g))).to(u.dtype) * u  # rounded twice, as the reference is
    tl.store(out + row[:, None] * width + n[None, :], value, inside)


@kernel
def _silu_mul_backward(
    grad, gate, up, grad_gate, grad_up, num_rows, width, gate_row, up_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (n < width)[None, :]
    at = row[:, None] * width + n[None, :]
    d = tl.load(grad + at, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row[:, None] * gate_row + n[None, :], inside, 0.0).to(tl.float32)
    u = tl.load(up + row[:, None] * up_row + n[None, :], inside, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    of_gate = d * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), inside)
    tl.store(grad_up + at, (d * g * sigmoid).to(grad_up.dtype.element_ty), inside)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        rows, width = gate.shape
        ctx.save_for_backward(gate, up)
        out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
        if out.numel():
            grid, tile = _narrow(rows, width)
            _silu_mul[grid](gate, up, out, rows, width, gate.stride(0), up.stride(0), **tile, PDL=PDL, **LAUNCH)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        rows, width = gate.shape
        grad_gate, grad_up = (torch.empty(rows, width, dtype=gate.dtype, device=gate.device) for _ in range(2))
        if grad_up.numel():
            grid, tile = _narrow(rows, width)
            _silu_mul_backward[grid](
                grads[0].contiguous(), gate, up, grad_gate, grad_up, rows, width, gate.stride(0), up.stride(0),
                **tile, PDL=PDL, **LAUNCH,
            )  # fmt: skip
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """One pass forward, one backward, which computes the sigmoid again."""
    return _SiluMul.apply(gate, up)  # pyright: ignore[reportReturnType]


def silu_mul_supports(gate: Tensor, up: Tensor) -> str | None:
    return trained_refusal(gate, up)


def _narrow(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs that share out rows of any width, and the tile of each."""
    columns = min(1024, next_power_of_2(width))
    tile = {"ROWS": _TILE // columns, "WIDTH": columns, "num_warps": 4}
    return (cdiv(rows, tile["ROWS"]), cdiv(width, columns)), tile


def _tile(width: int) -> dict[str, int]:
    padded = next_power_of_2(width)
    return {"ROWS": max(1, _TILE // padded), "WIDTH": padded, "num_warps": 4 if padded <= _TILE else 8}


@kernel
def _sum(y, inverse, out, dim, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(inverse + token * K + choice).to(tl.int64)
        total += tl.load(y + row * dim + n, inside, 0.0).to(tl.float32)
    tl.store(out + token * dim + n, total.to(out.dtype.element_ty), inside)


def sum_copies(y: Tensor, inverse: Tensor, topk: int) -> Tensor:
    tokens, dim = inverse.shape[0] // topk, y.shape[1]
    out = torch.empty(tokens, dim, dtype=y.dtype, device=y.device)
    block = min(_TILE, next_power_of_2(dim))
    _sum[(tokens, cdiv(dim, block))](
        y, inverse, out, dim, K=topk, BLOCK=block, PDL=PDL, num_warps=4 if block > 512 else 2, **LAUNCH
    )
    return out


def sum_copies_supports(y: Tensor, inverse: Tensor, topk: int) -> str | None:
    return refusal(y) or refusal(inverse, dtypes=(torch.int64,))
