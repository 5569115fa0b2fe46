"""The linear layer of every projection: dense, or with FP8 weights and their block scales (kogia.ops.fp8)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kogia.ops.fp8 import dequantize_blocks, quantize_blocks, scale_shape


class Linear(nn.Linear):
    """x W^T + b. An FP8 weight is dequantised to the dtype of the input when it is used; it takes no gradient."""

    weight_scale_inv: Tensor | None
    """[ceil(out / 128), ceil(in / 128)] float32 where the weight is FP8, else None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.register_buffer("weight_scale_inv", None)

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        return F.linear(input, self.dense_weight(input.dtype), self.bias)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight itself, or its dequantised copy in `dtype`."""
        if self.weight_scale_inv is None:
            return self.weight
        return dequantize_blocks(self.weight, self.weight_scale_inv, dtype)

    def make_fp8(self) -> None:
        """Turn the weight into uninitialised FP8 with uninitialised scales, on its device (meta included)."""
        device, shape = self.weight.device, self.weight.shape
        empty = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.weight_scale_inv = torch.empty(scale_shape(shape), dtype=torch.float32, device=device)

    @torch.no_grad()
    def quantize(self, *, power_of_two: bool = False) -> None:
        """Round a dense weight to FP8 blocks in place."""
        weight, self.weight_scale_inv = quantize_blocks(self.weight, power_of_two=power_of_two)
        self.weight = nn.Parameter(weight, requires_grad=False)
