"""Latent attention over the paged cache (absorbed MLA, DeepSeek-V2 section 2.1.2): one key head for all query heads.

A program reads one part of one sequence's rows for a tile of its queries; a second launch merges the parts by their
log-sums. Rows are read once: the first `latent` numbers are keys and values at once. They are taken as two halves with
a sum of scores each, so that half as many products wait for one another. (Turning the products round, with
the keys as the M side of the tensor cores, was slower in Triton at every shape that was tried.)
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.prefill import FEW
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors
from kogia.ops.triton.common import LAUNCH, PDL, kernel, next_power_of_2, odd_width, refusal, wait_for_inputs


@kernel
def _latents(row, there, first, like, LATENT: tl.constexpr, WIDTH: tl.constexpr, FP8: tl.constexpr):
    """[rows, WIDTH] numbers of rows' latents, from the `first` on, in the dtype of `like`."""
    lat = first + tl.arange(0, WIDTH)
    if FP8:  # one scale for 128 numbers, behind them
        GROUP: tl.constexpr = WIDTH if WIDTH < 128 else 128
        codes = tl.load(row[:, None] + lat[None, :], there[:, None], 0)
        group = first // 128 + tl.arange(0, WIDTH // GROUP)
        scales = (row + LATENT).to(tl.pointer_type(tl.float32))[:, None] + group[None, :]
        factor = tl.load(scales, there[:, None], 0.0)
        grouped = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        grouped = tl.reshape(grouped, (row.shape[0], WIDTH // GROUP, GROUP))
        numbers = tl.reshape(grouped * factor[:, :, None], (row.shape[0], WIDTH)).to(like.dtype)
    else:
        numbers = tl.load(row[:, None] + lat[None, :], there[:, None], 0.0)
    return numbers


@kernel
def _parts(
    q, rows, tables, context_lens, cu_seqlens, part, part_lse, scale, table_width, num_parts,
    ROW: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, QUERIES: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Softmax numerators of one part: part[token, head, p] = sum_j p_j c_j / sum_j p_j, and its log2-sum."""
    seq, p, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_inputs(PDL)
    length = tl.load(context_lens + seq).to(tl.int32)
    first = tl.load(cu_seqlens + seq)
    chunk = tl.cdiv(tl.cdiv(length, num_parts), BLOCK) * BLOCK
    start = p * chunk
    stop = tl.minimum(start + chunk, length)
    m = tile * TILE + tl.arange(0, TILE)  # rows of [queries, heads]
    token, head = m // HEADS, m % HEADS
    real = m < QUERIES * HEADS
    lse_at = part_lse + ((first + token) * HEADS + head) * num_parts + p
    if (start >= stop) & (num_parts > 1):
        tl.store(lse_at, tl.full((TILE,), float("-inf"), tl.float32), real)
        return
    last = length - QUERIES + token  # the position of each query
    q_at = q + ((first + token) * HEADS + head) * (LATENT + ROPE)
    WIDTH: tl.constexpr = LATENT // 2 if HALVES else LATENT
    lat, rot = tl.arange(0, WIDTH), tl.arange(0, ROPE)
    q_lat = tl.load(q_at[:, None] + lat[None, :], real[:, None], 0.0)
    q_rot = tl.load(q_at[:, None] + LATENT + rot[None, :], real[:, None], 0.0)
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    if HALVES:
        q_far = tl.load(q_at[:, None] + WIDTH + lat[None, :], real[:, None], 0.0)
        acc_far = tl.zeros((TILE, WIDTH), tl.float32)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for j in range(start, stop, BLOCK):
        pos = j + tl.arange(0, BLOCK)
        there = pos < stop
        page = tl.load(tables + seq.to(tl.int64) * table_width + pos // PAGE, there, 0)
        row = rows + (page.to(tl.int64) * PAGE + pos % PAGE) * ROW
        kv = _latents(row, there, 0, q_lat, LATENT, WIDTH, FP8)
        if HALVES:
            far = _latents(row, there, WIDTH, q_lat, LATENT, WIDTH, FP8)
        turned = row + LATENT
        if FP8:
            turned = (turned + 4 * ((LATENT + 127) // 128)).to(tl.pointer_type(tl.bfloat16))
        kr = tl.load(turned[:, None] + rot[None, :], there[:, None], 0.0).to(q_rot.dtype)
        s = tl.dot(q_lat, tl.trans(kv))
        if HALVES:
            s += tl.dot(q_rot, tl.trans(kr), tl.dot(q_far, tl.trans(far)))
        else:
            s = tl.dot(q_rot, tl.trans(kr), s)
        s *= scale
        s = tl.where(there[None, :] & (pos[None, :] <= last[:, None]), s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        w = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(best - safe)
        total = total * shrink + tl.sum(w, 1)
        acc = tl.dot(w.to(kv.dtype), kv, acc * shrink[:, None])
        if HALVES:
            acc_far = tl.dot(w.to(kv.dtype), far, acc_far * shrink[:, None])
        best = new
    tl.store(lse_at, best + tl.log2(total), real)  # -inf where nothing was visible
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    at = part + (((first + token) * HEADS + head) * num_parts + p) * LATENT
    tl.store(at[:, None] + lat[None, :], (acc * inverse[:, None]).to(part.dtype.element_ty), real[:, None])
    if HALVES:
        to = at + WIDTH
        tl.store(to[:, None] + lat[None, :], (acc_far * inverse[:, None]).to(part.dtype.element_ty), real[:, None])


@kernel
def _merge(
    part, part_lse, out, num_parts,
    LATENT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = the parts' mean, weighted by their sums; a row is one head of one token."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    p, lat = tl.arange(0, PADDED), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lse = tl.load(part_lse + row * num_parts + p, p < num_parts, float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    used = tl.max(tl.where(lse > float("-inf"), p + 1, 0), 0)  # what is behind saw nothing, and was not written
    mixed = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, used, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        weight = tl.exp2(tl.load(part_lse + row * num_parts + i, i < used, float("-inf")) - top) / total
        at = part + (row * num_parts + i[:, None]) * LATENT + lat[None, :]
        mixed += tl.sum(tl.load(at, (weight > 0)[:, None], 0.0) * weight[:, None], 0)
    tl.store(out + row * LATENT + lat, mixed.to(out.dtype.element_ty))


def num_parts(programs: int, longest: int, block: int) -> int:
    """Parts per sequence that fill the chip about twice, and the shortest of two blocks."""
    return max(1, min(_PROGRAMS // programs, -(-longest // (2 * block)), _MOST_PARTS))


_PROGRAMS = 264
"""Two on each of a Hopper chip's multiprocessors."""
_MOST_PARTS = 256


def cached_attention(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> Tensor:
    """Two launches: the parts, and their merging."""
    return merged(*attention_parts(q, cache, segments, scale), q.dtype)


def merged(part: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, latent] of the parts of `attention_parts`."""
    tokens, heads, parts, latent = part.shape
    if parts == 1:
        return part[:, :, 0]
    out = torch.empty(tokens, heads, latent, dtype=dtype, device=part.device)
    merge_parts(part, lse, out)
    return out


def part_buffers(q: Tensor, parts: int, latent: int) -> tuple[Tensor, Tensor]:
    """Room for `attention_parts`: a single part is the result itself, several are float32."""
    tokens, heads, _ = q.shape
    part = torch.empty(tokens, heads, parts, latent, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    return part, torch.empty(tokens, heads, parts, dtype=torch.float32, device=q.device)


def merge_parts(part: Tensor, lse: Tensor, out: Tensor) -> None:
    tokens, heads, parts, latent = part.shape
    block, at_once = latent, 64
    if tokens * heads <= 512:
        block, at_once = (min(latent, 64), 64) if parts <= 64 else (min(latent, 32), 128)
    _merge[(tokens * heads, latent // block)](
        part, lse, out, parts, LATENT=latent, PADDED=next_power_of_2(parts), BLOCK=block,
        AT_ONCE=min(at_once, next_power_of_2(parts)), PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip


def attention_parts(
    q: Tensor, cache: LayerCache, segments: Segments, scale: float, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """([tokens, heads, parts, latent] normalised mixtures, [tokens, heads, parts] log2-sums)."""
    row = cache.row
    assert isinstance(row, LatentRow)
    heads, queries = q.shape[1], segments.longest
    tile = min(64, max(16, next_power_of_2(queries * heads)))
    block, warps, stages = (32, 4, 5) if tile <= 32 else (64, 8, 3)
    tiles = -(-queries * heads // tile)
    parts = parts or num_parts(segments.num_seqs * tiles, int(cache.contexts.max()), block)
    part, lse = part_buffers(q, parts, row.latent)
    _parts[(segments.num_seqs, parts, tiles)](
        q, cache.rows, cache.block_tables, cache.context_lens, segments.cu_seqlens, part, lse,
        scale * _LOG2_E, cache.block_tables.stride(0), parts,
        ROW=cache.rows.stride(0), HEADS=heads, LATENT=row.latent, ROPE=row.rope, QUERIES=queries, TILE=tile,
        PAGE=cache.block_size, BLOCK=block, HALVES=row.latent >= 32, FP8=row.fp8, PDL=PDL, num_warps=warps,
        num_stages=stages,
        **LAUNCH,
    )  # fmt: skip
    return part, lse


_LOG2_E = 1.4426950408889634


def cached_attention_supports(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> str | None:
    row = cache.row
    if not isinstance(row, LatentRow) or index is not None or row.index:
        return "it attends to latent rows, without an indexer"
    if segments.longest > FEW or segments.num_tokens != segments.num_seqs * segments.longest:
        return f"it takes the same number of queries of every sequence, at most {FEW}"
    if row.latent > 512:
        return f"latents of {row.latent} numbers do not fit into a multiprocessor; it takes 512 at most"
    if row.fp8 and row.width % 16:
        return f"it reads FP8 rows 16 bytes at a time; these have {row.width}"
    stored = torch.uint8 if row.fp8 else q.dtype
    return odd_width(16, latent=row.latent, rope=row.rope) or refusal(q) or refusal(cache.rows, dtypes=(stored,))
