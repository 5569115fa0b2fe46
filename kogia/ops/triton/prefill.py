"""Causal attention over packed sequences with their own lengths: no padding, no grid, no mask in memory.

One program has a block of queries of one head and runs over the keys with the running maximum and sum of the online
softmax (FlashAttention-2, arXiv 2307.08691). Queries stand at the end of their sequence's keys. Query and key may be
wider than a power of two, as latent attention's 128 + 64 are: they are read in two parts.
"""

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors
from kogia.ops.triton.common import LAUNCH, PDL, cdiv, kernel, rows_refusal, wait_for_inputs


@kernel
def _attend(
    acc, best, total, q_a, q_b, k_at, v_at, start, stop, count, last, scale, k_row, v_row,
    A: tl.constexpr, B: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    wide, narrow, value = tl.arange(0, A), tl.arange(0, B if B > 0 else 1), tl.arange(0, V)
    for j in range(start, stop, BLOCK_N):
        key = j + tl.arange(0, BLOCK_N)
        at = k_at + key[None, :].to(tl.int64) * k_row
        if MASK:
            there = key < count
            s = tl.dot(q_a, tl.load(at + wide[:, None], there[None, :], 0.0))
            if B > 0:
                s = tl.dot(q_b, tl.load(at + A + narrow[:, None], there[None, :], 0.0), s)
            s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        else:
            s = tl.dot(q_a, tl.load(at + wide[:, None]))
            if B > 0:
                s = tl.dot(q_b, tl.load(at + A + narrow[:, None]), s)
        new = tl.maximum(best, tl.max(s, 1) * scale)
        w = tl.exp2(s * scale - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(w, 1)
        v_block = v_at + key[:, None].to(tl.int64) * v_row + value[None, :]
        if MASK:
            v = tl.load(v_block, (key < count)[:, None], 0.0)
        else:
            v = tl.load(v_block)
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None])
        best = new
    return acc, best, total


@kernel
def _varlen(
    q, k, v, out, cu_q, cu_k, scale, q_row, q_head, k_row, k_head, v_row, v_head, heads,
    SHARE: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    head, seq = tl.program_id(1), tl.program_id(2)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    q0, k0 = tl.load(cu_q + seq), tl.load(cu_k + seq)
    queries, count = (tl.load(cu_q + seq + 1) - q0).to(tl.int32), (tl.load(cu_k + seq + 1) - k0).to(tl.int32)
    if block * BLOCK_M >= queries:
        return
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < queries
    context = count - queries
    wide, narrow, value = tl.arange(0, A), tl.arange(0, B if B > 0 else 1), tl.arange(0, V)
    q_at = q + (q0 + m)[:, None].to(tl.int64) * q_row + head * q_head
    q_a = tl.load(q_at + wide[None, :], real[:, None], 0.0)
    q_b = q_a
    if B > 0:
        q_b = tl.load(q_at + A + narrow[None, :], real[:, None], 0.0)
    k_at = k + k0.to(tl.int64) * k_row + (head // SHARE) * k_head
    v_at = v + k0.to(tl.int64) * v_row + (head // SHARE) * v_head
    acc = tl.zeros((BLOCK_M, V), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    last = context + m
    seen_by_all = (context + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N  # whole blocks before the first query's own key
    stop = tl.minimum(context + (block + 1) * BLOCK_M, count)
    acc, best, total = _attend(
        acc, best, total, q_a, q_b, k_at, v_at, 0, seen_by_all, count, last, scale, k_row, v_row,
        A, B, V, BLOCK_N, False,
    )  # fmt: skip
    acc, best, total = _attend(
        acc, best, total, q_a, q_b, k_at, v_at, seen_by_all, stop, count, last, scale, k_row, v_row,
        A, B, V, BLOCK_N, True,
    )  # fmt: skip
    to = out + ((q0 + m)[:, None].to(tl.int64) * heads + head) * V + value[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), real[:, None])


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    keys: Segments | None = None,
    config: tuple[int, int, int, int] = (128, 64, 8, 3),
) -> Tensor:
    """One launch for all sequences."""
    tokens, heads, width = q.shape
    keys = segments if keys is None else keys
    a, b = _split(width)
    out = torch.empty(tokens, heads, v.shape[2], dtype=q.dtype, device=q.device)
    block_m, block_n, warps, stages = config
    _varlen[(cdiv(segments.longest, block_m), heads, segments.num_seqs)](
        q, k, v, out, segments.cu_seqlens, keys.cu_seqlens, scale * 1.4426950408889634,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads,
        SHARE=heads // k.shape[1], A=a, B=b, V=v.shape[2], BLOCK_M=block_m, BLOCK_N=block_n,
        PDL=PDL, num_warps=warps, num_stages=stages, **LAUNCH,
    )  # fmt: skip
    return out


def varlen_attention_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    keys: Segments | None = None,
) -> str | None:
    if index is not None:
        return "it has no selected keys"
    a, b = _split(q.shape[2])
    if a < 16 or a + b != q.shape[2] or v.shape[2] & (v.shape[2] - 1) or not 16 <= v.shape[2] <= 128 or a > 128:
        return f"it takes widths that are powers of two up to 128, or two of them; not {q.shape[2]} and {v.shape[2]}"
    return rows_refusal(q, k, v)


def _split(width: int) -> tuple[int, int]:
    """The largest power of two in `width`, and the rest if that is one of at least 16, else 0."""
    a = 1 << (width.bit_length() - 1)
    b = width - a
    return a, b if b >= 16 and not b & (b - 1) else 0
