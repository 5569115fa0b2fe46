"""Products of tokens with their experts in FP8, on Hopper: tiles by the copy engine, scales in between, no host.

A program stays on its multiprocessor and takes tile after tile of the result. Which tiles there are is known on the
device alone: `_plan` lists them from the experts' counts, and ends each expert with a tile that is not full. Tiles are
read whole, past the end of an expert if need be, and only its own rows are written.

Tensor cores add FP8 products with about 14 bits, so after every 128 of them the sum is scaled and added up in float32,
by the ordinary units (DeepSeek-V3 section 3.3.2). The scales of the next group are read one step ahead: Triton lets
only operands of products run ahead by itself.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kogia.ops.blockwise import Blocks, Rows
from kogia.ops.triton.common import INTERPRETED, cdiv, kernel, next_power_of_2

_GROUP = tl.constexpr(128)


@dataclass(frozen=True)
class Tile:
    """How the work is cut: the fastest of those that benchmarks/training_fp8.py tries, three small programs a
    multiprocessor, of which one multiplies while the others scale their sums or wait."""

    rows: int = 128
    columns: int = 64
    """Of one product; 128 or a divisor of it."""
    parts: int = 1
    """Products side by side that share the rows: 1 or 2."""
    warps: int = 4
    stages: int = 3
    """Groups of 128 on their way at a time."""
    programs: int = 3
    """Per multiprocessor."""
    flatten: bool = False
    """Whether the loads of a tile begin while the one before it ends."""
    registers: int | None = None
    """Most of a thread."""


TILE = Tile()


@kernel
def _plan(
    counts, tiles, firsts, num_rows, E: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr
):
    """`tiles` are how many there are, then expert, first row and end of each; `firsts` where those of each expert
    begin, and their end. Program e lists those of expert e; the last expert has nobody's rows too. Tiles lie `BLOCK_M`
    apart from the multiple of `ALIGN` at or before an expert's first row."""
    e, every = tl.program_id(0), tl.arange(0, PADDED)
    count = tl.load(counts + every, every < E - 1, 0).to(tl.int32)
    count = tl.where(every == E - 1, num_rows - tl.sum(count, 0), count)
    before = (tl.cumsum(count, 0) - count) % ALIGN
    blocks = tl.where(count > 0, (before + count + BLOCK_M - 1) // BLOCK_M, 0)
    first, start = tl.sum(tl.where(every < e, blocks, 0), 0), tl.sum(tl.where(every < e, count, 0), 0)
    own, end = tl.sum(tl.where(every == e, blocks, 0), 0), tl.sum(tl.where(every <= e, count, 0), 0)
    aligned = start - start % ALIGN
    tl.store(firsts + e, first)
    if e == 0:
        tl.store(tiles, tl.sum(blocks, 0))
        tl.store(firsts + E, tl.sum(blocks, 0))
    for i in range(own):
        at = tiles + 1 + 3 * (first + i)
        tl.store(at, e)
        tl.store(at + 1, tl.maximum(start, aligned + i * BLOCK_M))
        tl.store(at + 2, end)


@kernel
def _product(a, b, INTERPRET: tl.constexpr):
    if INTERPRET:
        part = tl.dot(a.to(tl.float32), b.to(tl.float32).T)
    else:
        part = tl.dot(a, b.T)
    return part


@kernel
def _grouped(
    a, b, a_scale, b_scale, out, tiles, num_rows, width, groups, scale_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, FLATTEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BLOCK_N * PARTS)
    scale_blocks = tl.cdiv(width, _GROUP)
    for tile in tl.range(tl.program_id(0), tl.load(tiles) * across, tl.num_programs(0), flatten=FLATTEN):
        place, column = tile // across, (tile % across) * (BLOCK_N * PARTS)
        at = tiles + 1 + 3 * place
        expert, start, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        m = start + tl.arange(0, BLOCK_M)
        there = m < end
        at_a = a_scale + m
        at_b = b_scale + (expert * scale_blocks + column // _GROUP) * scale_row
        # a second part may lie beyond the last column: its blocks are another expert's, and nothing of it is written
        second = tl.where(column + BLOCK_N < width, ((column + BLOCK_N) // _GROUP - column // _GROUP) * scale_row, 0)
        above = (expert * width + column).to(tl.int32)
        by_row = tl.load(at_a, there, 0.0)
        first_scale, second_scale = tl.load(at_b), tl.load(at_b + second)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        other = tl.zeros((BLOCK_M, BLOCK_N if PARTS == 2 else 1), tl.float32)
        for group in tl.range(0, groups, num_stages=STAGES):
            ahead = tl.minimum(group + 1, groups - 1)
            next_by_row = tl.load(at_a + ahead.to(tl.int64) * num_rows, there, 0.0)
            next_first = tl.load(at_b + ahead)
            x = a.load([start, group * _GROUP])
            acc += _product(x, b.load([above, group * _GROUP]), INTERPRET) * (by_row * first_scale)[:, None]
            if PARTS == 2:
                next_second = tl.load(at_b + second + ahead)
                part = _product(x, b.load([above + BLOCK_N, group * _GROUP]), INTERPRET)
                other += part * (by_row * second_scale)[:, None]
                second_scale = next_second
            by_row, first_scale = next_by_row, next_first
        n = column + tl.arange(0, BLOCK_N)
        to = out + m.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), there[:, None] & (n < width)[None, :])
        if PARTS == 2:
            inside = there[:, None] & (n + BLOCK_N < width)[None, :]
            tl.store(to + BLOCK_N, other.to(out.dtype.element_ty), inside)


def grouped_product(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype) -> Tensor:
    return tiled_product(a, b, counts, dtype, TILE)


def tiled_product(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """Two launches, no wait."""
    (rows, padded), (experts, width) = a.codes.shape, b.codes.shape[:2]
    out = torch.empty(rows, width, dtype=dtype, device=a.device)
    tiles, _, most = planned(counts, rows, tile.rows)
    across = cdiv(width, tile.columns * tile.parts)
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    _grouped[(min(most * across, tile.programs * _multiprocessors(a.device)),)](
        TensorDescriptor.from_tensor(a.codes, [tile.rows, 128]),
        TensorDescriptor.from_tensor(b.codes.view(experts * width, padded), [tile.columns, 128]),
        a.scale, b.scale, out, tiles, rows, width, padded // 128, b.scale.shape[-1],
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, PARTS=tile.parts, STAGES=tile.stages, FLATTEN=tile.flatten,
        INTERPRET=INTERPRETED, num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return out


def planned(counts: Tensor, rows: int, tile_rows: int, align: int = 1) -> tuple[Tensor, Tensor, int]:
    """(`tiles` and `firsts` of `_plan`, how many tiles there are at most)."""
    experts = len(counts)
    most = cdiv(rows + (align - 1) * experts, tile_rows) + experts
    tiles, firsts = torch.empty(2 + 3 * most + experts, dtype=torch.int32, device=counts.device).split(
        [1 + 3 * most, experts + 1]
    )
    _plan[(experts,)](
        counts, tiles, firsts, rows,
        E=experts, PADDED=next_power_of_2(experts), BLOCK_M=tile_rows, ALIGN=align, num_warps=1,
    )  # fmt: skip
    return tiles, firsts, most


@cache
def _multiprocessors(device: torch.device) -> int:
    return 3 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def grouped_product_supports(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype) -> str | None:
    if not INTERPRETED and torch.cuda.get_device_capability(a.device)[0] < 9:
        return "tiles are copied by an engine that Hopper has"
    if not a.codes.numel():
        return "there are no rows"
    if b.codes.ndim != 3:
        return f"it takes one matrix for each expert, not {tuple(b.codes.shape)}"
    if counts.shape != b.codes.shape[:1]:
        return f"it takes a count for each expert, not {tuple(counts.shape)}"
    if max(b.codes.shape[0] * b.codes.shape[1], a.codes.shape[0]) >= 2**31:
        return "rows are counted in 32 bits"
    return None
