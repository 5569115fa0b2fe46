"""Products by PyTorch's own fused kernels, where they take the arguments."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.packed import Packed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes that the strides of grouped_mm's operands must be multiples of


def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Tensor | Packed, counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """One `grouped_mm` over all experts. Rows that are nobody's go to the last expert: the kernel would leave theirs
    uninitialised, forward and backward."""
    assert isinstance(weight, Tensor), "see grouped_linear_supports"
    ends = counts.cumsum(0).int()
    ends[-1:].fill_(x.shape[0])  # an assignment would copy the number from the host and wait for it
    return F.grouped_mm(x, weight.flatten(1, -2).transpose(1, 2), offs=ends)


def grouped_linear_supports(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> str | None:
    if isinstance(weight, Packed):
        return f"grouped_mm takes dense weights, not {weight.format}"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"grouped_mm takes rows and weights of one of {_DTYPES}, not {x.dtype} and {weight.dtype}"
    for name, width in (("input", x.shape[1]), ("output", math.prod(weight.shape[1:-1]))):
        if width * x.element_size() % _ALIGNMENT:
            return f"grouped_mm wants rows of a multiple of {_ALIGNMENT} bytes; {width} {name} numbers are not"
    return None
