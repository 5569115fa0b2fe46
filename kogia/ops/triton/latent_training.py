"""What stands around latent attention in training, forward and backward: the norm and rotation behind the
down-projection, the rotation of queries, and keys of every head. Nothing is split or joined by a copy of its own."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import (
    LAUNCH,
    PDL,
    kernel,
    odd_width,
    refusal,
    trained_refusal,
    training_refusal,
    wait_for_inputs,
)
from kogia.ops.triton.norm_training import norm_backward, norm_forward

_TILE = 2048


@kernel
def _turned(pairs, cos, sin, token, there, HALF: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr):
    """Rows of [ROWS, 2 HALF] numbers in float32, neighbours turned by the angle of their token, or back by it."""
    half = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + token[:, None] * HALF + half, there[:, None], 0.0)
    s = tl.load(sin + token[:, None] * HALF + half, there[:, None], 0.0)
    if BACK:
        s = -s
    even, odd = tl.split(tl.reshape(pairs, (ROWS, HALF, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * HALF))


@kernel
def _turn(
    x, cos, sin, out, num_rows, heads, x_row, x_head, out_row, out_head,
    NOPE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BACK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows are the heads of the tokens, one after the other: [NOPE numbers, copied ; pairs, turned]."""
    wait_for_inputs(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    at = x + (token * x_row + head * x_head)[:, None]
    to = out + (token * out_row + head * out_head)[:, None]
    if NOPE:
        n = tl.arange(0, NOPE)[None, :]
        tl.store(to + n, tl.load(at + n, there[:, None], 0.0), there[:, None])
    n = NOPE + tl.arange(0, 2 * HALF)[None, :]
    pairs = tl.load(at + n, there[:, None], 0.0).to(tl.float32)
    turned = _turned(pairs, cos, sin, token, there, HALF, ROWS, BACK)
    tl.store(to + n, turned.to(out.dtype.element_ty), there[:, None])


@kernel
def _keys(
    both, shared, k, num_rows, heads, both_row, both_head, shared_row,
    NOPE: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k[t, h] = [NOPE numbers of both[t, h] ; shared[t]]."""
    wait_for_inputs(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < num_rows)[:, None]
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads).to(tl.int64)[:, None]
    to = k + row.to(tl.int64)[:, None] * (NOPE + ROPE)
    n, r = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :]
    tl.store(to + n, tl.load(both + token * both_row + head * both_head + n, there, 0.0), there)
    tl.store(to + NOPE + r, tl.load(shared + token * shared_row + r, there, 0.0), there)


@kernel
def _keys_backward(
    grad_k, grad_v, grad_both, grad_shared, num_tokens, heads, k_row, k_head, v_row, v_head,
    NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some tokens, one head after the other: the gradient of the shared part is their sum, in that order."""
    wait_for_inputs(PDL)
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    there = token < num_tokens
    n, r, c = tl.arange(0, NOPE)[None, :], tl.arange(0, ROPE)[None, :], tl.arange(0, V)[None, :]
    total = tl.zeros((ROWS, ROPE), tl.float32)
    for head in range(heads):
        k = grad_k + token * k_row + head * k_head
        to = grad_both + (token * heads + head) * (NOPE + V)
        tl.store(to + n, tl.load(k + n, there, 0.0), there)
        tl.store(to + NOPE + c, tl.load(grad_v + token * v_row + head * v_head + c, there, 0.0), there)
        total += tl.load(k + NOPE + r, there, 0.0).to(tl.float32)
    tl.store(grad_shared + token * ROPE + r, total.to(grad_shared.dtype.element_ty), there)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, nope: int, *, back: bool) -> None:
    """`x` and `out` are [tokens, heads, nope + rope] with strides of their own."""
    tokens, heads, width = x.shape
    rows = _rows(width)
    _turn[(triton.cdiv(tokens * heads, rows),)](
        x, cos, sin, out, tokens * heads, heads, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        NOPE=nope, HALF=(width - nope) // 2, ROWS=rows, BACK=back, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip


def _rows(width: int) -> int:
    return max(1, min(32, _TILE // triton.next_power_of_2(width)))


class _Query(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.nope = nope
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _rotate(q, cos, sin, out, nope, back=False)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = _dense_rows(grads[0])
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _rotate(grad, cos, sin, out, ctx.nope, back=True)
        return out, None, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate_query(q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> Tensor:
    return _Query.apply(q, cos, sin, nope)  # pyright: ignore[reportReturnType]


def rotate_query_supports(q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> str | None:
    return (
        _refusal(q)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or odd_width(2, nope=nope, rope=q.shape[2] - nope)
        or trained_refusal(q)
    )


def _refusal(x: Tensor) -> str | None:
    return training_refusal() or (None if x.numel() else f"it takes no empty tensor, as one of {tuple(x.shape)} is")


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rank = weight.shape[0]
        _, normed, scale = norm_forward(kv[:, :rank], weight, eps)
        key = torch.empty(kv.shape[0], 1, kv.shape[1] - rank, dtype=kv.dtype, device=kv.device)
        _rotate(kv[:, None, rank:], cos, sin, key, 0, back=False)
        ctx.save_for_backward(kv, weight, scale, cos, sin)
        return normed, key

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        kv, weight, scale, cos, sin = ctx.saved_tensors
        rank = weight.shape[0]
        grad_kv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
        _, grad_weight = norm_backward(grads[0], kv[:, :rank], weight, scale, out=grad_kv[:, :rank])
        _rotate(_dense_rows(grads[1]), cos, sin, grad_kv[:, None, rank:], 0, back=True)
        return grad_kv, grad_weight, None, None, None


def latent_and_key(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _Latent.apply(kv, weight, cos, sin, eps)  # pyright: ignore[reportReturnType]


def latent_and_key_supports(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> str | None:
    return (
        _refusal(kv)
        or refusal(cos, sin, dtypes=(torch.float32,))
        or odd_width(2, rope=kv.shape[1] - weight.shape[0])
        or trained_refusal(kv, weight)
    )


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: Tensor, key: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        tokens, heads, width = both.shape
        rope = key.shape[2]
        ctx.nope, ctx.shape = nope, (tokens, heads, width, rope)
        k = torch.empty(tokens, heads, nope + rope, dtype=both.dtype, device=both.device)
        rows = _rows(nope + rope)
        _keys[(triton.cdiv(tokens * heads, rows),)](
            both, key, k, tokens * heads, heads, both.stride(0), both.stride(1), key.stride(0),
            NOPE=nope, ROPE=rope, ROWS=rows, PDL=PDL, num_warps=4, **LAUNCH,
        )  # fmt: skip
        return k, both[..., nope:]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, heads, width, rope = ctx.shape
        nope = ctx.nope
        grad_k, grad_v = map(_dense_rows, grads)
        grad_both = torch.empty(tokens, heads, width, dtype=grad_k.dtype, device=grad_k.device)
        grad_key = torch.empty(tokens, 1, rope, dtype=grad_k.dtype, device=grad_k.device)
        rows = _rows(nope + rope)
        _keys_backward[(triton.cdiv(tokens, rows),)](
            grad_k, grad_v, grad_both, grad_key, tokens, heads, *grad_k.stride()[:2], *grad_v.stride()[:2],
            NOPE=nope, ROPE=rope, V=width - nope, ROWS=rows, PDL=PDL, num_warps=4, **LAUNCH,
        )  # fmt: skip
        return grad_both, grad_key, None


def keys_and_values(both: Tensor, key: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    return _KeysAndValues.apply(both, key, nope)  # pyright: ignore[reportReturnType]


def keys_and_values_supports(both: Tensor, key: Tensor, nope: int) -> str | None:
    return (
        _refusal(both)
        or odd_width(2, nope=nope, rope=key.shape[2], value=both.shape[2] - nope)
        or trained_refusal(both, key)
    )
