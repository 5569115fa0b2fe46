"""What stands around latent attention: the cache row, the query in the latents' space, the values out of it."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.triton.common import LAUNCH, PDL, cdiv, kernel, odd_width, refusal, rows_refusal, wait_for_inputs


@kernel
def _write_codes(row, latent, FULL: tl.constexpr, LATENT: tl.constexpr):
    """E4M3 numbers of a latent and a scale for each 128 of them; returns where the rotary key follows. The arithmetic
    is `quantize_groups`', but for scales below float32's normal numbers."""
    GROUP: tl.constexpr = FULL if FULL < 128 else 128
    GROUPS: tl.constexpr = (LATENT + GROUP - 1) // GROUP
    grouped = tl.reshape(latent, (FULL // GROUP, GROUP))
    top = tl.max(tl.abs(grouped), 1)
    scale = tl.where(top > 0, tl.maximum(tl.div_rn(top, tl.full(top.shape, 448.0, tl.float32)), 2.0**-126), 1.0)
    codes = tl.div_rn(grouped, tl.broadcast_to(scale[:, None], grouped.shape)).to(tl.float8e4nv)
    lat, group = tl.arange(0, FULL), tl.arange(0, FULL // GROUP)
    tl.store(row + lat, tl.reshape(codes, (FULL,)).to(tl.uint8, bitcast=True), lat < LATENT)
    tl.store((row + LATENT).to(tl.pointer_type(tl.float32)) + group, scale, group < GROUPS)
    return (row + LATENT + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))


@kernel
def _write(
    kv, slots, rows, weight, cos, sin, eps, kv_stride,
    ROW: tl.constexpr, FULL: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(slots + token).to(tl.int64) * ROW
    at = kv + token * kv_stride
    lat = tl.arange(0, FULL)
    value = tl.load(at + lat)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / FULL + eps)
    normed = (wide * scale).to(value.dtype) * tl.load(weight + lat)
    turned = row + LATENT
    if FP8:
        turned = _write_codes(row, tl.where(lat < LATENT, normed.to(tl.float32), 0.0), FULL, LATENT)
    else:
        tl.store(row + lat, normed, lat < LATENT)
    half = tl.arange(0, ROPE // 2)
    c, s = tl.load(cos + token * (ROPE // 2) + half), tl.load(sin + token * (ROPE // 2) + half)
    even = tl.load(at + FULL + 2 * half).to(tl.float32)
    odd = tl.load(at + FULL + 2 * half + 1).to(tl.float32)
    tl.store(turned + 2 * half, (even * c - odd * s).to(value.dtype).to(turned.dtype.element_ty))
    tl.store(turned + 2 * half + 1, (even * s + odd * c).to(value.dtype).to(turned.dtype.element_ty))


def write_latent(
    kv: Tensor,
    cache: LayerCache,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    index_key: Tensor | None = None,
) -> None:
    """One program a token: norm, rotate, write."""
    row = cache.row
    assert isinstance(row, LatentRow)
    full = norm_weight.shape[0]
    _write[(kv.shape[0],)](
        kv, cache.slots, cache.rows, norm_weight, cos, sin, eps, kv.stride(0),
        ROW=cache.rows.stride(0), FULL=full, LATENT=row.latent, ROPE=row.rope, FP8=row.fp8, PDL=PDL,
        num_warps=1, **LAUNCH,
    )  # fmt: skip


def write_latent_supports(
    kv: Tensor,
    cache: LayerCache,
    norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    index_key: Tensor | None = None,
) -> str | None:
    row = cache.row
    if not isinstance(row, LatentRow) or index_key is not None:
        return "it writes latent rows without index keys"
    return (
        odd_width(2, latent=norm_weight.shape[0], rope=row.rope)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or rows_refusal(kv, norm_weight)
        or rows_refusal(cache.rows, dtypes=(torch.uint8 if row.fp8 else kv.dtype,))
    )


@kernel
def _absorb(
    q, up, cos, sin, out, num_tokens, q_stride, up_head, up_row,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, h] = [W_UK_h^T q_nope ; RoPE(q_rope)]; the last column of programs rotates."""
    wait_for_inputs(PDL)
    head, block = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = t < num_tokens
    at = q + t.to(tl.int64) * q_stride + head * (NOPE + ROPE)
    to = out + (t.to(tl.int64) * HEADS + head) * (LATENT + ROPE)
    if block == LATENT // BLOCK_N:
        half = tl.arange(0, ROPE // 2)
        angle = t[:, None] * (ROPE // 2) + half[None, :]
        c = tl.load(cos + angle, there[:, None], 0.0)
        s = tl.load(sin + angle, there[:, None], 0.0)
        pair = at[:, None] + NOPE + 2 * half[None, :]
        even = tl.load(pair, there[:, None], 0.0).to(tl.float32)
        odd = tl.load(pair + 1, there[:, None], 0.0).to(tl.float32)
        turned = to[:, None] + LATENT + 2 * half[None, :]
        tl.store(turned, (even * c - odd * s).to(out.dtype.element_ty), there[:, None])
        tl.store(turned + 1, (even * s + odd * c).to(out.dtype.element_ty), there[:, None])
    else:
        k, n = tl.arange(0, NOPE), block * BLOCK_N + tl.arange(0, BLOCK_N)
        w = tl.load(up + head * up_head + k[:, None] * up_row + n[None, :])
        x = tl.load(at[:, None] + k[None, :], there[:, None], 0.0)
        tl.store(to[:, None] + n[None, :], tl.dot(x, w).to(out.dtype.element_ty), there[:, None])


def absorb_query(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One launch: a tile of latent columns of one head, or that head's rotation, per program."""
    tokens, heads, width = q.shape
    nope, latent = w_uk.shape[1:]
    out = torch.empty(tokens, heads, latent + width - nope, dtype=q.dtype, device=q.device)
    block_t, block_n = 16, min(latent, 128)
    _absorb[(heads, latent // block_n + 1, cdiv(tokens, block_t))](
        q, w_uk, cos, sin, out, tokens, q.stride(0), w_uk.stride(0), w_uk.stride(1),
        HEADS=heads, NOPE=nope, ROPE=width - nope, LATENT=latent, BLOCK_T=block_t, BLOCK_N=block_n, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def absorb_query_supports(q: Tensor, w_uk: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    nope, latent = w_uk.shape[1:]
    if q.stride(1) != q.shape[2]:
        return f"it takes heads side by side, not strides {q.stride()}"
    return (
        odd_width(16, nope=nope, latent=latent)
        or odd_width(2, rope=q.shape[2] - nope)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or rows_refusal(q, w_uk)
    )


@kernel
def _values(
    mixed, up, out, num_tokens, up_head, up_row,
    HEADS: tl.constexpr, LATENT: tl.constexpr, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, h] = W_UV_h mixed[t, h]."""
    head = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = t < num_tokens
    at = mixed + (t.to(tl.int64) * HEADS + head) * LATENT
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    wait_for_inputs(PDL)
    for start in range(0, LATENT, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(at[:, None] + k[None, :], there[:, None], 0.0)
        w = tl.load(up + head * up_head + v[None, :] * up_row + k[:, None])
        acc = tl.dot(x, w, acc)
    to = out + (t.to(tl.int64) * HEADS + head) * V
    tl.store(to[:, None] + v[None, :], acc.to(out.dtype.element_ty), there[:, None])


def project_values(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """One launch: a tile of one head's values per program."""
    tokens, heads, latent = mixed.shape
    width = w_uv.shape[1]
    out = torch.empty(tokens, heads, width, dtype=mixed.dtype, device=mixed.device)
    block_t = 16 if tokens <= 16 else 64
    block_v = min(width, 16 if tokens <= 16 else 64)
    block_k = min(latent, 512 if tokens <= 16 else 256)
    _values[(heads, width // block_v, cdiv(tokens, block_t))](
        mixed, w_uv, out, tokens, w_uv.stride(0), w_uv.stride(1),
        HEADS=heads, LATENT=latent, V=width, BLOCK_T=block_t, BLOCK_V=block_v, BLOCK_K=block_k, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def project_values_supports(mixed: Tensor, w_uv: Tensor) -> str | None:
    if not mixed.is_contiguous():
        return f"it takes contiguous mixtures, not strides {mixed.stride()}"
    return odd_width(16, latent=w_uv.shape[2], value=w_uv.shape[1]) or rows_refusal(mixed, w_uv)


@kernel
def _join(
    nope, rope, cos, sin, out, num_tokens, heads, nope_row, nope_head, rope_row, rope_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, TURN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows are the heads of the tokens, one after the other."""
    wait_for_inputs(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (row < num_tokens * heads)[:, None]
    token, head = (row // heads)[:, None].to(tl.int64), (row % heads)[:, None]
    n, half = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE // 2)[None, :]
    to = out + row[:, None].to(tl.int64) * (NOPE + ROPE)
    tl.store(to + n, tl.load(nope + token * nope_row + head * nope_head + n, there, 0.0), there)
    pair = rope + token * rope_row + head * rope_head + 2 * half
    even, odd = tl.load(pair, there, 0.0), tl.load(pair + 1, there, 0.0)
    if TURN:
        c = tl.load(cos + token * (ROPE // 2) + half, there, 0.0)
        s = tl.load(sin + token * (ROPE // 2) + half, there, 0.0)
        first = even.to(tl.float32) * c - odd.to(tl.float32) * s
        odd = (even.to(tl.float32) * s + odd.to(tl.float32) * c).to(odd.dtype)
        even = first.to(even.dtype)
    tl.store(to + NOPE + 2 * half, even, there)
    tl.store(to + NOPE + 2 * half + 1, odd, there)


def join_rope(nope: Tensor, rope: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """One pass: both parts are read once."""
    tokens, heads, width = nope.shape
    out = torch.empty(tokens, heads, width + rope.shape[2], dtype=nope.dtype, device=nope.device)
    _join[(cdiv(tokens * heads, 16),)](
        nope, rope, cos if cos is not None else rope, sin if sin is not None else rope, out, tokens, heads,
        nope.stride(0), nope.stride(1), rope.stride(0), rope.stride(1) if rope.shape[1] > 1 else 0,
        NOPE=width, ROPE=rope.shape[2], TURN=cos is not None, BLOCK=16, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def join_rope_supports(nope: Tensor, rope: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> str | None:
    if cos is not None and sin is not None and (reason := refusal(cos, sin, dtypes=(torch.float32,))):
        return reason
    return odd_width(2, nope=nope.shape[2], rope=rope.shape[2]) or rows_refusal(nope, rope)
