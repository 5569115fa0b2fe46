"""Packed weights inside kernels: codes become operands of products in registers, exactly, in the dtype of the rows.

    int4   u - 8; even columns are the low, odd ones the high nibbles of a byte, so rows come in two halves and nothing
           is interleaved. A group's product times its scale joins the sum in float32
    fp8    E4M3; a block's product times its scale likewise
    int8   the whole sum is scaled

So a product is rounded less than one with the dense weight that `Packed.dense` makes.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.packed import Packed
from kogia.ops.triton.common import (
    DTYPES,
    INTERPRETED,
    LAUNCH,
    PDL,
    cdiv,
    kernel,
    next_power_of_2,
    refusal,
    wait_for_inputs,
)

BLOCK = 128
"""Numbers along a row that a program takes at a time; of int4 a group."""
Operand = tuple[Tensor, Tensor, Tensor, int, int]
"""A weight as kernels take it: data, scales and zeros, and the elements between rows of data and between rows of
scales. What there is not is never read; something stands there."""


def operand(weight: Tensor | Packed) -> Operand:
    if isinstance(weight, Tensor):
        return weight, weight, weight, weight.stride(-2), 0
    zero = weight.scale if weight.zero is None else weight.zero
    return weight.data, weight.scale, zero, weight.data.stride(-2), weight.scale.stride(-2)


def layout(weight: Tensor | Packed) -> dict[str, Any]:
    """The constants that tell kernels how to read an `Operand`."""
    name, group, zeros = kind(weight)
    return {
        "FORMAT": name,
        "ZEROS": zeros,
        "BLOCK_K": group or BLOCK,
        "INTERPRET": INTERPRETED,
    }


def kind(weight: Tensor | Packed) -> tuple[str, int, bool]:
    """(Format, numbers in a group of int4 or 0, whether there are zeros): alike, where kernels read two alike."""
    if isinstance(weight, Tensor):
        return "dense", 0, False
    group = 2 * weight.data.shape[-1] // weight.scale.shape[-1] if weight.format == "int4" else 0
    return weight.format, group, weight.zero is not None


def weight_refusal(weight: Tensor | Packed, dtype: torch.dtype) -> str | None:
    """Why kernels cannot read this weight for products with rows of a dtype, or None."""
    if isinstance(weight, Tensor):
        return refusal(weight, dtypes=(dtype,))
    if weight.format not in ("fp8", "int8", "int4"):
        return f"it takes weights stored as fp8, int8 or int4, not {weight.format}"
    group = kind(weight)[1]
    if group & (group - 1) or 0 < group < 32 or group > BLOCK:
        return f"it takes int4 groups of 32, 64 or 128 numbers, not {group}"
    return next(filter(None, map(_contiguous, (weight.data, weight.scale, weight.zero))), None)


def _contiguous(part: Tensor | None) -> str | None:
    if part is None or (part.is_contiguous() and part.numel()):
        return None
    return f"it takes contiguous weights, not strides {part.stride()} of shape {tuple(part.shape)}"


@kernel
def either(own, other, is_other):
    """One of two operands of the same layout."""
    data, scale = tl.where(is_other, other[0], own[0]), tl.where(is_other, other[1], own[1])
    zero, row = tl.where(is_other, other[2], own[2]), tl.where(is_other, other[3], own[3])
    return data, scale, zero, row, tl.where(is_other, other[4], own[4])


@kernel
def matrix(weight, index, rows, FORMAT: tl.constexpr):
    """The matrix `index` of a stack, of so many rows."""
    data, scale, zero, row, scale_row = weight
    data += index.to(tl.int64) * rows * row
    rows_of_scales = tl.cdiv(rows, 128) if FORMAT == "fp8" else rows
    skipped = index.to(tl.int64) * rows_of_scales * scale_row
    return data, scale + skipped, zero + skipped, row, scale_row


@kernel
def columns(weight, place, part, FORMAT: tl.constexpr):
    """A matrix from the `place`th of parts beside each other on, which are as wide as the operand `part`."""
    data, scale, zero, row, scale_row = weight
    data += place * part[3]
    if (FORMAT == "int4") | (FORMAT == "fp8"):
        scale += place * part[4]
        zero += place * part[4]
    return data, scale, zero, row, scale_row


@kernel
def rows_of(weight, n, FORMAT: tl.constexpr):
    """Where the rows `n` of a matrix begin: their data, scales and zeros."""
    data, scale, zero, row, scale_row = weight
    scales = (n // 128 if FORMAT == "fp8" else n) * scale_row
    return data + n * row, scale + scales, zero + scales


@kernel
def _across(v, SPLIT: tl.constexpr):
    """[n] as [1, n]; or as [1, 1, n] where a product has SPLIT parts."""
    return v[None, :] if SPLIT == 1 else v[None, None, :]


@kernel
def _along(v, SPLIT: tl.constexpr):
    """[n] as [n, 1]; or as [1, n, 1]."""
    return v[:, None] if SPLIT == 1 else v[None, :, None]


@kernel
def _parts(v, SPLIT: tl.constexpr):
    """One number as it is; or [SPLIT] as [SPLIT, 1, 1]."""
    return v if SPLIT == 1 else v[:, None, None]


@kernel
def _within(there, first, depth, SPLIT: tl.constexpr):
    """Of `there`, what belongs to blocks that begin before the end: one block by itself always does."""
    return there if SPLIT == 1 else there & (first < depth)


@kernel
def block_starts(block, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a block of columns begins; or the SPLIT blocks from it on."""
    return block * BLOCK_K if SPLIT == 1 else (block + tl.arange(0, SPLIT)) * BLOCK_K


