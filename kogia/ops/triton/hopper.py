"""Latent attention over the paged cache, for Hopper: warps with roles instead of warps that are all alike.

A program takes 64 rows of one sequence's [queries, heads] and one part of its cache. For each block of 64 cached rows
there is S = Q K^T, a softmax, and O = P V, where V is the first 512 numbers of K. The sums of O alone, 64 x 512 in
float32, fill half of a multiprocessor's registers, so twelve warps share the work by kind:

score   four warps: S on the tensor cores, the online softmax, and P into shared memory for the others
mix     twice four warps, each for 256 of the 512 columns: O = P V, and copying rows into shared memory

While the tensor cores multiply P with one block, the first four warps multiply Q with the next. A mixing group refills
its half of a block as soon as its own product with it is done: nobody reads that half any more, for P came out of all
of K. Q, two blocks of 72 KiB and P take 225 of the 227 KiB there are, so one program runs on a multiprocessor.
Rows lie in pages of any size and are copied one by one, 16 bytes a thread.

Groups wait for one another by barriers in shared memory. A barrier counts arrivals, and each time that all have
arrived its phase flips between 0 and 1: use i of a barrier that is used again and again ends phase i % 2, and waiting
for the phase before the first passes at once.

The division of labour is near FlashMLA's (github.com/deepseek-ai/FlashMLA), whose groups each hold half of O and share
the scores as well.
"""

# Inside kernels, types are Gluon's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import inspect
from collections.abc import Callable
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors
from kogia.ops.triton import attention
from kogia.ops.triton.common import LAUNCH, ONE_FOR_ALL, PDL

