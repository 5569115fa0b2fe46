"""Products of tokens with their experts in FP8, for Hopper: warps with roles instead of warps that are all alike.

One warp copies tiles of both operands into shared memory, several groups of 128 on their way at a time. Three groups of
four warps multiply 64 rows each with the same 128 columns. Tensor cores add FP8 products with about 14 bits, so after
every 128 of them a group scales its sums and adds them up in float32 by the ordinary units; while it does, the tensor
cores have the others' work. Tiles come from the plan of `kogia.ops.triton.grouped`.

The division of labour is that of DeepGEMM (github.com/deepseek-ai/DeepGEMM). Barriers are those of
`kogia.ops.triton.hopper`: use i of one that is used again and again ends phase i % 2.
"""

# Inside kernels, types are Gluon's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kogia.ops.blockwise import Blocks, Routed, Rows
from kogia.ops.packed import Packed
from kogia.ops.triton import grouped
from kogia.ops.triton.common import cdiv
from kogia.ops.triton.hopper import kernel, multiprocessors

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6
DEPTH = gl.constexpr(128)
"""Of what is added up between two scales."""
ROWS = gl.constexpr(64)
"""Of a group of warps: those of a tensor-core product."""
HALVES = gl.constexpr(64)
"""Numbers of 16 bits in as many bytes."""
ALIGN = gl.constexpr(4)
"""Scales: the copy engine begins at multiples of 16 bytes alone, anything else is an illegal instruction to it."""
SHARED_HALVES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
FLAT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1))
_LEAST = 64
"""Rows an expert, on average, of a product in 16 bits."""
_LEAST_FP8 = 128
"""Of one in FP8: with fewer, its tiles of 192 rows hold more that is nobody's than the other kernel's of 128."""
_WIDE = 2048
_COLUMNS = 128
_COPIER = 40
"""Registers of a thread that copies."""


@dataclass(frozen=True)
class Shape:
    """How the work is cut."""

    groups: int = 3
    """Of warps that multiply, with 64 rows each: 2 or 3."""
    columns: int = 128
    stages: int = 4
    registers: int = 152
    """Of a thread that multiplies, of those that are not the first group."""
    width_first: bool = True
    """Whether the tiles of the same rows follow each other, or those of the same columns."""


SHAPE = Shape()


@kernel
def _place(tiles, tile, across, BLOCK_N: gl.constexpr, WIDTH_FIRST: gl.constexpr):
    """(expert, first row, end, first column) of a tile."""
    if WIDTH_FIRST:
        place, column = tile // across, (tile % across) * BLOCK_N
    else:
        number = gl.load(tiles)
        place, column = tile % number, (tile // number) * BLOCK_N
    at = tiles + 1 + 3 * place
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), column


@kernel
def _copy(
    operands, buffers, shared, sizes, num_rows,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, WIDTH_FIRST: gl.constexpr,
):  # fmt: skip
    a, b, a_scale = operands
    a_parts, scales = buffers
    b_part, ready, free = shared
    tiles, width, groups, across = sizes
    i = 0
    for tile in range(gl.program_id(0), gl.load(tiles) * across, gl.num_programs(0)):
        expert, start, _, column = _place(tiles, tile, across, BLOCK_N, WIDTH_FIRST)
        start -= start % ALIGN
        for group in range(groups):
            stage = i % STAGES
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (PARTS * ROWS + BLOCK_N) * DEPTH + PARTS * ROWS * 4)
            for part in gl.static_range(PARTS):
                row = start + part * ROWS
                at = [row, group * DEPTH]
                copy_tile(a, at, ready.index(stage), a_parts[part].index(stage))
                at = [group * num_rows + row]
                copy_tile(a_scale, at, ready.index(stage), scales[part].index(stage))
            at = [expert * width + column, group * DEPTH]
            copy_tile(b, at, ready.index(stage), b_part.index(stage))
            i += 1


