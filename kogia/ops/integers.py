"""Weights as 8-bit and 4-bit integers, in the layouts that compressed-tensors stores.

    int8   W[a, b] = q[a, b] * scale[a]                            q in -127..127, one float32 scale per row
    int4   W[a, b] = (u[a, b] - zero[a, b // g]) * scale[a, b // g]       u in 0..15, one bfloat16 scale per group

Byte j of an int4 row holds columns 2j (low nibble) and 2j + 1 (high). A symmetric weight has no zeros: they are 8.
"""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from kogia.ops.dispatch import op

GROUPS = (128, 64, 32)
"""Columns that share an int4 scale: the first of these that divides a row."""
SYMMETRIC_ZERO = 8
_INT8_MAX = 127
_INT4_MAX = 15
_SCALE_RANGE = 2.0**-126, 2.0**120  # normal in bfloat16, and 127 times the largest is finite
SHRINKS = 12
"""Scales that are tried for an int4 group, each by 1/32 of the first smaller than the one before: the ends of its range
may be cut off where the rest gains by it."""
_CHUNK = 1 << 22  # numbers quantised at a time: the float32 copies of a whole stack would not fit beside it


def group_size(in_features: int) -> int | None:
    """Columns per int4 scale in rows of this length, or None where no group divides them."""
    return next((size for size in GROUPS if in_features and in_features % size == 0), None)


