"""Products of few rows with a packed weight, whose codes are read once and never made dense in memory."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.packed import Packed
from kogia.ops.triton.common import LAUNCH, PDL, cdiv, kernel, refusal, rows_refusal, wait_for_inputs
from kogia.ops.triton.packed import (
    add_product,
    block_starts,
    layout,
    load_rows,
    operand,
    rows_of,
    scaled,
    weight_refusal,
)

MOST_ROWS = 512
"""For more, FP8 weights are multiplied in FP8 (kogia.ops.w8a8); others are made dense once (`dequantize`), and cuBLAS
takes them."""


@kernel
def _linear(
    x, weight, bias, out, num_rows, depth, width, x_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, FORMAT: tl.constexpr,
    ZEROS: tl.constexpr, INTERPRET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Where SPLIT is not 1, so many groups of warps share a program's columns, each with blocks of the depth of its
    own: a row of products that wait for one another is that much shorter."""
    wait_for_inputs(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside, real = n < width, m < num_rows
    at, of = x + m.to(tl.int64) * x_row, rows_of(weight, n, FORMAT)
    if SPLIT == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    for block in range(0, tl.cdiv(depth, BLOCK_K), SPLIT):
        start = block_starts(block, SPLIT, BLOCK_K)
        even, odd = load_rows(at, real, start, depth, FORMAT, BLOCK_K, SPLIT, INTERPRET)
        acc = add_product(acc, even, odd, of, inside, start, depth, FORMAT, ZEROS, BLOCK_K, SPLIT, INTERPRET)
    if SPLIT > 1:
        acc = tl.sum(acc, 0)
    acc = scaled(acc, of, inside, FORMAT)
    if bias is not None:
        acc += tl.load(bias + n, inside, 0.0).to(tl.float32)[:, None]
    to = out + m[None, :].to(tl.int64) * width + n[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), real[None, :] & inside[:, None])


def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """One launch: a tile of output columns of a tile of rows per program."""
    assert isinstance(weight, Packed), "see linear_supports"
    flat = x.reshape(-1, x.shape[-1])
    (rows, depth), width = flat.shape, len(weight)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    tiles = tile(rows, width)
    _linear[(cdiv(width, tiles["BLOCK_N"]), cdiv(rows, tiles["BLOCK_M"]))](
        flat, operand(weight), bias, out, rows, depth, width, flat.stride(0),
        **tiles, **layout(weight), PDL=PDL, **LAUNCH,
    )  # fmt: skip
    return out.view(*x.shape[:-1], width)


def tile(rows: int, width: int) -> dict[str, int]:
    """Rows and columns of a program, parts of the depth, warps, loads that run ahead: the fastest that were tried."""
    split, stages = 1, 4
    if rows <= 8 and width <= 8192:
        block_m, block_n, warps, split, stages = 8, 16, 4, 4, 4
    elif rows <= 8:
        block_m, block_n, warps = 8, 128, 4
    elif rows > 32 and width > 8192:
        block_m, block_n, warps = 64, 64, 4
    else:
        block_m, block_n, warps = 16 if rows <= 16 else 32, 64 if width > 8192 else 32, 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split, "num_warps": warps, "num_stages": stages}


def linear_supports(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> str | None:
    if not isinstance(weight, Packed):
        return "dense weights are for cuBLAS"
    if weight.data.ndim != 2:
        return f"it takes one matrix, not a stack of {weight.data.shape[:-2]}"
    if not 0 < x.numel() // x.shape[-1] <= MOST_ROWS:
        return f"it is made for 1 to {MOST_ROWS} rows"
    if x.storage_offset() % 2 or any(stride % 2 for stride in x.stride()[:-1]):
        return f"it reads rows two numbers at a time; they begin at {x.storage_offset()}, {x.stride()} apart"
    reason = None if bias is None else refusal(bias, dtypes=(x.dtype,))
    return reason or rows_refusal(x) or weight_refusal(weight, x.dtype)