@kernel
def _multiply(
    a_part, scale, shared, b_scale, scale_row, out, sizes,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDTH_FIRST: gl.constexpr,
):  # fmt: skip
    b_part, ready, free = shared
    tiles, width, groups, across = sizes
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    LANES: gl.constexpr = BLOCK_N // 8
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    scale_blocks = gl.cdiv(width, DEPTH)
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
    i = 0
    for tile in range(gl.program_id(0), gl.load(tiles) * across, gl.num_programs(0)):
        expert, start, end, column = _place(tiles, tile, across, BLOCK_N, WIDTH_FIRST)
        by_block = b_scale + (expert * scale_blocks + column // DEPTH) * scale_row
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
        for group in range(groups):
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
            part = warpgroup_mma(
                a_part.index(stage), b_part.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            # a line of 32 of these is fetched once, those of rows lie apart and are copied with them
            factor = scale.index(stage).load(gl.SliceLayout(1, PRODUCT)) * gl.load(by_block + group)
            part = warpgroup_mma_wait(0, deps=[part])
            mbarrier.arrive(free.index(stage))
            acc += part * factor[:, None]
            i += 1
        made = gl.convert_layout(acc.to(out.dtype.element_ty), WRITTEN)
        row = start - start % ALIGN + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
        n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WRITTEN))
        to = out + row.to(gl.int64)[:, None] * width + n[None, :]
        gl.store(to, made, mask=((row >= start) & (row < end))[:, None] & (n < width)[None, :])


@kernel
def _grouped(
    a, b, a_scale, b_scale, out, tiles, num_rows, width, groups, scale_row,
    PARTS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    COPIER: gl.constexpr, WIDTH_FIRST: gl.constexpr,
):  # fmt: skip
    a_0 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], SHARED)
    a_1 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], SHARED)
    scale_0 = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    scale_1 = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    b_part = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_N, DEPTH], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS)
    fence_async_shared()
    across = gl.cdiv(width, BLOCK_N)
    operands, shared, sizes = (a, b, a_scale), (b_part, ready, free), (tiles, width, groups, across)
    if PARTS == 2:
        buffers = ((a_0, a_1), (scale_0, scale_1))
        gl.warp_specialize(
            [
                (_multiply, (a_0, scale_0, shared, b_scale, scale_row, out, sizes, 0, BLOCK_N, STAGES, WIDTH_FIRST)),
                (_multiply, (a_1, scale_1, shared, b_scale, scale_row, out, sizes, 1, BLOCK_N, STAGES, WIDTH_FIRST)),
                (_copy, (operands, buffers, shared, sizes, num_rows, BLOCK_N, STAGES, PARTS, WIDTH_FIRST)),
            ],
            [4, 1],
            [REGISTERS, COPIER],
        )
    else:
        a_2 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], SHARED)
        scale_2 = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
        buffers = ((a_0, a_1, a_2), (scale_0, scale_1, scale_2))
        gl.warp_specialize(
            [
                (_multiply, (a_0, scale_0, shared, b_scale, scale_row, out, sizes, 0, BLOCK_N, STAGES, WIDTH_FIRST)),
                (_multiply, (a_1, scale_1, shared, b_scale, scale_row, out, sizes, 1, BLOCK_N, STAGES, WIDTH_FIRST)),
                (_multiply, (a_2, scale_2, shared, b_scale, scale_row, out, sizes, 2, BLOCK_N, STAGES, WIDTH_FIRST)),
                (_copy, (operands, buffers, shared, sizes, num_rows, BLOCK_N, STAGES, PARTS, WIDTH_FIRST)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, COPIER],
        )


@kernel
def _copy_halves(
    operands, buffers, barriers, sizes, depth,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    a, b = operands
    a_0, a_1, b_part = buffers
    ready, free = barriers
    tiles, width, groups, across = sizes
    i = 0
    for tile in range(gl.program_id(0), gl.load(tiles) * across, gl.num_programs(0)):
        expert, start, _, column = _place(tiles, tile, across, BLOCK_N, True)
        for group in range(groups):
            stage = i % STAGES
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (2 * ROWS + BLOCK_N) * DEPTH)
            at = [start, group * HALVES]
            copy_tile(a, at, ready.index(stage), a_0.index(stage))
            at = [start + ROWS, group * HALVES]
            copy_tile(a, at, ready.index(stage), a_1.index(stage))
            if TURNED:
                at = [expert * depth + group * HALVES, column]
            else:
                at = [expert * width + column, group * HALVES]
            copy_tile(b, at, ready.index(stage), b_part.index(stage))
            i += 1


@kernel
def _multiply_halves(
    a_part, b_part, barriers, out, sizes,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    ready, free = barriers
    tiles, width, groups, across = sizes
    i = 0
    for tile in range(gl.program_id(0), gl.load(tiles) * across, gl.num_programs(0)):
        _, start, end, column = _place(tiles, tile, across, BLOCK_N, True)
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
        for _ in range(groups):
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
            if TURNED:
                acc = warpgroup_mma(a_part.index(stage), b_part.index(stage), acc, is_async=True)
            else:
                acc = warpgroup_mma(a_part.index(stage), b_part.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(stage))
            i += 1
        made = gl.convert_layout(acc.to(out.dtype.element_ty), WRITTEN)
        row = start + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
        n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WRITTEN))
        to = out + row.to(gl.int64)[:, None] * width + n[None, :]
        gl.store(to, made, mask=(row < end)[:, None] & (n < width)[None, :])


