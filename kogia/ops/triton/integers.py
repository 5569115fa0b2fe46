"""Rounding weights to int4: every scale that is tried for a group is tried in registers, so that a weight is read once.
Plain PyTorch takes some hundred passes."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.integers import SHRINKS, group_size
from kogia.ops.triton.common import DTYPES, LAUNCH, PDL, cdiv, kernel, refusal, wait_for_inputs

_LEAST_SCALE, _MOST_SCALE = tl.constexpr(2.0**-126), tl.constexpr(2.0**120)
_EVEN = tl.constexpr(1.5 * 2**23)


@kernel
def _nearest(x):
    """The nearest whole number, of two the even one, of a number below 2^22."""
    return (x + _EVEN) - _EVEN


@kernel
def _codes(x, scale, zero):
    return tl.clamp(_nearest(tl.div_rn(x, scale[:, None])) + zero[:, None], 0.0, 15.0)


@kernel
def _scale_and_zero(low, high, ASYMMETRIC: tl.constexpr):
    if ASYMMETRIC:
        most = tl.full(high.shape, 15.0, tl.float32)
        wide = tl.div_rn(high, most) - tl.div_rn(low, most)
    else:
        wide = tl.div_rn(tl.maximum(high, -low), tl.full(high.shape, 7.0, tl.float32))
    bits = tl.clamp(wide, _LEAST_SCALE, _MOST_SCALE).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # the nearest of bfloat16's numbers, of two the even one
    scale = bits.to(tl.float32, bitcast=True)
    if ASYMMETRIC:
        zero = tl.clamp(_nearest(tl.div_rn(-low, scale)), 0.0, 15.0)
    else:
        zero = tl.full(scale.shape, 8.0, tl.float32)
    return scale, zero


@kernel
def _quantize(
    weight, importance, data, scales, zeros, num_rows, in_row,
    GROUP: tl.constexpr, ASYMMETRIC: tl.constexpr, WEIGHTED: tl.constexpr, SHRINKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`num_rows` groups, of which a row of the weight has `in_row`."""
    wait_for_inputs(PDL)
    g = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, there = tl.arange(0, GROUP), g < num_rows
    x = tl.load(weight + g[:, None] * GROUP + c[None, :], there[:, None], 0.0).to(tl.float32)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    best, zero = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(SHRINKS):
        scale, at = _scale_and_zero(low * (1 - i / 32), high * (1 - i / 32), ASYMMETRIC)
        error = (_codes(x, scale, at) - at[:, None]) * scale[:, None] - x
        error = error * error
        if WEIGHTED:
            error = error * tl.load(importance + (g % in_row)[:, None] * GROUP + c[None, :], there[:, None], 0.0)
        total = tl.sum(error, 1)
        better = total < least
        least, best, zero = tl.where(better, total, least), tl.where(better, scale, best), tl.where(better, at, zero)
    u = _codes(x, best, zero).to(tl.int32)
    even, odd = tl.split(tl.reshape(u, (BLOCK, GROUP // 2, 2)))
    half = g[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(data + half, (even | (odd << 4)).to(tl.uint8), there[:, None])
    tl.store(scales + g, best.to(tl.bfloat16), there)
    if ASYMMETRIC:
        tl.store(zeros + g, zero.to(tl.uint8), there)


def quantize_nibbles(
    weight: Tensor, *, asymmetric: bool = False, importance: Tensor | None = None, spread: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One launch."""
    assert spread is None, "see quantize_nibbles_supports"
    *front, columns = weight.shape
    group = group_size(columns)
    assert group is not None, "see quantize_nibbles_supports"
    data = torch.empty((*front, columns // 2), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((*front, columns // group), dtype=torch.bfloat16, device=weight.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=weight.device) if asymmetric else None
    weighed = scale if importance is None else importance.float().contiguous()
    _quantize[(cdiv(scale.numel(), _BLOCK),)](
        weight, weighed, data, scale, data if zero is None else zero, scale.numel(), columns // group,
        GROUP=group, ASYMMETRIC=asymmetric, WEIGHTED=importance is not None, SHRINKS=SHRINKS, BLOCK=_BLOCK, PDL=PDL,
        num_warps=4, enable_fp_fusion=False, **LAUNCH,
    )  # fmt: skip
    return data, scale, zero


_BLOCK = 16


def quantize_nibbles_supports(
    weight: Tensor, *, asymmetric: bool = False, importance: Tensor | None = None, spread: Tensor | None = None
) -> str | None:
    if spread is not None:
        return "it rounds all columns at once, and errors are made up for one column after the other"
    if group_size(weight.shape[-1]) is None:
        return "no group divides its rows"
    return refusal(weight, dtypes=(*DTYPES, torch.float32))
