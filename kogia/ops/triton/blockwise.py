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

from kogia.ops.blockwise import Blocks, Forms, Routed, Rows
from kogia.ops.triton.common import INTERPRETED, LAUNCH, PDL, cdiv, kernel, refusal, rows_refusal, wait_for_inputs
from kogia.ops.triton.experts import weighted_silu_mul_backward, weighted_silu_mul_backward_supports
from kogia.ops.triton.grouped import planned

_GROUP = tl.constexpr(128)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODE = torch.float8_e4m3fn
_REGISTERS = 80
"""Of a thread that turns a tile, at most: of 256 threads each, three programs have room on a multiprocessor."""


@kernel
def _magnitude(x):
    """|x| as an integer that is ordered as it is, infinity behind all numbers and NaN behind infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@kernel
def _scale(largest, POWERS: tl.constexpr):
    """The scale that maps a largest magnitude to 448, or the power of two above it; 1 for zero."""
    largest = largest.to(tl.float32, bitcast=True)
    scale = largest / 448.0
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # NaN stays
    scale = tl.where(largest == 0, 1.0, scale)
    if POWERS:  # a mantissa that is not zero carries into the exponent, and NaN would carry into the sign
        power = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = power + (scale - scale)
    return scale


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
    by_row = _scale(tl.max(_magnitude(x), 1), POWERS)
    tl.store(codes, _codes(x * (1.0 / by_row)[:, None], INTERPRET), there[:, None])
    tl.store(scale, by_row, there)


@kernel
def _quantize_rows(
    x, codes, scale, num_rows, width, x_row, padded, ROWS: tl.constexpr, POWERS: tl.constexpr,
    INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = group * _GROUP + tl.arange(0, _GROUP)
    there, inside = row < num_rows, column < width
    numbers = tl.load(x + row[:, None] * x_row + column[None, :], there[:, None] & inside[None, :], 0.0).to(tl.float32)
    to = codes + row[:, None] * padded + column[None, :]
    _to_rows(numbers, to, scale + group.to(tl.int64) * num_rows + row, there, POWERS, INTERPRET)


@kernel
def _one_in_four(numbers, largest, codes, there, BY_ROW: tl.constexpr, POWERS: tl.constexpr, INTERPRET: tl.constexpr):
    """Write one of every four rows of a tile, if `BY_ROW`; returns the larger of each magnitude and `largest`, and the
    scales of the rows."""
    wide = numbers.to(tl.float32)
    by_row = _scale(tl.max(_magnitude(wide), 1), POWERS)
    if BY_ROW:
        tl.store(codes, _codes(wide * (1.0 / by_row)[:, None], INTERPRET), there[:, None])
    return tl.maximum(largest, tl.abs(wide), propagate_nan=tl.PropagateNan.ALL), by_row


@kernel
def _byte(numbers, factor, INTERPRET: tl.constexpr):
    return _codes(numbers.to(tl.float32) * factor, INTERPRET).to(tl.uint8, bitcast=True).to(tl.int32)


@kernel
def _quantize_columns(
    x, codes, scale, turned, turned_scale, num_rows, width, x_row, padded, padded_rows,
    BY_ROW: tl.constexpr, POWERS: tl.constexpr, TURNED_POWERS: tl.constexpr, INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile of 128 x 128, by column and also by row. A thread has four neighbours of a column, whose codes are turned
    as one word; the numbers are read again from the cache, so that three tiles fit on a multiprocessor at a time."""
    wait_for_inputs(PDL)
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    quad = tl.arange(0, _GROUP // 4)
    row, column = block * _GROUP + 4 * quad, group * _GROUP + tl.arange(0, _GROUP)
    inside = column < width
    there0, there1, there2, there3 = row < num_rows, row + 1 < num_rows, row + 2 < num_rows, row + 3 < num_rows
    at = x + row[:, None] * x_row + column[None, :]
    x0 = tl.load(at, there0[:, None] & inside[None, :], 0.0)
    x1 = tl.load(at + x_row, there1[:, None] & inside[None, :], 0.0)
    x2 = tl.load(at + 2 * x_row, there2[:, None] & inside[None, :], 0.0)
    x3 = tl.load(at + 3 * x_row, there3[:, None] & inside[None, :], 0.0)
    to, largest = codes + row[:, None] * padded + column[None, :], tl.zeros((_GROUP // 4, _GROUP), tl.float32)
    largest, scale0 = _one_in_four(x0, largest, to, there0, BY_ROW, POWERS, INTERPRET)
    largest, scale1 = _one_in_four(x1, largest, to + padded, there1, BY_ROW, POWERS, INTERPRET)
    largest, scale2 = _one_in_four(x2, largest, to + 2 * padded, there2, BY_ROW, POWERS, INTERPRET)
    largest, scale3 = _one_in_four(x3, largest, to + 3 * padded, there3, BY_ROW, POWERS, INTERPRET)
    if BY_ROW:
        scales = tl.reshape(tl.join(tl.join(scale0, scale2), tl.join(scale1, scale3)), (_GROUP,))
        every = block * _GROUP + tl.arange(0, _GROUP)
        tl.store(scale + group.to(tl.int64) * num_rows + every, scales, every < num_rows)
    by_column = _scale(tl.max(_magnitude(largest), 0), TURNED_POWERS)
    factor = (1.0 / by_column)[None, :]
    if BY_ROW:
        x0 = tl.load(at, there0[:, None] & inside[None, :], 0.0)
        x1 = tl.load(at + x_row, there1[:, None] & inside[None, :], 0.0)
        x2 = tl.load(at + 2 * x_row, there2[:, None] & inside[None, :], 0.0)
        x3 = tl.load(at + 3 * x_row, there3[:, None] & inside[None, :], 0.0)
    low = _byte(x0, factor, INTERPRET) | (_byte(x1, factor, INTERPRET) << 8)
    words = low | (_byte(x2, factor, INTERPRET) << 16) | (_byte(x3, factor, INTERPRET) << 24)
    to = turned.to(tl.pointer_type(tl.int32)) + column.to(tl.int64)[:, None] * (padded_rows // 4)
    tl.store(to + (block * (_GROUP // 4) + quad)[None, :], tl.trans(words), inside[:, None])
    tl.store(turned_scale + block * width + column, by_column, inside)


@kernel
def _quantize_routed(
    x, places, tiles, codes, scale, width, x_row, padded_rows,
    GATHER: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of 128 rows of one expert and 128 columns, by column, as `_quantize_columns` turns them."""
    wait_for_inputs(PDL)
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if block < tl.load(tiles):
        start, end = tl.load(tiles + 2 + 3 * block), tl.load(tiles + 3 + 3 * block)
        quad, column = tl.arange(0, _GROUP // 4), group * _GROUP + tl.arange(0, _GROUP)
        inside = (column < width)[None, :]
        row = start + 4 * quad
        x0 = _routed_rows(x, places, row, end, column, inside, x_row, GATHER)
        x1 = _routed_rows(x, places, row + 1, end, column, inside, x_row, GATHER)
        x2 = _routed_rows(x, places, row + 2, end, column, inside, x_row, GATHER)
        x3 = _routed_rows(x, places, row + 3, end, column, inside, x_row, GATHER)
        largest = tl.maximum(_most(x0, x1), _most(x2, x3), propagate_nan=tl.PropagateNan.ALL)
        by_column = _scale(tl.max(_magnitude(largest), 0), False)
        factor = (1.0 / by_column)[None, :]
        low = _byte(x0, factor, INTERPRET) | (_byte(x1, factor, INTERPRET) << 8)
        words = low | (_byte(x2, factor, INTERPRET) << 16) | (_byte(x3, factor, INTERPRET) << 24)
        to = codes.to(tl.pointer_type(tl.int32)) + column.to(tl.int64)[:, None] * (padded_rows // 4)
        tl.store(to + (block * (_GROUP // 4) + quad)[None, :], tl.trans(words), (column < width)[:, None])
        tl.store(scale + block * width + column, by_column, column < width)


@kernel
def _routed_rows(x, places, row, end, column, inside, x_row, GATHER: tl.constexpr):
    there = row < end
    at = tl.load(places + row, there, 0).to(tl.int64) if GATHER else row.to(tl.int64)
    return tl.load(x + at[:, None] * x_row + column[None, :], there[:, None] & inside, 0.0)


@kernel
def _most(a, b):
    a, b = tl.abs(a.to(tl.float32)), tl.abs(b.to(tl.float32))
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
    factor = _scale(tl.max(tl.max(_magnitude(numbers), 1), 0), False)
    values = _codes(numbers * (1.0 / factor), INTERPRET)
    to = codes + matrix * rows * padded + row.to(tl.int64)[:, None] * padded + column[None, :]
    tl.store(to, values, there[:, None])
    to = turned + matrix * width * padded_rows + column.to(tl.int64)[:, None] * padded_rows + row[None, :]
    tl.store(to, tl.trans(values), inside[:, None])
    tl.store(scale + (matrix * tl.num_programs(1) + block) * groups + group, factor)
    tl.store(turned_scale + (matrix * tl.num_programs(2) + group) * row_groups + block, factor)


def quantize_rows(x: Tensor, *, power_of_two: bool = False) -> Rows:
    rows, (height, width) = _empty_rows(*x.shape, x.device), x.shape
    _quantize_rows[(cdiv(height, 32), cdiv(width, 128))](
        x, rows.codes, rows.scale, height, width, x.stride(0), rows.codes.shape[1], ROWS=32, POWERS=power_of_two,
        INTERPRET=INTERPRETED, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return rows


def quantize_columns(x: Tensor, *, power_of_two: bool = False) -> Rows:
    return _turned(x, None, power_of_two)


def quantize_both(x: Tensor, *, power_of_two: bool = False) -> tuple[Rows, Rows]:
    rows = _empty_rows(*x.shape, x.device)
    return rows, _turned(x, rows, power_of_two)


def _turned(x: Tensor, rows: Rows | None, power_of_two: bool) -> Rows:
    """The rows of x^T; and those of x, where they are wanted."""
    (height, width), turned = x.shape, _empty_rows(x.shape[1], x.shape[0], x.device)
    one = turned if rows is None else rows
    _quantize_columns[(cdiv(height, 128), cdiv(width, 128))](
        x, one.codes, one.scale, turned.codes, turned.scale, height, width, x.stride(0), one.codes.shape[1],
        turned.codes.shape[1], BY_ROW=rows is not None, POWERS=power_of_two,
        TURNED_POWERS=power_of_two and rows is None, INTERPRET=INTERPRETED, PDL=PDL, num_warps=8, maxnreg=_REGISTERS,
        **LAUNCH,
    )  # fmt: skip
    return turned


def quantize_routed_columns(x: Tensor, places: Tensor | None, counts: Tensor) -> Routed:
    rows, width = len(x) if places is None else len(places), x.shape[1]
    tiles, firsts, most = planned(counts, rows, 128)
    out = _empty_rows(width, 128 * most, x.device)
    _quantize_routed[(most, cdiv(width, 128))](
        x, x if places is None else places, tiles, out.codes, out.scale, width, x.stride(0), 128 * most,
        GATHER=places is not None, INTERPRET=INTERPRETED, PDL=PDL, num_warps=8, maxnreg=_REGISTERS, **LAUNCH,
    )  # fmt: skip
    return Routed(out, firsts)


def quantize_routed_columns_supports(x: Tensor, places: Tensor | None, counts: Tensor) -> str | None:
    if places is not None and (reason := refusal(places, dtypes=(torch.int64,))):
        return reason
    return quantize_rows_supports(x) or refusal(counts, dtypes=(torch.int64,))


def _empty_rows(rows: int, width: int, device: torch.device) -> Rows:
    groups = -(-width // 128)
    codes = torch.empty(rows, groups * 128, dtype=_CODE, device=device)
    return Rows(codes, torch.empty(groups, rows, dtype=torch.float32, device=device))


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