@kernel
def _halves(
    a, b, out, tiles, width, depth,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, COPIER: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    a_0 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, HALVES], SHARED_HALVES)
    a_1 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, HALVES], SHARED_HALVES)
    if TURNED:
        b_part = gl.allocate_shared_memory(a.dtype, [STAGES, HALVES, BLOCK_N], SHARED_HALVES)
    else:
        b_part = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_N, HALVES], SHARED_HALVES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    barriers, sizes = (ready, free), (tiles, width, gl.cdiv(depth, HALVES), gl.cdiv(width, BLOCK_N))
    gl.warp_specialize(
        [
            (_multiply_halves, (a_0, b_part, barriers, out, sizes, 0, BLOCK_N, STAGES, TURNED)),
            (_multiply_halves, (a_1, b_part, barriers, out, sizes, 1, BLOCK_N, STAGES, TURNED)),
            (_copy_halves, ((a, b), (a_0, a_1, b_part), barriers, sizes, depth, BLOCK_N, STAGES, TURNED)),
        ],
        [4, 1],
        [REGISTERS, COPIER],
    )


def grouped_linear(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> Tensor:
    return halves_product(x, weight, counts)


def halves_product(
    x: Tensor, weight: Tensor | Packed, counts: Tensor, columns: int = 256, stages: int = 3, registers: int = 216
) -> Tensor:
    """Products in 16 bits: 64 rows and 256 columns a group of warps, whose sums need no scaling in between."""
    assert isinstance(weight, Tensor), "see grouped_linear_supports"
    stack = weight.flatten(1, -2)
    (rows, depth), width = x.shape, stack.shape[1]
    turned = not stack.is_contiguous()
    flat = (stack.transpose(1, 2) if turned else stack).reshape(-1, width if turned else depth)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    tiles, _, most = grouped.planned(counts, rows, 2 * ROWS.value)
    block = [HALVES.value, columns] if turned else [columns, HALVES.value]
    _halves[(min(most * cdiv(width, columns), multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [ROWS.value, HALVES.value], SHARED_HALVES.value),
        TensorDescriptor.from_tensor(flat, block, SHARED_HALVES.value),
        out, tiles, width, depth,
        BLOCK_N=columns, STAGES=stages, REGISTERS=registers, COPIER=_COPIER, TURNED=turned, num_warps=4,
    )  # fmt: skip
    return out


def grouped_linear_supports(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> str | None:
    if not isinstance(weight, Tensor) or x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return "it takes rows and weights of 16 bits"
    if torch.cuda.get_device_capability(x.device) != (9, 0):
        return "its kernel is for Hopper GPUs"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "it has no backward of its own"
    experts, width = len(weight), math.prod(weight.shape[1:-1])
    if len(x) < _LEAST * experts or x.shape[1] % HALVES.value or width % 8:
        return f"it is made for {_LEAST} rows an expert and more, and widths of a multiple of {HALVES.value} and 8"
    if weight.is_contiguous() and min(x.shape[1], width) >= _WIDE:
        return f"CUTLASS is faster where a product is {_WIDE} wide both ways"
    if not x.is_contiguous() or not (weight.is_contiguous() or weight.transpose(1, -1).is_contiguous()):
        return "it takes contiguous rows, and weights that are or whose transposes are"
    return None


@kernel
def _copy_columns(
    operands, buffers, shared, firsts, sizes,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    a, b, a_scale, b_scale = operands
    a_parts, a_scales, b_scales = buffers
    b_part, ready, free = shared
    experts, height, width = sizes
    down, across = gl.cdiv(height, PARTS * ROWS), gl.cdiv(width, BLOCK_N)
    i = 0
    for tile in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert, place = tile // (down * across), tile % (down * across)
        m, n = (place // across) * (PARTS * ROWS), (place % across) * BLOCK_N
        for group in range(gl.load(firsts + expert), gl.load(firsts + expert + 1)):
            stage = i % STAGES
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (PARTS * ROWS + BLOCK_N) * (DEPTH + 4))
            for part in gl.static_range(PARTS):
                row = m + part * ROWS
                at = [row, group * DEPTH]
                copy_tile(a, at, ready.index(stage), a_parts[part].index(stage))
                at = [group * height + row]
                copy_tile(a_scale, at, ready.index(stage), a_scales[part].index(stage))
            at = [n, group * DEPTH]
            copy_tile(b, at, ready.index(stage), b_part.index(stage))
            at = [group * width + n]
            copy_tile(b_scale, at, ready.index(stage), b_scales.index(stage))
            i += 1


@kernel
def _multiply_columns(
    a_part, a_scale, b_scale, shared, firsts, out, sizes,
    PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 32]
    )
    LANES: gl.constexpr = BLOCK_N // 8
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    b_part, ready, free = shared
    experts, height, width = sizes
    down, across = gl.cdiv(height, PARTS * ROWS), gl.cdiv(width, BLOCK_N)
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
    i = 0
    for tile in range(gl.program_id(0), experts * down * across, gl.num_programs(0)):
        expert, place = tile // (down * across), tile % (down * across)
        m, n = (place // across) * (PARTS * ROWS), (place % across) * BLOCK_N
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, PRODUCT)
        for _ in range(gl.load(firsts + expert), gl.load(firsts + expert + 1)):
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
            part = warpgroup_mma(
                a_part.index(stage), b_part.index(stage).permute((1, 0)), none, use_acc=False, is_async=True
            )
            by_row = a_scale.index(stage).load(gl.SliceLayout(1, PRODUCT))
            by_column = b_scale.index(stage).load(gl.SliceLayout(0, PRODUCT))
            part = warpgroup_mma_wait(0, deps=[part])
            acc += (part * by_row[:, None]) * by_column[None, :]
            mbarrier.arrive(free.index(stage))
            i += 1
        made = gl.convert_layout(acc.to(out.dtype.element_ty), WRITTEN)
        row = m + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
        column = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WRITTEN))
        to = out + (expert.to(gl.int64) * height + row)[:, None] * width + column[None, :]
        gl.store(to, made, mask=(row < height)[:, None] & (column < width)[None, :])


@kernel
def _outer(
    a, b, a_scale, b_scale, out, firsts, num_experts, height, width,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, COPIER: gl.constexpr,
):  # fmt: skip
    a_0 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], SHARED)
    a_1 = gl.allocate_shared_memory(a.dtype, [STAGES, ROWS, DEPTH], SHARED)
    scale_0 = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    scale_1 = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], FLAT)
    b_part = gl.allocate_shared_memory(a.dtype, [STAGES, BLOCK_N, DEPTH], SHARED)
    b_scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    shared, sizes = (b_part, ready, free), (num_experts, height, width)
    operands, buffers = (a, b, a_scale, b_scale), ((a_0, a_1), (scale_0, scale_1), b_scales)
    gl.warp_specialize(
        [
            (_multiply_columns, (a_0, scale_0, b_scales, shared, firsts, out, sizes, 0, 2, BLOCK_N, STAGES)),
            (_multiply_columns, (a_1, scale_1, b_scales, shared, firsts, out, sizes, 1, 2, BLOCK_N, STAGES)),
            (_copy_columns, (operands, buffers, shared, firsts, sizes, BLOCK_N, STAGES, 2)),
        ],
        [4, 1],
        [REGISTERS, COPIER],
    )


