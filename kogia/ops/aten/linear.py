"""Products by PyTorch's own fused kernels, where they take the arguments."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.linear import dequantize
from kogia.ops.packed import Packed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes that the strides of grouped_mm's operands must be multiples of


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        dx, dw = None, []
        for i, weight in enumerate(weights):
            dy = grads[i].reshape(len(rows), -1)
            if ctx.needs_input_grad[0]:
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dw.append(dy.T @ rows if ctx.needs_input_grad[1 + i] else None)
        return None if dx is None else dx.view(x.shape), *dw


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Backward, cuBLAS adds the gradients of x up, which would be a pass over them for each weight but the first."""
    return _Linears.apply(x, *weights)  # pyright: ignore[reportReturnType]


def linears_supports(x: Tensor, weights: Sequence[Tensor]) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile makes its own products"
    return None if torch.is_grad_enabled() and len(weights) > 1 else "it is for training, and two weights at least"


def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Tensor | Packed, counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """One `grouped_mm` over all experts. Rows that are nobody's go to the last expert: the kernel would leave theirs
    uninitialised, forward and backward. Packed weights are made dense first, all experts at once: to make only those
    in use dense, the host would have to wait for `counts`."""
    if isinstance(weight, Packed):
        weight = dequantize(weight, x.dtype)
    return F.grouped_mm(x, weight.flatten(1, -2).transpose(1, 2), offs=_ends(counts, x))


def _ends(counts: Tensor, x: Tensor) -> Int[Tensor, " experts"]:
    ends = counts.cumsum(0).int()
    ends[-1:].fill_(x.shape[0])  # an assignment would copy the number from the host and wait for it
    return ends


def grouped_linear_supports(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> str | None:
    if isinstance(weight, Packed) and x.device.type != "cuda":
        return "of packed weights only those in use are made dense, where waiting for their counts costs nothing"
    dtype = x.dtype if isinstance(weight, Packed) else weight.dtype
    if x.dtype not in _DTYPES or dtype != x.dtype:
        return f"grouped_mm takes rows and weights of one of {_DTYPES}, not {x.dtype} and {dtype}"
    shape = weight.data.shape
    for name, width in (("input", x.shape[1]), ("output", math.prod(shape[1:-1]))):
        if width * x.element_size() % _ALIGNMENT:
            return f"grouped_mm wants rows of a multiple of {_ALIGNMENT} bytes; {width} {name} numbers are not"
    return None


def grouped_outer(
    a: Float[Tensor, "routed out"], b: Float[Tensor, "routed in"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "experts out in"]:
    """One `grouped_mm`. Rows that are nobody's, of which one of the two is zero, go to the last expert."""
    return F.grouped_mm(a.T, b, offs=_ends(counts, a))


def grouped_outer_supports(a: Tensor, b: Tensor, counts: Tensor) -> str | None:
    if a.dtype not in _DTYPES or b.dtype != a.dtype:
        return f"grouped_mm takes operands of one of {_DTYPES}, not {a.dtype} and {b.dtype}"
    for width in (a.shape[1], b.shape[1]):
        if width * a.element_size() % _ALIGNMENT:
            return f"grouped_mm wants rows of a multiple of {_ALIGNMENT} bytes; {width} numbers are not"
    return None


def add_product(
    total: Float[Tensor, "rows columns"], a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]
) -> Float[Tensor, "rows columns"]:
    """cuBLAS adds in the float32 that it accumulates in: nothing is rounded to 16 bits, and one pass over `total`
    takes the place of a product's and a sum's."""
    return torch.addmm(total, a, b.T, out_dtype=torch.float32, out=total)


def add_product_supports(total: Tensor, a: Tensor, b: Tensor) -> str | None:
    if total.dtype != torch.float32 or a.dtype not in _HALVES or b.dtype != a.dtype:
        return f"it adds products of two of {_HALVES} to float32, not {a.dtype} and {b.dtype} to {total.dtype}"
    return None if total.is_contiguous() else "it adds to contiguous memory"
