"""Logits of routers by products of bfloat16 numbers that are added up in float32: the numbers are the same, widened or
not, and tensor cores multiply them."""

import torch
from torch import Tensor

_DTYPE = torch.bfloat16


class _Logits(torch.autograd.Function):
    """Gradients come in float32. They go into their products as the sum of two bfloat16 numbers, which has 16 bits."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        high = grads[0].to(_DTYPE)
        both = torch.cat((high, (grads[0] - high).to(_DTYPE)), 1)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            halves = torch.mm(both.T, x, out_dtype=torch.float32).chunk(2)
            grad_weight = (halves[0] + halves[1]).to(_DTYPE)
        return torch.mm(both, torch.cat((weight, weight))), grad_weight


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    return _Logits.apply(x, weight)  # pyright: ignore[reportReturnType]


def router_logits_supports(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype != _DTYPE or weight.dtype != _DTYPE:
        return f"it takes {_DTYPE}, not {x.dtype} and {weight.dtype}"
    if torch.compiler.is_compiling():
        return "torch.compile makes its own products"
    if len(weight) % 8 or x.shape[1] % 8 or not x.numel():
        return f"products want rows of a multiple of 16 bytes, and at least one; {tuple(weight.shape)} has others"
    return None