def routed_outer(a: Routed, b: Routed, dtype: torch.dtype) -> Tensor:
    return shaped_outer(a, b, dtype)


def shaped_outer(a: Routed, b: Routed, dtype: torch.dtype, stages: int = 5, registers: int = 216) -> Tensor:
    (height, _), (width, _), experts = a.columns.codes.shape, b.columns.codes.shape, len(a.firsts) - 1
    out = torch.empty(experts, height, width, dtype=dtype, device=a.device)
    tiles = experts * cdiv(height, 2 * ROWS.value) * cdiv(width, _COLUMNS)
    _outer[(min(tiles, multiprocessors(a.device)),)](
        TensorDescriptor.from_tensor(a.columns.codes, [ROWS.value, DEPTH.value], SHARED.value),
        TensorDescriptor.from_tensor(b.columns.codes, [_COLUMNS, DEPTH.value], SHARED.value),
        TensorDescriptor.from_tensor(a.columns.scale.view(-1), [ROWS.value], FLAT.value),
        TensorDescriptor.from_tensor(b.columns.scale.view(-1), [_COLUMNS], FLAT.value),
        out, a.firsts, experts, height, width,
        BLOCK_N=_COLUMNS, STAGES=stages, REGISTERS=registers, COPIER=_COPIER, num_warps=4,
    )  # fmt: skip
    return out


