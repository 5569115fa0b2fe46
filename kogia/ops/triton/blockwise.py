"""Rounding to FP8 for products of training, each a single pass: by row, by column, by block, and behind SwiGLU.

A group with a number that is not finite gets a scale that is not: what comes out of any product with it is not finite
either, and the step is found bad.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import math

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.blockwise import Blocks, Forms, Rows
from kogia.ops.triton.common import INTERPRETED, LAUNCH, PDL, cdiv, kernel, refusal, rows_refusal, wait_for_inputs
from kogia.ops.triton.experts import weighted_silu_mul_backward, weighted_silu_mul_backward_supports

_GROUP = tl.constexpr(128)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODE = torch.float8_e4m3fn


@kernel
def _scale_of(x, AXIS: tl.constexpr, POWERS: tl.constexpr):
    """The scale that maps the largest magnitude along an axis to 448, or the power of two above it; 1 for zeros."""
    largest = tl.max(tl.abs(x), AXIS)
    scale = tl.where(largest > 0, tl.maximum(largest / 448.0, 1.1754943508222875e-38), 1.0)
    if POWERS:  # a mantissa that is not zero carries into the exponent
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale + tl.sum(x * 0.0, AXIS)


@kernel
def _codes(x, INTERPRET: tl.constexpr):
    """The nearest E4M3 numbers. The interpreter's own cast goes wrong where rounding carries into the exponent, so that
    there numbers are rounded before: in float32, by adding what leaves them as many bits as E4M3 has."""
    if INTERPRET:
        exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
        carry = ((exponent - 3) << 23).to(tl.float32, bitcast=True) * 12582912.0
        x = (x + carry) - carry
    return x.to(tl.float8e4nv)


@kernel
def _to_rows(x, codes, scale, there, POWERS: tl.constexpr, INTERPRET: tl.constexpr):
    """Write a tile of one group of each row to `codes`, and its scales."""
    by_row = _scale_of(x, 1, POWERS)
    tl.store(codes, _codes(x / by_row[:, None], INTERPRET), there[:, None])
    tl.store(scale, by_row, there)


@kernel
def _quantize(
    x, codes, scale, turned, turned_scale, num_rows, width, x_row, padded, padded_rows,
    ROWS: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, POWERS: tl.constexpr,
    TURNED_POWERS: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    block, group = tl.program_id(0), tl.program_id(1)
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = group * _GROUP + tl.arange(0, _GROUP)
    there, inside = row < num_rows, column < width
    numbers = tl.load(x + row[:, None] * x_row + column[None, :], there[:, None] & inside[None, :], 0.0).to(tl.float32)
    if BY_ROW:
        to = codes + row[:, None] * padded + column[None, :]
        _to_rows(numbers, to, scale + group.to(tl.int64) * num_rows + row, there, POWERS, INTERPRET)
    if BY_COLUMN:  # ROWS is a group
        by_column = _scale_of(numbers, 0, TURNED_POWERS)
        at = turned + column.to(tl.int64)[:, None] * padded_rows + row[None, :]
        values = tl.trans(_codes(numbers / by_column[None, :], INTERPRET))
        tl.store(at, values, inside[:, None])
        tl.store(turned_scale + block.to(tl.int64) * width + column, by_column, inside)


@kernel
def _quantize_blocks(
    x, codes, scale, turned, turned_scale, rows, width, padded, padded_rows, groups, row_groups,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One 128 x 128 block of one matrix of a stack, and its transpose."""
    wait_for_inputs(PDL)
    matrix, block, group = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = block * _GROUP + tl.arange(0, _GROUP)
    column = group * _GROUP + tl.arange(0, _GROUP)
    there, inside = row < rows, column < width
    at = x + matrix * rows * width + row.to(tl.int64)[:, None] * width + column[None, :]
    numbers = tl.load(at, there[:, None] & inside[None, :], 0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(numbers), 1), 0)
    factor = tl.where(largest > 0, tl.maximum(largest / 448.0, 1.1754943508222875e-38), 1.0)
    factor += tl.sum(tl.sum(numbers * 0.0, 1), 0)
    values = _codes(numbers / factor, INTERPRET)
    to = codes + matrix * rows * padded + row.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(to, values, there[:, None])
    to = turned + matrix * width * padded_rows + column.to(tl.int64)[:, None] * padded_rows + row[None, :]
    tl.store(to, tl.trans(values), inside[:, None])
    tl.store(scale + (matrix * tl.num_programs(1) + block) * groups + group, factor)
    tl.store(turned_scale + (matrix * tl.num_programs(2) + group) * row_groups + block, factor)


