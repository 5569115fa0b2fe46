"""Products with dense and quantised weights."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import DTYPES, Kernel, address, refusal, weight_fields, weight_refusal, weight_width
from kogia.ops.packed import Packed

_linear = Kernel("kogia_linear", "5q 5q 3q")
FLOAT32_ROWS = 128
"""Most rows of products in float32: for more there is `products.py`, which lays the weight out anew."""


def linear(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> Tensor:
    """One pass over the weight, whatever the number of rows up to some dozens."""
    width = weight_width(weight)
    features = weight.shape[0] if isinstance(weight, Tensor) else weight.data.shape[0]
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype)
    if out.numel():
        _linear(
            x.data_ptr(), DTYPES[x.dtype], x.numel() // width, features, width,
            *weight_fields(weight), address(bias), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


def linear_supports(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> str | None:
    if torch.is_grad_enabled() and isinstance(weight, Tensor) and weight.requires_grad:
        return "it has no backward"
    if x.shape[-1] != weight_width(weight):
        return f"rows of {x.shape[-1]} numbers do not fit a weight of {weight_width(weight)}"
    if isinstance(weight, Tensor) and weight.dtype == torch.float32 and x.numel() > FLOAT32_ROWS * x.shape[-1]:
        return f"in float32 it is for up to {FLOAT32_ROWS} rows, not {x.numel() // x.shape[-1]}"
    if bias is not None and bias.dtype != x.dtype:
        return f"it takes a bias in the dtype of the rows, not {bias.dtype} beside {x.dtype}"
    others = () if bias is None else (bias,)
    return refusal(x, *others) or weight_refusal(weight, x)
