"""AdamW in one pass over each weight: gradient, moments and weight are read once and written once, with the copy of 16
bits that the model multiplies with."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.adamw import Trained, TrainedGroup
from kogia.ops.triton.common import LAUNCH, PDL, kernel, wait_for_inputs

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 2048


@kernel
def _adamw(
    weight, grad, first, second, copy, scale, corrections, numel, lr, rise1, beta2, rise2, eps, decay,
    SCALED: tl.constexpr, COPIED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < numel
    g = tl.load(grad + n, inside, 0.0).to(tl.float32)
    if SCALED:
        g *= tl.load(scale).to(tl.float32)
    w = tl.load(weight + n, inside, 0.0)
    m = tl.load(first + n, inside, 0.0).to(tl.float32)
    v = tl.load(second + n, inside, 0.0).to(tl.float32)
    m += rise1 * (g - m)
    v = beta2 * v + rise2 * g * g
    w -= lr * decay * w
    w -= lr / tl.load(corrections) * m / (tl.sqrt(v) / tl.load(corrections + 1) + eps)
    tl.store(first + n, m.to(first.dtype.element_ty), inside)
    tl.store(second + n, v.to(second.dtype.element_ty), inside)
    tl.store(weight + n, w, inside)
    if COPIED:
        tl.store(copy + n, w.to(copy.dtype.element_ty), inside)


def adamw(
    group: TrainedGroup,
    scale: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    # the largest first: the device is busy with them while the host launches the many small ones
    members = sorted(group.members, key=lambda each: -each.weight.numel())
    torch._foreach_add_([each.step for each in members], 1)
    rates = {"lr": lr, "rise1": 1 - betas[0], "beta2": betas[1], "rise2": 1 - betas[1], "eps": eps}
    for each, corrections in zip(members, _corrections(members, betas).unbind(), strict=True):
        numel = each.weight.numel()
        _adamw[(triton.cdiv(numel, _BLOCK),)](
            each.weight, each.grad, each.first, each.second, each.weight if each.copy is None else each.copy,
            each.weight if scale is None else scale, corrections, numel, **rates, decay=weight_decay,
            SCALED=scale is not None, COPIED=each.copy is not None, BLOCK=_BLOCK, PDL=PDL, num_warps=8, **LAUNCH,
        )  # fmt: skip


def _corrections(members: Sequence[Trained], betas: tuple[float, float]) -> Tensor:
    """1 - b1^t and sqrt(1 - b2^t) of each, in rows of 16 bytes."""
    steps = torch.stack([each.step for each in members]).double()
    pair = 1 - torch.pow(betas[0], steps), (1 - torch.pow(betas[1], steps)).sqrt_()
    return torch.stack((*pair, *pair), 1).float()


def adamw_supports(
    group: TrainedGroup,
    scale: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> str | None:
    for each in group.members:
        tensors = [x for x in (each.weight, each.grad, each.first, each.second, each.copy) if x is not None]
        if each.weight.dtype != torch.float32 or any(x.dtype not in _DTYPES for x in tensors):
            return f"it takes float32 weights and others of {_DTYPES}, not {[x.dtype for x in tensors]}"
        if any(not x.is_contiguous() or not x.numel() for x in tensors):
            return f"it takes contiguous tensors, not strides {[x.stride() for x in tensors]}"
        if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
            return f"it takes plain tensors, not {type(each.weight).__name__}"
    return None


@kernel
def _add(total, more, out, numel, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = n < numel
    a, b = tl.load(total + n, inside, 0.0).to(tl.float32), tl.load(more + n, inside, 0.0).to(tl.float32)
    tl.store(out + n, a + b, inside)


def added_up(total: Tensor, more: Tensor) -> Tensor:
    out = total if total.dtype == torch.float32 else torch.empty_like(total, dtype=torch.float32)
    numel = total.numel()
    _add[(triton.cdiv(numel, _BLOCK),)](total, more, out, numel, BLOCK=_BLOCK, PDL=PDL, num_warps=8, **LAUNCH)
    return out


def added_up_supports(total: Tensor, more: Tensor) -> str | None:
    for x in (total, more):
        if x.dtype not in _DTYPES or not x.is_contiguous() or not x.numel() or type(x) is not Tensor:
            return f"it takes plain contiguous tensors, not {x.dtype} with strides {x.stride()}"
    return None