def quantize_rows(weight: Float[Tensor, "*stack out in"]) -> tuple[Int8[Tensor, "*stack out in"], Tensor]:
    """(int8 codes, float32 scales [*stack, out, 1]): each row's largest magnitude maps to 127."""
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty((*weight.shape[:-1], 1), dtype=torch.float32, device=weight.device)
    rows, codes, scales = (each.view(-1, each.shape[-1]) for each in (weight.contiguous(), data, scale))
    for part in _parts(rows):
        numbers = rows[part].float()
        scales[part] = (numbers.abs().amax(-1, keepdim=True) / _INT8_MAX).clamp(*_SCALE_RANGE)
        codes[part] = (numbers / scales[part]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
    return data, scale


def dequantize_rows(
    data: Int8[Tensor, "*stack out in"], scale: Float[Tensor, "*stack out 1"], dtype: torch.dtype
) -> Float[Tensor, "*stack out in"]:
    """The dense weight; the product is taken in float32 and rounded once."""
    return data.float().mul_(scale).to(dtype)


@op(cuda=("kogia.ops.triton.integers",))
def quantize_nibbles(
    weight: Float[Tensor, "*stack out in"],
    *,
    asymmetric: bool = False,
    importance: Float[Tensor, " in"] | None = None,
    spread: Float[Tensor, "in in"] | None = None,
) -> tuple[UInt8[Tensor, "*stack out half"], Float[Tensor, "*stack out groups"], Tensor | None]:
    """(pairs of int4 codes, bfloat16 scales, zeros 0..15 where `asymmetric`).

    Of `SHRINKS` scales each group has the one with the least squared error, after its rounding to bfloat16;
    errors of column j count `importance[j]` times. With `spread` columns are rounded one after the other, and those
    behind make up for the error of each (GPTQ, arXiv 2210.17323, algorithm 1): it is the upper Cholesky factor of the
    inverse of E[x x^T], x being what the weight is multiplied with.
    Raises ValueError for rows that no group divides.
    """
    group = group_size(weight.shape[-1])
    if group is None:
        raise ValueError(f"int4 weights have rows of a multiple of {GROUPS[-1]} numbers, not {weight.shape[-1]}")
    *front, columns = weight.shape
    data = torch.empty((*front, columns // 2), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((*front, columns // group), dtype=torch.bfloat16, device=weight.device)
    zero = torch.empty(scale.shape, dtype=torch.uint8, device=weight.device) if asymmetric else None
    rows, codes, scales = (each.view(-1, each.shape[-1]) for each in (weight.contiguous(), data, scale))
    for part in _parts(rows):
        groups = rows[part].float().unflatten(-1, (-1, group))
        weights = None if importance is None else importance.view(-1, group)
        if spread is None:
            best, at = _best_scales(groups, asymmetric, weights)
            u = _codes(groups, best, at).flatten(-2).to(torch.uint8)
        else:
            best, at, u = _made_up_for(groups, asymmetric, weights, spread)
        codes[part] = u[:, ::2] | u[:, 1::2] << 4
        scales[part] = best
        if zero is not None:
            zero.view_as(scales)[part] = at.to(torch.uint8)
    return data, scale, zero


def dequantize_nibbles(
    data: UInt8[Tensor, "*stack out half"],
    scale: Float[Tensor, "*stack out groups"],
    zero: UInt8[Tensor, "*stack out groups"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*stack out in"]:
    """The dense weight; the product is taken in float32 and rounded once."""
    u = torch.stack((data & 15, data >> 4), -1).flatten(-2)
    groups = u.unflatten(-1, (scale.shape[-1], -1)).float()
    groups.sub_(SYMMETRIC_ZERO if zero is None else zero.float()[..., None])
    return groups.mul_(scale.float()[..., None]).flatten(-2).to(dtype)


def _parts(rows: Float[Tensor, "rows in"]) -> list[slice]:
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def _best_scales(
    groups: Float[Tensor, "rows groups g"], asymmetric: bool, importance: Float[Tensor, "groups g"] | None
) -> tuple[Tensor, Tensor]:
    """(bfloat16 scale, zero as float32) of every group, [rows, groups]."""
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    least, best, best_zero = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)
    for i in range(SHRINKS):
        shrink = 1 - i / 32
        scale, zero = _scale_and_zero(low * shrink, high * shrink, asymmetric)
        error = _codes(groups, scale, zero).sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups)
        error = error.square_() if importance is None else error.square_().mul_(importance)
        error = error.sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
    return best.bfloat16(), best_zero


def _made_up_for(
    groups: Float[Tensor, "rows groups g"],
    asymmetric: bool,
    importance: Float[Tensor, "groups g"] | None,
    spread: Float[Tensor, "in in"],
) -> tuple[Tensor, Tensor, UInt8[Tensor, "rows in"]]:
    """(scales, zeros, codes) of columns that are rounded in turn: each group's scale is chosen when its turn comes."""
    rows, num_groups, group = groups.shape
    left = groups.flatten(1).T.contiguous()  # a column of the weight is a row here, which lies together
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    scales = torch.empty(rows, num_groups, dtype=torch.bfloat16, device=left.device)
    zeros = torch.empty(rows, num_groups, device=left.device)
    for i in range(num_groups):
        start, stop = i * group, (i + 1) * group
        part, errors = left[start:stop], torch.empty(group, rows, device=left.device)
        weights = None if importance is None else importance[i : i + 1]
        best, at = _best_scales(part.T[:, None], asymmetric, weights)
        scales[:, i], zeros[:, i] = best[:, 0], at[:, 0]
        scale, zero = best.float()[:, 0], at[:, 0]
        for j in range(group):
            column, row = part[j], spread[start + j, start:stop]
            code = torch.addcdiv(zero, column, scale).round_().clamp_(0, _INT4_MAX)
            codes[start + j] = code
            errors[j] = column.sub(code.sub_(zero).mul_(scale)).div_(row[j])
            part[j + 1 :].addr_(row[j + 1 :], errors[j], alpha=-1)
        left[stop:].addmm_(spread[start:stop, stop:].T, errors, alpha=-1)
    return scales, zeros, codes.T


def _scale_and_zero(low: Tensor, high: Tensor, asymmetric: bool) -> tuple[Tensor, Tensor]:
    """Those that map low..high, which holds 0, to the codes; the scale is one of bfloat16's numbers."""
    if asymmetric:
        scale = (high / _INT4_MAX - low / _INT4_MAX).clamp(*_SCALE_RANGE).bfloat16().float()
        return scale, (-low / scale).round_().clamp_(0, _INT4_MAX)
    scale = (torch.maximum(high, -low) / (_INT4_MAX - SYMMETRIC_ZERO)).clamp(*_SCALE_RANGE).bfloat16().float()
    return scale, torch.full_like(scale, SYMMETRIC_ZERO)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor) -> Float[Tensor, "rows groups g"]:
    """The nearest codes, as float32."""
    return (groups / scale.float()[..., None]).round_().add_(zero[..., None]).clamp_(0, _INT4_MAX)
