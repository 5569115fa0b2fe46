"""Queries and keys of two parts in training, in float32: each in one pass, forward and backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kogia.ops.cpu.common import Kernel, address, plain_refusal, refusal, vector_refusal
from kogia.ops.cpu.norm import norm_gradients, rms_norm

_turn = Kernel("kogia_turn", "3q 4q 2q q 3q q")
_KEYS = "4q 6q"
_join_keys = Kernel("kogia_join_keys", _KEYS)
_join_keys_backward = Kernel("kogia_join_keys_backward", _KEYS)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, nope: int, *, back: bool = False) -> Tensor:
    """Into `out`; both are [tokens, heads, nope + rope], and heads may lie apart."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    _turn(
        x.data_ptr(), *x.stride()[:2], *x.shape[:2], nope, (x.shape[2] - nope) // 2, cos.data_ptr(), sin.data_ptr(),
        back, out.data_ptr(), *out.stride()[:2], torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Query(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.nope = nope
        return _rotate(q, cos, sin, torch.empty(q.shape), nope)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, torch.empty(grads[0].shape), ctx.nope, back=True), None, None, None


def rotate_query(q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> Tensor:
    return _Query.apply(q, cos, sin, nope)  # pyright: ignore[reportReturnType]


def rotate_query_supports(q: Tensor, cos: Tensor, sin: Tensor, nope: int) -> str | None:
    return plain_refusal(q) or _angles_refusal(cos, sin, len(q), q.shape[2] - nope)


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rank = len(weight)
        latent = kv[:, :rank].contiguous()
        ctx.save_for_backward(latent, weight, cos, sin)
        ctx.eps = eps
        key = torch.empty(kv.shape[0], 1, kv.shape[1] - rank)
        return rms_norm(latent, weight, eps), _rotate(kv[:, None, rank:], cos, sin, key, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        latent, weight, cos, sin = ctx.saved_tensors
        rank = len(weight)
        grad_latent, grad_weight = norm_gradients(grads[0], latent, weight, ctx.eps)
        grad = torch.empty(latent.shape[0], rank + grads[1].shape[2])
        grad[:, :rank] = grad_latent
        _rotate(grads[1], cos, sin, grad[:, None, rank:], 0, back=True)
        return grad, grad_weight, None, None, None


def latent_and_key(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _Latent.apply(kv, weight, cos, sin, eps)  # pyright: ignore[reportReturnType]


def latent_and_key_supports(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> str | None:
    return (
        plain_refusal(kv, weight)
        or vector_refusal(weight, len(weight))
        or _angles_refusal(cos, sin, len(kv), kv.shape[1] - len(weight))
    )


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both: Tensor, key: Tensor, nope: int) -> tuple[Tensor, Tensor]:
        ctx.sizes = sizes = (*both.shape[:2], nope, key.shape[2], both.shape[2] - nope)
        k = torch.empty(*both.shape[:2], nope + key.shape[2])
        _join_keys(*map(address, (both, key, k, None)), *sizes, torch.get_num_threads())
        return k, both[..., nope:]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, heads, nope, rope, v = ctx.sizes
        both, key = torch.empty(tokens, heads, nope + v), torch.empty(tokens, 1, rope)
        grad_k, grad_v = (each.contiguous() for each in grads)
        _join_keys_backward(*map(address, (both, key, grad_k, grad_v)), *ctx.sizes, torch.get_num_threads())
        return both, key, None


def keys_and_values(both: Tensor, key: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    return _KeysAndValues.apply(both, key, nope)  # pyright: ignore[reportReturnType]


def keys_and_values_supports(both: Tensor, key: Tensor, nope: int) -> str | None:
    if key.shape[:2] != (len(both), 1):
        return f"{tuple(key.shape)} is no key for all heads of {len(both)} tokens"
    for each in (both, key):
        if not each.is_contiguous():
            return f"it takes contiguous tensors, not strides {each.stride()} of shape {tuple(each.shape)}"
    return plain_refusal(both, key)


def _angles_refusal(cos: Tensor, sin: Tensor, tokens: int, rope: int) -> str | None:
    for each in (cos, sin):
        if each.shape != (tokens, rope // 2) or rope % 2:
            return f"it turns {tokens} tokens' {rope} numbers, in pairs, not by angles of shape {tuple(each.shape)}"
    return refusal(cos, sin, dtypes=(torch.float32,))
