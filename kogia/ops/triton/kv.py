"""Attention over pages of keys and values of several heads (grouped-query attention), and what writes them.

A program reads one part of one sequence's rows of one key/value head, for all query heads that share it: those are the
M side of the products, several tokens of drafts one after the other. Parts are merged as latent attention's are.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.cache import KVRow, LayerCache
from kogia.ops.prefill import FEW
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors
from kogia.ops.triton.attention import merge_parts, num_parts
from kogia.ops.triton.common import (
    LAUNCH,
    PDL,
    kernel,
    next_power_of_2,
    odd_width,
    refusal,
    rows_refusal,
    wait_for_inputs,
)


@kernel
def _kv_parts(
    q, rows, tables, context_lens, cu_seqlens, part, part_lse, scale, table_width, num_parts,
    ROW: tl.constexpr, KV: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """part[token, head, p] = sum_j p_j v_j / sum_j p_j over one part of the rows, and its log2-sum."""
    wait_for_inputs(PDL)
    seq, kv, p, tile = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + seq).to(tl.int32)
    first = tl.load(cu_seqlens + seq)
    chunk = tl.cdiv(tl.cdiv(length, num_parts), BLOCK) * BLOCK
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    m = tile * TILE + tl.arange(0, TILE)  # rows of [queries, heads that share keys]
    token, head = m // SHARE, kv * SHARE + m % SHARE
    real = m < QUERIES * SHARE
    at = (first + token) * (KV * SHARE) + head
    if (start >= stop) & (num_parts > 1):
        tl.store(part_lse + at * num_parts + p, tl.full((TILE,), float("-inf"), tl.float32), real)
        return
    last = length - QUERIES + token  # the position of each query
    d = tl.arange(0, DIM)
    query = tl.load(q + at[:, None] * DIM + d[None, :], real[:, None], 0.0)
    acc = tl.zeros((TILE, DIM), tl.float32)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for j in range(start, stop, BLOCK):
        pos = j + tl.arange(0, BLOCK)
        there = pos < stop
        page = tl.load(tables + seq.to(tl.int64) * table_width + pos // PAGE, there, 0)
        row = rows + (page.to(tl.int64) * PAGE + pos % PAGE) * ROW + kv * DIM
        k = tl.load(row[:, None] + d[None, :], there[:, None], 0.0)
        v = tl.load(row[:, None] + KV * DIM + d[None, :], there[:, None], 0.0)
        s = tl.dot(query, tl.trans(k)) * scale
        s = tl.where(there[None, :] & (pos[None, :] <= last[:, None]), s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(w, 1)
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None])
        best = new
    tl.store(part_lse + at * num_parts + p, best + tl.log2(total), real)  # -inf where nothing was visible
    mixed = acc / tl.where(total > 0, total, 1.0)[:, None]
    to = part + (at * num_parts + p)[:, None] * DIM + d[None, :]
    tl.store(to, mixed.to(part.dtype.element_ty), real[:, None])


def cached_attention(
    q: Tensor,
    cache: LayerCache,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    parts: int | None = None,
) -> Tensor:
    """Two launches, the parts and their merging; one where a sequence is not divided. `parts` is chosen by default."""
    row = cache.row
    assert isinstance(row, KVRow)
    tokens, heads, dim = q.shape
    share, queries = heads // row.num_heads, segments.longest
    tile = min(64, max(16, next_power_of_2(queries * share)))
    block, tiles = 64, -(-queries * share // tile)
    programs = segments.num_seqs * row.num_heads
    parts = parts or num_parts(programs * tiles, int(cache.contexts.max()), block)
    part = torch.empty(tokens, heads, parts, dim, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    lse = torch.empty(tokens, heads, parts, dtype=torch.float32, device=q.device)
    _kv_parts[(programs, parts, tiles)](
        q, cache.rows, cache.block_tables, cache.context_lens, segments.cu_seqlens, part, lse,
        scale * 1.4426950408889634, cache.block_tables.stride(0), parts,
        ROW=cache.rows.stride(0), KV=row.num_heads, SHARE=share, DIM=dim, QUERIES=queries, TILE=tile,
        PAGE=cache.block_size, BLOCK=block, PDL=PDL, num_warps=4, num_stages=3, **LAUNCH,
    )  # fmt: skip
    if parts == 1:
        return part[:, :, 0]
    out = torch.empty_like(q)
    merge_parts(part, lse, out)
    return out


def cached_attention_supports(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> str | None:
    row = cache.row
    if not isinstance(row, KVRow) or index is not None:
        return "it attends to keys and values of several heads, without an indexer"
    if segments.longest > FEW or segments.num_tokens != segments.num_seqs * segments.longest:
        return f"it takes the same number of queries of every sequence, at most {FEW}"
    if row.head_dim > 256:
        return f"heads of {row.head_dim} numbers do not fit into a multiprocessor; it takes 256 at most"
    return odd_width(16, head=row.head_dim) or refusal(q, cache.rows)


@kernel
def _write_kv(
    k, v, slots, rows, k_row, v_row,
    ROW: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(slots + token).to(tl.int64) * ROW
    n = tl.arange(0, PADDED)
    inside = n < WIDTH
    tl.store(row + n, tl.load(k + token * k_row + n, inside), inside)
    tl.store(row + WIDTH + n, tl.load(v + token * v_row + n, inside), inside)


def write_kv(k: Tensor, v: Tensor, cache: LayerCache) -> None:
    """One program a token."""
    tokens, heads, dim = k.shape
    width = heads * dim
    _write_kv[(tokens,)](
        k, v, cache.slots, cache.rows, k.stride(0), v.stride(0), ROW=cache.rows.stride(0), WIDTH=width,
        PADDED=next_power_of_2(width), PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip


def write_kv_supports(k: Tensor, v: Tensor, cache: LayerCache) -> str | None:
    if any(x.stride(1) != x.shape[2] for x in (k, v)):
        return f"it takes heads side by side, not strides {k.stride()} and {v.stride()}"
    return rows_refusal(k, v, cache.rows)