LATENT, ROPE = gl.constexpr(512), gl.constexpr(64)
WIDTH = gl.constexpr(576)
HALF = gl.constexpr(256)
"""Of the latent: the columns of one mixing group."""
TILE = gl.constexpr(64)
"""Rows of [queries, heads] of a program: the rows of a tensor-core product."""
BLOCK = gl.constexpr(64)
"""Cached rows at a time."""
STAGES = gl.constexpr(2)
"""Blocks in shared memory."""
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Eight threads copy the 128 bytes of 64 numbers of a row."""
ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
"""S in registers: a product of four warps with 64 columns."""
MIXTURE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]))
"""One half of O in registers."""
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
"""Shared memory as the tensor cores read it: rows of 128 bytes, permuted so that no two hit the same banks."""
REGISTERS = 168
"""Of a thread of every group: a third of all there are."""
_LOG2_E = 1.4426950408889634

async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # its name until 3.6


def kernel(function: Callable[..., Any]) -> Any:
    """`gluon.jit` of the function itself, where a test run has wrapped it for checking types."""
    return gluon.jit(inspect.unwrap(function), **ONE_FOR_ALL)


@kernel
def _copy(buffer, row, there, first):
    """Start copying numbers of rows, from the `first` on and as many as `buffer` has; zeros for rows not there."""
    column = first + gl.arange(0, buffer.shape[1], gl.SliceLayout(0, COPY))
    async_load(buffer, row[:, None] + column[None, :], there[:, None])


@kernel
def _block(cache, table, position, stop, PAGE: gl.constexpr):
    """Where the rows of a block lie, and which of them there are."""
    at = position + gl.arange(0, BLOCK, ROWS)
    there = at < stop
    page = gl.load(table + at // PAGE, mask=there, other=0).to(gl.int64)
    return cache + (page * PAGE + at % PAGE) * WIDTH, there


@kernel
def _copy_half(half, turned, arrived, row, there, RIGHT: gl.constexpr):
    """A mixing group's part of a block, the rotary key with the right half; `arrived` counts every thread's copies."""
    _copy(half, row, there, HALF * RIGHT)
    if RIGHT:
        _copy(turned, row, there, LATENT)
    async_copy.mbarrier_arrive(arrived, increment_count=False)


@kernel
def _load_queries(q, queries, first_row, num_rows):
    q_left, q_right, q_turned = queries
    row = gl.arange(0, TILE, ROWS)
    at, there = q + (first_row + row).to(gl.int64) * WIDTH, row < num_rows
    _copy(q_left, at, there, 0)
    _copy(q_right, at, there, HALF)
    _copy(q_turned, at, there, LATENT)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()


@kernel
def _products(queries, left, right, turned, arrived, j):
    """S = Q K^T of block j, once it is there."""
    q_left, q_right, q_turned = queries
    stage = j % STAGES
    mbarrier.wait(arrived.index(stage), (j // STAGES) & 1)
    fence_async_shared()  # the tensor cores are to see what threads have copied
    none = gl.zeros([TILE, BLOCK], gl.float32, PRODUCT)
    s = warpgroup_mma(q_left, left.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(q_right, right.index(stage).permute((1, 0)), s, is_async=True)
    s = warpgroup_mma(q_turned, turned.index(stage).permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@kernel
def _score(q, queries, left, right, turned, exchange, part_lse, job, tile, first_last, scale, HEADS: gl.constexpr):
    """Weights, and what the sums so far shrink by; at last the inverse totals, and the log2-sums to memory."""
    weights, shrinks, arrived, weighed, mixed = exchange
    first_row, num_rows, start, stop, num_parts, part = job
    _load_queries(q, queries, first_row, num_rows)
    row = gl.arange(0, TILE, gl.SliceLayout(1, PRODUCT))
    last = first_last + (tile * TILE + row) // HEADS  # the last position that each row sees
    best = gl.full([TILE], float("-inf"), gl.float32, gl.SliceLayout(1, PRODUCT))
    total = gl.full([TILE], 0.0, gl.float32, gl.SliceLayout(1, PRODUCT))
    blocks = gl.cdiv(stop - start, BLOCK)
    for j in range(blocks):
        s = _products(queries, left, right, turned, arrived, j)
        position = start + j * BLOCK
        if position + BLOCK > gl.minimum(stop, first_last + 1):
            key = position + gl.arange(0, BLOCK, gl.SliceLayout(0, PRODUCT))
            s = gl.where((key[None, :] < stop) & (key[None, :] <= last[:, None]), s, float("-inf"))
        new = gl.maximum(best, gl.max(s, 1) * scale)
        safe = gl.where(new == float("-inf"), 0.0, new)
        w = gl.exp2(s * scale - safe[:, None])
        shrink = gl.exp2(best - safe)
        total = total * shrink + gl.sum(w, 1)
        best = new
        mbarrier.wait(mixed, (j & 1) ^ 1)
        weights.store(w.to(gl.bfloat16))
        shrinks.store(shrink)
        fence_async_shared()
        mbarrier.arrive(weighed)
    mbarrier.wait(mixed, (blocks & 1) ^ 1)
    shrinks.store(1.0 / gl.where(total > 0, total, 1.0))
    mbarrier.arrive(weighed)
    lse = best + gl.log2(total)  # -inf where nothing was visible
    gl.store(part_lse + (first_row + row).to(gl.int64) * num_parts + part, lse, mask=row < num_rows)


@kernel
def _mix(half, turned, exchange, cache, table, out, job, RIGHT: gl.constexpr, PAGE: gl.constexpr):
    """One half of the mixtures' columns, and fetching that half of the rows."""
    weights, shrinks, arrived, weighed, mixed = exchange
    first_row, num_rows, start, stop, num_parts, part = job
    blocks = gl.cdiv(stop - start, BLOCK)
    for j in gl.static_range(STAGES):
        if j < blocks:
            at, there = _block(cache, table, start + j * BLOCK, stop, PAGE)
            _copy_half(half.index(j), turned.index(j), arrived.index(j), at, there, RIGHT)
    acc = gl.zeros([TILE, HALF], gl.float32, MIXTURE)
    for j in range(blocks):
        stage = j % STAGES
        at, there = _block(cache, table, start + (j + STAGES) * BLOCK, stop, PAGE)  # is there when it is needed
        mbarrier.wait(arrived.index(stage), (j // STAGES) & 1)
        fence_async_shared()
        mbarrier.wait(weighed, j & 1)
        acc = acc * shrinks.load(gl.SliceLayout(1, MIXTURE))[:, None]
        acc = warpgroup_mma(weights, half.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(mixed)
        if j + STAGES < blocks:
            _copy_half(half.index(stage), turned.index(stage), arrived.index(stage), at, there, RIGHT)
    mbarrier.wait(weighed, blocks & 1)
    acc = acc * shrinks.load(gl.SliceLayout(1, MIXTURE))[:, None]
    row = gl.arange(0, TILE, gl.SliceLayout(1, MIXTURE))
    column = HALF * RIGHT + gl.arange(0, HALF, gl.SliceLayout(0, MIXTURE))
    to = out + ((first_row + row).to(gl.int64) * num_parts + part) * LATENT
    written = (row < num_rows) & ((start < stop) | (num_parts == 1))
    gl.store(to[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=written[:, None])


@kernel
def _parts(
    q, cache, tables, context_lens, cu_seqlens, part_out, part_lse, scale, table_width, num_parts,
    HEADS: gl.constexpr, QUERIES: gl.constexpr, PAGE: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The same parts as `kogia.ops.triton.attention` makes of dense rows, for 64 rows of [queries, heads] each."""
    tile, seq, part = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    q_left = gl.allocate_shared_memory(gl.bfloat16, [TILE, HALF], SWIZZLED)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [TILE, HALF], SWIZZLED)
    q_turned = gl.allocate_shared_memory(gl.bfloat16, [TILE, ROPE], SWIZZLED)
    left = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, HALF], SWIZZLED)
    right = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, HALF], SWIZZLED)
    turned = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, ROPE], SWIZZLED)
    weights = gl.allocate_shared_memory(gl.bfloat16, [TILE, BLOCK], SWIZZLED)
    shrinks = gl.allocate_shared_memory(gl.float32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weighed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mixed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=256)  # threads that copy
    mbarrier.init(weighed, count=1)
    mbarrier.init(mixed, count=2)  # groups that mix
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length = gl.load(context_lens + seq).to(gl.int32)
    first_row = gl.load(cu_seqlens + seq).to(gl.int32) * HEADS + tile * TILE
    num_rows = gl.minimum(QUERIES * HEADS - tile * TILE, TILE)
    chunk = gl.cdiv(gl.cdiv(length, num_parts), BLOCK) * BLOCK
    start = gl.minimum(part * chunk, length)
    stop = gl.minimum(start + chunk, length)
    table = tables + seq.to(gl.int64) * table_width
    queries = (q_left, q_right, q_turned)
    exchange = (weights, shrinks, arrived, weighed, mixed)
    job = (first_row, num_rows, start, stop, num_parts, part)
    gl.warp_specialize(
        [
            (_score, (q, queries, left, right, turned, exchange, part_lse, job, tile, length - QUERIES, scale, HEADS)),
            (_mix, (left, turned, exchange, cache, table, part_out, job, 0, PAGE)),
            (_mix, (right, turned, exchange, cache, table, part_out, job, 1, PAGE)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


def cached_attention(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> Tensor:
    """Two launches: the parts, and their merging where there are several."""
    return attention.merged(*attention_parts(q, cache, segments, scale), q.dtype)


def attention_parts(
    q: Tensor, cache: LayerCache, segments: Segments, scale: float, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """([tokens, heads, parts, 512] normalised mixtures, [tokens, heads, parts] log2-sums)."""
    heads, queries = q.shape[1], segments.longest
    tiles, blocks = num_tiles(queries, heads), -(-int(cache.contexts.max()) // BLOCK.value)
    parts = parts or max(1, min(multiprocessors(q.device) // (segments.num_seqs * tiles), blocks))
    part, lse = attention.part_buffers(q, parts, LATENT.value)
    _parts[(tiles, segments.num_seqs, parts)](
        q, cache.rows, cache.block_tables, cache.context_lens, segments.cu_seqlens, part, lse, scale * _LOG2_E,
        cache.block_tables.stride(0), parts, HEADS=heads, QUERIES=queries, PAGE=cache.block_size,
        REGISTERS=REGISTERS, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return part, lse


def num_tiles(queries: int, heads: int) -> int:
    return -(-queries * heads // TILE.value)


@once
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cached_attention_supports(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> str | None:
    row = cache.row
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "its kernel is for Hopper GPUs"
    if not isinstance(row, LatentRow) or row.fp8 or (row.latent, row.rope) != (LATENT.value, ROPE.value):
        return f"it takes bfloat16 rows of {LATENT.value} + {ROPE.value} numbers, not {row}"
    if q.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {q.dtype}"
    rows, programs = segments.longest * q.shape[1], segments.num_seqs * num_tiles(segments.longest, q.shape[1])
    if rows < TILE.value and programs > multiprocessors(q.device):
        return f"with {rows} of {TILE.value} rows in use, {programs} sequences are not faster one to a multiprocessor"
    return attention.cached_attention_supports(q, cache, segments, scale=scale, index=index)
