"""Routing, and experts of which only the chosen ones are read."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kogia.ops.cpu.common import (
    DTYPES,
    NO_WEIGHT,
    Kernel,
    address,
    plain_refusal,
    refusal,
    vector_refusal,
    weight_fields,
    weight_refusal,
    weight_width,
)
from kogia.ops.moe import Activation, Routed, SharedExperts
from kogia.ops.packed import Packed

_mix_experts = Kernel("kogia_mix_experts", "7q 2q 5q5q q 5q5q5q 3q")
_silu_mul = Kernel("kogia_silu_mul", "9q 3q")
_silu_mul_backward = Kernel("kogia_silu_mul_backward", "9q 3q")
_weighted_silu_mul = Kernel("kogia_weighted_silu_mul", "6q 3q")
_weighted_silu_mul_backward = Kernel("kogia_weighted_silu_mul_backward", "6q 3q")
_sum_copies = Kernel("kogia_sum_copies", "2q 3q 2q")
_route = Kernel("kogia_route", "5q 3q 5q d 8q")


def mix_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gate and up of all copies of tokens, then down, then the sums; between them numbers stay float32, but for what
    the products take."""
    (tokens, dim), topk = x.shape, expert_ids.shape[1]
    out = torch.empty_like(x)
    shared_width = 0 if shared is None else len(shared[0])
    shared_fields = NO_WEIGHT * 3 if shared is None else [each for one in shared for each in weight_fields(one)]
    _mix_experts(
        x.data_ptr(), DTYPES[x.dtype], tokens, dim, topk, len(gate_up), weight_width(down),
        expert_ids.data_ptr(), weights.data_ptr(), *weight_fields(gate_up), *weight_fields(down),
        shared_width, *shared_fields, address(residual), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mix_experts_supports(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Tensor | None = None,
) -> str | None:
    if torch.is_grad_enabled():
        return "it has no backward"
    if shared is not None and _form(shared[0]) != _form(shared[1]):
        return f"shared experts whose gate is {_form(shared[0])} and whose up is {_form(shared[1])}"
    groups = {weight_fields(each)[-1] for each in (gate_up, *(shared or ())[:2]) if _form(each) == "int4"}
    if len(groups) > 1:
        return f"rows that meet int4 groups of {min(groups)} and of {max(groups)} numbers"
    for each in (gate_up, down, *(shared or ())):
        if reason := weight_refusal(each, x):
            return reason
    if residual is not None and residual.dtype != x.dtype:
        return f"it adds a residual of the dtype of the rows, not {residual.dtype} to {x.dtype}"
    others = () if residual is None else (residual,)
    return (
        refusal(x, *others) or refusal(weights, dtypes=(torch.float32,)) or refusal(expert_ids, dtypes=(torch.int64,))
    )


def _form(weight: Tensor | Packed) -> str:
    return weight.format if isinstance(weight, Packed) else "dense"


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
    given: Tensor | None = None,
    may_be_nobody: bool = False,
    activation: Activation | None = None,
) -> Routed:
    """One pass; an id of -1 weighs nothing."""
    (tokens, dim), experts = x.shape, weight.shape[0]
    trained, limits, thresholds = topk, None, None
    if activation is not None:
        topk, limits, thresholds = activation.most, activation.limits, activation.thresholds
    ids = torch.empty(tokens, topk, dtype=torch.int64)
    weights = torch.empty(tokens, topk, dtype=torch.float32)
    scores = torch.empty(tokens, experts, dtype=torch.float32)
    _route(
        x.data_ptr(), DTYPES[x.dtype], tokens, dim, experts, weight.data_ptr(), DTYPES[weight.dtype], address(bias),
        score == "softmax", topk, num_groups, topk_groups, normalize, scale,
        address(given), trained, address(limits), address(thresholds),
        ids.data_ptr(), weights.data_ptr(), scores.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return Routed(ids if given is None else given, weights, scores)


def route_supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    topk: int,
    given: Tensor | None = None,
    activation: Activation | None = None,
    **options: Any,
) -> str | None:
    if torch.is_grad_enabled():
        return "it has no backward"
    if given is not None and activation is not None:
        return "given choices of other numbers than the trained one are for the reference"
    if given is not None and given.shape[1] != topk:
        return f"{given.shape[1]} given choices are not topk = {topk}"
    return (
        refusal(x, weight)
        or (None if bias is None else refusal(bias, dtypes=(torch.float32,)))
        or (None if given is None else refusal(given, dtypes=(torch.int64,)))
        or (None if activation is None else _activation_refusal(activation))
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Rounded where the reference is."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SiluMul.apply(gate, up)  # pyright: ignore[reportReturnType]
    return _activated(gate, up)


class _SiluMul(torch.autograd.Function):
    """One pass each way, and nothing is kept but what is given."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _activated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad, grad_gate, grad_up = grads[0].contiguous(), torch.empty(gate.shape), torch.empty(up.shape)
        _silu_mul_backward(*_silu_fields(gate, up), grad.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr())
        return grad_gate, grad_up


def _activated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _silu_mul(*_silu_fields(gate, up, out), 0, 0, 0)
    return out


def _silu_fields(gate: Tensor, up: Tensor, out: Tensor | None = None) -> tuple[int, ...]:
    return (
        DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), address(out),
        *gate.shape, gate.stride(0), up.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def silu_mul_supports(gate: Tensor, up: Tensor) -> str | None:
    if gate.ndim != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        return "it takes rows whose numbers lie side by side"
    if gate.shape != up.shape:
        return f"{tuple(gate.shape)} and {tuple(up.shape)} are not alike"
    if gate.dtype not in DTYPES or up.dtype != gate.dtype:
        return f"it takes tensors of one of {tuple(DTYPES)}, not {gate.dtype} and {up.dtype}"
    needs_grad = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    return plain_refusal(gate, up) if needs_grad else None


def weighted_silu_mul(both: Tensor, weights: Tensor) -> Tensor:
    rows, width = both.shape[0], both.shape[1] // 2
    out = torch.empty(rows, width)
    _weighted_silu_mul(*_weighted_fields(both, weights, out), 0, 0, 0)
    return out


def weighted_silu_mul_supports(both: Tensor, weights: Tensor) -> str | None:
    return (
        refusal(both, weights, dtypes=(torch.float32,))
        or plain_refusal(both, weights)
        or vector_refusal(weights, len(both))
    )


def weighted_silu_mul_backward(grad: Tensor, both: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One pass, sums in float32."""
    out, grad_both, grad_weights = torch.empty(grad.shape), torch.empty(both.shape), torch.empty(weights.shape)
    made = grad_both.data_ptr(), grad_weights.data_ptr()
    _weighted_silu_mul_backward(*_weighted_fields(both, weights, out), grad.data_ptr(), *made)
    return grad_both, grad_weights, out


def _weighted_fields(both: Tensor, weights: Tensor, out: Tensor) -> tuple[int, ...]:
    return both.data_ptr(), weights.data_ptr(), out.data_ptr(), *out.shape, torch.get_num_threads()


def weighted_silu_mul_backward_supports(grad: Tensor, both: Tensor, weights: Tensor) -> str | None:
    return refusal(grad, dtypes=(torch.float32,)) or weighted_silu_mul_supports(both, weights)


def sum_copies(y: Tensor, inverse: Tensor, topk: int) -> Tensor:
    """One pass: what is gathered goes nowhere else."""
    tokens, dim = len(inverse) // topk, y.shape[1]
    out = torch.empty(tokens, dim)
    _sum_copies(y.data_ptr(), inverse.data_ptr(), tokens, topk, dim, out.data_ptr(), torch.get_num_threads())
    return out


def sum_copies_supports(y: Tensor, inverse: Tensor, topk: int) -> str | None:
    return plain_refusal(y) or refusal(y) or refusal(inverse, dtypes=(torch.int64,))


def _activation_refusal(activation: Activation) -> str | None:
    limits, thresholds = activation.limits, activation.thresholds
    return (None if limits is None else refusal(limits, dtypes=(torch.int64,))) or (
        None if thresholds is None else refusal(thresholds, dtypes=(torch.float32,))
    )