@kernel
def load_rows(
    at, real, start, depth,
    FORMAT: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Numbers `start`... of the rows that begin at `at`, a column each: twice, or for int4 those of even and those of
    odd columns of the weight. [BLOCK_K or half of it, rows], behind [SPLIT] where that is not 1."""
    first, there = _parts(start, SPLIT), _across(real, SPLIT)
    if FORMAT != "int4":
        k = first + _along(tl.arange(0, BLOCK_K), SPLIT)
        even = tl.load(_across(at, SPLIT) + k, there & (k < depth), 0.0)
        odd = even
    elif INTERPRET:
        k = first + _along(2 * tl.arange(0, BLOCK_K // 2), SPLIT)
        even = tl.load(_across(at, SPLIT) + k, there & (k < depth), 0.0)
        odd = tl.load(_across(at, SPLIT) + k + 1, there & (k < depth), 0.0)
    else:  # two numbers are one word: two loads of every other number could not run ahead of the products
        k = first // 2 + _along(tl.arange(0, BLOCK_K // 2), SPLIT)
        words = tl.load(_across(at.to(tl.pointer_type(tl.int32)), SPLIT) + k, _within(there, first, depth, SPLIT), 0)
        even = words.to(tl.int16).to(at.dtype.element_ty, bitcast=True)
        odd = (words >> 16).to(tl.int16).to(at.dtype.element_ty, bitcast=True)
    return even, odd


@kernel
def _numbers(codes, like, PART: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes as numbers of the dtype of `like`: E4M3 ("fp8"), "int8", or u - 8 of the "low" or the "high" nibbles."""
    if INTERPRET or PART == "int8":
        if PART == "low":
            codes = (codes & 15).to(tl.int8) - 8
        elif PART == "high":
            codes = (codes >> 4).to(tl.int8) - 8
        numbers = codes.to(like.dtype)
    else:
        asm: tl.constexpr = _ptx(PART, like.dtype == tl.float16)
        numbers = tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=like.dtype, is_pure=True, pack=4)
    return numbers


@triton.constexpr_function
def _ptx(part, half):
    """PTX that makes two words of two numbers each ($0, $1) of a word of four codes ($2); what Triton makes of such
    conversions goes number by number."""
    return "{ " + (_ptx_fp8(half) if part == "fp8" else _ptx_nibbles(part == "high", half)) + " }"


@triton.constexpr_function
def _ptx_fp8(half):
    widen = """
        mov.b32 {a, b}, h; cvt.f32.f16 x, a; cvt.f32.f16 y, b; cvt.rn.bf16x2.f32 OUT, y, x;
    """
    store = "mov.b32 OUT, h;" if half else widen
    return f"""
        .reg .b16 a, b, c, d; .reg .b32 h; .reg .f32 x, y;
        mov.b32 {{c, d}}, $2;
        cvt.rn.f16x2.e4m3x2 h, c; {store.replace("OUT", "$0")}
        cvt.rn.f16x2.e4m3x2 h, d; {store.replace("OUT", "$1")}
    """


@triton.constexpr_function
def _ptx_nibbles(high, half):
    """A nibble is put into the mantissa of 128 (bfloat16) or 1024 (float16), and 136 or 1032 taken off."""
    kind = "f16x2" if half else "bf16x2"
    base, one, offset = (0x64006400, 0x3C003C00, 0xE408E408) if half else (0x43004300, 0x3F803F80, 0xC308C308)
    return f"""
        .reg .b32 w, a, b, one, offset;
        mov.b32 one, {one}; mov.b32 offset, {offset};
        shr.u32 w, $2, {4 if high else 0};
        prmt.b32 a, w, 0, 0x4140; lop3.b32 a, a, 0x000F000F, {base}, 0xEA; fma.rn.{kind} $0, a, one, offset;
        prmt.b32 b, w, 0, 0x4342; lop3.b32 b, b, 0x000F000F, {base}, 0xEA; fma.rn.{kind} $1, b, one, offset;
    """