def quantize_rows(x: Tensor, *, power_of_two: bool = False) -> Rows:
    rows = _empty_rows(*x.shape, x.device)
    _launch(x, rows, None, power_of_two)
    return rows


def quantize_columns(x: Tensor, *, power_of_two: bool = False) -> Rows:
    turned = _empty_rows(x.shape[1], x.shape[0], x.device)
    _launch(x, None, turned, power_of_two)
    return turned


def quantize_both(x: Tensor, *, power_of_two: bool = False) -> tuple[Rows, Rows]:
    rows, turned = _empty_rows(*x.shape, x.device), _empty_rows(x.shape[1], x.shape[0], x.device)
    _launch(x, rows, turned, power_of_two)
    return rows, turned


def _empty_rows(rows: int, width: int, device: torch.device) -> Rows:
    groups = -(-width // 128)
    codes = torch.empty(rows, groups * 128, dtype=_CODE, device=device)
    return Rows(codes, torch.empty(groups, rows, dtype=torch.float32, device=device))


def _launch(x: Tensor, rows: Rows | None, turned: Rows | None, power_of_two: bool) -> None:
    height, width = x.shape
    one, two = rows or turned, turned or rows
    assert one is not None and two is not None, "one of the two is wanted"
    tile = 128 if turned else 32
    _quantize[(cdiv(height, tile), cdiv(width, 128))](
        x, one.codes, one.scale, two.codes, two.scale, height, width, x.stride(0), one.codes.shape[1],
        two.codes.shape[1], ROWS=tile, BY_ROW=rows is not None, BY_COLUMN=turned is not None, POWERS=power_of_two,
        TURNED_POWERS=power_of_two and rows is None, INTERPRET=INTERPRETED, PDL=PDL,
        num_warps=8 if turned else 4, **LAUNCH,
    )  # fmt: skip


def quantize_rows_supports(x: Tensor, *, power_of_two: bool = False) -> str | None:
    return _chip_refusal(x) or rows_refusal(x, dtypes=_DTYPES)


quantize_columns_supports = quantize_both_supports = quantize_rows_supports


def _chip_refusal(x: Tensor) -> str | None:
    if not INTERPRETED and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "FP8 needs compute capability 8.9"
    return None


def quantize_weight(weight: Tensor) -> Forms:
    *stack, rows, width = weight.shape
    forward, backward = (_empty_blocks(stack, *shape, weight.device) for shape in ((rows, width), (width, rows)))
    _quantize_blocks[(math.prod(stack), cdiv(rows, 128), cdiv(width, 128))](
        weight, forward.codes, forward.scale, backward.codes, backward.scale, rows, width, forward.codes.shape[-1],
        backward.codes.shape[-1], forward.scale.shape[-1], backward.scale.shape[-1],
        INTERPRET=INTERPRETED, PDL=PDL, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return Forms(forward, backward)


def _empty_blocks(stack: list[int], rows: int, width: int, device: torch.device) -> Blocks:
    blocks, groups = -(-rows // 128), -(-width // 128)
    codes = torch.empty(*stack, rows, groups * 128, dtype=_CODE, device=device)
    return Blocks(codes, torch.zeros(*stack, blocks, groups + -groups % 4, dtype=torch.float32, device=device))


def quantize_weight_supports(weight: Tensor) -> str | None:
    return _chip_refusal(weight) or refusal(weight, dtypes=_DTYPES)


@kernel
def _activated(both, row, n, inside, width):
    """gate, up and silu(gate)'s sigmoid of a tile, in float32."""
    at = both + row[:, None] * (2 * width) + n[None, :]
    g, u = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + width, inside, 0.0).to(tl.float32)
    return g, u, 1.0 / (1.0 + tl.exp(-g))


@kernel
def _silu_rows(
    both, weights, codes, scale, num_rows, width, padded, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, there = tl.program_id(1), row < num_rows
    n = group * _GROUP + tl.arange(0, _GROUP)
    g, u, sigmoid = _activated(both, row, n, there[:, None] & (n < width)[None, :], width)
    product = g * sigmoid * u
    if WEIGHTED:
        product *= tl.load(weights + row, there, 0.0)[:, None]
    to = codes + row[:, None] * padded + n[None, :]
    at = scale + group.to(tl.int64) * num_rows + row
    _to_rows(product, to, at, there, False, INTERPRET)


def silu_mul_rows(both: Tensor) -> Rows:
    return _activated_rows(both, None)


def weighted_silu_mul_rows(both: Tensor, weights: Tensor) -> Rows:
    return _activated_rows(both, weights)


def _activated_rows(both: Tensor, weights: Tensor | None) -> Rows:
    rows, width = both.shape[0], both.shape[1] // 2
    out = _empty_rows(rows, width, both.device)
    _silu_rows[(cdiv(rows, 32), cdiv(width, 128))](
        both, both if weights is None else weights, out.codes, out.scale, rows, width, out.codes.shape[1], ROWS=32,
        WEIGHTED=weights is not None, INTERPRET=INTERPRETED, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def silu_mul_rows_supports(both: Tensor) -> str | None:
    return _chip_refusal(both) or refusal(both, dtypes=_DTYPES)


def weighted_silu_mul_rows_supports(both: Tensor, weights: Tensor) -> str | None:
    return _chip_refusal(both) or refusal(both, dtypes=_DTYPES) or refusal(weights, dtypes=(torch.float32,))


@kernel
def _silu_rows_backward(
    grad, both, weights, grad_both, grad_weights, hidden, codes, scale, num_rows, width,
    ROWS: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    w = tl.load(weights + row, there, 0.0)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    gate_scale = scale + row
    up_scale = gate_scale + (width // _GROUP).to(tl.int64) * num_rows
    for start in range(0, width, _GROUP):
        n = start + tl.arange(0, _GROUP)
        inside = there[:, None] & (n < width)[None, :]
        g, u, sigmoid = _activated(both, row, n, inside, width)
        narrow, wide = row[:, None] * width + n[None, :], row[:, None] * (2 * width) + n[None, :]
        d = tl.load(grad + narrow, inside, 0.0).to(tl.float32)
        product, weighted = g * sigmoid * u, d * w
        grad_gate = weighted * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        grad_up = weighted * g * sigmoid
        total += tl.sum(d * product, 1)
        tl.store(hidden + narrow, (product * w).to(hidden.dtype.element_ty), inside)
        tl.store(grad_both + wide, grad_gate.to(grad_both.dtype.element_ty), inside)
        tl.store(grad_both + width + wide, grad_up.to(grad_both.dtype.element_ty), inside)
        _to_rows(grad_gate, codes + wide, gate_scale, there, False, INTERPRET)
        _to_rows(grad_up, codes + width + wide, up_scale, there, False, INTERPRET)
        gate_scale += num_rows
        up_scale += num_rows
    tl.store(grad_weights + row, total, there)


def weighted_silu_mul_rows_backward(grad: Tensor, both: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Rows]:
    rows, width = grad.shape
    if width % 128:  # groups of the two halves are not apart
        grad_both, grad_weights, hidden = weighted_silu_mul_backward(grad, both, weights)
        return grad_both, grad_weights, hidden, quantize_rows(grad_both)
    grad_both, grad_weights, hidden = torch.empty_like(both), torch.empty_like(weights), torch.empty_like(grad)
    out = _empty_rows(rows, 2 * width, both.device)
    _silu_rows_backward[(cdiv(rows, 16),)](
        grad, both, weights, grad_both, grad_weights, hidden, out.codes, out.scale, rows, width,
        ROWS=16, INTERPRET=INTERPRETED, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return grad_both, grad_weights, hidden, out


def weighted_silu_mul_rows_backward_supports(grad: Tensor, both: Tensor, weights: Tensor) -> str | None:
    return weighted_silu_mul_rows_supports(both, weights) or weighted_silu_mul_backward_supports(grad, both, weights)