def routed_outer_supports(a: Routed, b: Routed, dtype: torch.dtype) -> str | None:
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) != (9, 0):
        return "its kernel is for Hopper GPUs"
    if len(a.columns.codes) % ALIGN.value or len(b.columns.codes) % 8:
        sizes = f"{len(a.columns.codes)} x {len(b.columns.codes)}"
        return f"it copies four scales and writes eight numbers at a time, which does not go into {sizes}"
    if max(a.columns.scale.numel(), b.columns.scale.numel()) >= 2**31:
        return "its scales are counted in 32 bits"
    return None


def shaped_product(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype, shape: Shape = SHAPE) -> Tensor:
    """Two launches, no wait."""
    (rows, padded), (experts, width) = a.codes.shape, b.codes.shape[:2]
    out = torch.empty(rows, width, dtype=dtype, device=a.device)
    tiles, _, most = grouped.planned(counts, rows, shape.groups * ROWS.value, ALIGN.value)
    scale = pad(a.scale, (0, -rows % ALIGN.value))
    across = cdiv(width, shape.columns)
    _grouped[(min(most * across, multiprocessors(a.device)),)](
        TensorDescriptor.from_tensor(a.codes, [ROWS.value, DEPTH.value], SHARED.value),
        TensorDescriptor.from_tensor(b.codes.view(experts * width, padded), [shape.columns, DEPTH.value], SHARED.value),
        TensorDescriptor.from_tensor(scale.view(-1), [ROWS.value], FLAT.value),
        b.scale, out, tiles, scale.shape[1], width, padded // DEPTH.value, b.scale.shape[-1],
        PARTS=shape.groups, BLOCK_N=shape.columns, STAGES=shape.stages, REGISTERS=shape.registers, COPIER=_COPIER,
        WIDTH_FIRST=shape.width_first, num_warps=4,
    )  # fmt: skip
    return out


def grouped_product(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype) -> Tensor:
    return shaped_product(a, b, counts, dtype)


def grouped_product_supports(a: Rows, b: Blocks, counts: Tensor, dtype: torch.dtype) -> str | None:
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) != (9, 0):
        return "its kernel is for Hopper GPUs"
    if len(a.codes) < _LEAST_FP8 * len(counts):
        return f"it is made for {_LEAST_FP8} rows an expert and more"
    if b.codes.shape[-2] % 8 or a.scale.numel() >= 2**31:
        return f"it writes eight numbers at a time, and {b.codes.shape[-2]} are no multiple of that"
    return grouped.grouped_product_supports(a, b, counts, dtype)