@kernel
def group_scales(
    rows, inside, start, depth, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Of rows of W in int4, the scales of the SPLIT blocks of columns from `start`, for `add_product`."""
    first, there = _parts(start, SPLIT), _along(inside, SPLIT)
    return tl.load(_along(rows[1], SPLIT) + first // BLOCK_K, there & (first < depth), 0.0).to(tl.float32)


@kernel
def add_product(
    acc, even, odd, rows, inside, start, depth,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, INTERPRET: tl.constexpr,
    scales=None,
):  # fmt: skip
    """acc + W x^T over the columns `start`... of rows of W (`rows_of`) and what `load_rows` made of x; of int8 not yet
    scaled.

    `scales` are those of int4, where they have been read before: Triton lets only operands of products run ahead.
    W is the M side of the products, of which there are 16 rows at a time: the other side, of 8, is hardly wasted where
    x has few rows.
    """
    data, scale, zero = rows
    first, there = _parts(start, SPLIT), _along(inside, SPLIT)
    if FORMAT == "int4":
        there = _within(there, first, depth, SPLIT)
        codes = tl.load(_along(data, SPLIT) + (first // 2 + _across(tl.arange(0, BLOCK_K // 2), SPLIT)), there, 0)
        group = first // BLOCK_K
        if scales is None:
            factor = tl.load(_along(scale, SPLIT) + group, there, 0.0).to(tl.float32)
        else:
            factor = scales
        part = tl.dot(_numbers(codes, even, "low", INTERPRET), even)
        part = tl.dot(_numbers(codes, even, "high", INTERPRET), odd, part)
        if ZEROS:
            shift = 8.0 - tl.load(_along(zero, SPLIT) + group, there, 8).to(tl.float32)
            part += shift * tl.sum(even.to(tl.float32) + odd.to(tl.float32), -2, keep_dims=True)
        acc += part * factor
    else:
        k = first + _across(tl.arange(0, BLOCK_K), SPLIT)
        w = tl.load(_along(data, SPLIT) + k, there & (k < depth), 0.0)
        if FORMAT == "fp8":
            there = _within(there, first, depth, SPLIT)
            factor = tl.load(_along(scale, SPLIT) + first // BLOCK_K, there, 0.0)
            acc += tl.dot(_numbers(w, even, "fp8", INTERPRET), even) * factor
        elif FORMAT == "int8":
            acc = tl.dot(_numbers(w, even, "int8", INTERPRET), even, acc)
        else:
            acc = tl.dot(w, even, acc)
    return acc


@kernel
def scaled(acc, rows, inside, FORMAT: tl.constexpr):
    """A whole sum of products, with the scales that join it last."""
    if FORMAT == "int8":
        acc *= tl.load(rows[1], inside, 0.0)[:, None]
    return acc


@kernel
def _dequantize(
    weight, out, rows, stored, group,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    data, scale, zero, row, scale_row = weight
    r = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(data + r * row + k, k < stored)
    if FORMAT == "int4":
        at = r * scale_row + 2 * k // group
        factor = tl.load(scale + at, k < stored, 0.0).to(tl.float32)
        base = tl.full((BLOCK,), 8.0, tl.float32)
        if ZEROS:
            base = tl.load(zero + at, k < stored, 0).to(tl.float32)
        low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
        numbers = tl.interleave((low - base) * factor, (high - base) * factor)
        n = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out + r * 2 * stored + n, numbers.to(out.dtype.element_ty), n < 2 * stored)
    else:
        if FORMAT == "fp8":
            at = scale + (r // rows * tl.cdiv(rows, 128) + r % rows // 128) * scale_row + k // 128
            factor = tl.load(at, k < stored, 0.0)
        else:
            factor = tl.load(scale + r)
        numbers = codes.to(tl.float32) * factor
        tl.store(out + r * stored + k, numbers.to(out.dtype.element_ty), k < stored)


def dequantize(weight: Packed, dtype: torch.dtype) -> Tensor:
    """One pass."""
    name, group, zeros = kind(weight)
    *stack, rows, stored = weight.data.shape
    out = torch.empty(*stack, rows, 2 * stored if group else stored, dtype=dtype, device=weight.device)
    block = min(2048, next_power_of_2(stored))
    _dequantize[(out.numel() // out.shape[-1], cdiv(stored, block))](
        operand(weight), out, rows, stored, group, FORMAT=name, ZEROS=zeros, BLOCK=block, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def dequantize_supports(weight: Packed, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"it makes numbers of one of {DTYPES}, not {dtype}"
    return weight_refusal(weight, dtype)
