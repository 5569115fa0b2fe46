"""The linear layer of every projection, and of stacks of experts: dense, or packed in a format of kogia.ops.packed."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kogia.ops.blockwise import WeightForms
from kogia.ops.linear import linear, linears
from kogia.ops.packed import FORMATS, ZERO_NAME, Packed


@dataclass(frozen=True, eq=False)
class Fp8Training:
    """That a dense weight is multiplied in FP8 while it is trained, and how (kogia.ops.blockwise)."""

    fp8_gradient: bool
    """Whether the weight's gradient is a product in FP8 too."""
    power_of_two: bool
    """Whether the scales of what comes in are powers of two."""
    product: Callable[..., Any]
    """`fp8_linears`, or `fp8_experts` of a stack; torch.compile calls it as it is."""
    forms: WeightForms = field(default_factory=WeightForms)

    @property
    def kind(self) -> tuple[bool, bool]:
        """What layers have in common whose rows may be rounded once for all of them."""
        return self.fp8_gradient, self.power_of_two

    def __call__(self, *operands: Any) -> Any:
        return self.product(*operands, fp8_gradient=self.fp8_gradient, power_of_two=self.power_of_two)


class Linear(nn.Module):
    """x W^T + b, with one [out, in] weight or a stack of them.

    A packed weight is made dense in the dtype of the input where it is used, and takes no gradient; its scales and
    zeros are buffers beside it, under the names that they have in files.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False, stack: tuple[int, ...] = ()) -> None:
        """The weight is uninitialised. A stack has its axes in front: [*stack, out, in]."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shape = (*stack, out_features, in_features)
        """Of the dense weight."""
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.format: str | None = None
        """The weight's key in `FORMATS`, or None while it is dense."""
        self.fp8: Fp8Training | None = None
        """Set by `kogia.model.fp8`; it holds where gradients are taken, nowhere else."""
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        for each in FORMATS.values():
            self.register_buffer(each.scale_name, None)
        self.register_buffer(ZERO_NAME, None)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        if self.fp8 is None or not torch.is_grad_enabled():
            return linear(x, self.operand(), self.bias)
        (y,) = self.fp8(x, (self.weight,), (self.fp8.forms,))
        return y if self.bias is None else y + self.bias

    def operand(self) -> Tensor | Packed:
        """The weight as ops take it."""
        if self.format is None:
            return self.weight
        scale, zero = getattr(self, FORMATS[self.format].scale_name), getattr(self, ZERO_NAME)
        return Packed(self.weight, scale, zero, self.format)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "*stack out in"]:
        """The weight itself, or a dense copy in `dtype` of a packed one."""
        operand = self.operand()
        return operand.dense(dtype) if isinstance(operand, Packed) else operand

    def make_packed(self, format: str, *, zeros: bool = False) -> None:
        """Turn the weight into uninitialised storage of a format, on its device (meta included)."""
        self._hold(FORMATS[format].empty(self.shape, self.weight.device, zeros=zeros))

    @torch.no_grad()
    def pack(self, format: str, **options: Any) -> None:
        """Round a dense weight to a format; FP8 takes `power_of_two`, for scales that are, and int4 `asymmetric`."""
        self._hold(FORMATS[format].pack(self.weight, **options))

    @torch.no_grad()
    def store(self, dense: Float[Tensor, "*stack out in"]) -> None:
        """Round a dense weight into the packed storage that is there, one [out, in] matrix at a time."""
        operand = self.operand()
        assert isinstance(operand, Packed), "see make_packed"
        options = {} if operand.zero is None else {"asymmetric": True}
        for place in itertools.product(*map(range, self.shape[:-2])):
            packed = FORMATS[operand.format].pack(dense[place], **options)
            operand.data[place].copy_(packed.data)
            operand.scale[place].copy_(packed.scale)
            if operand.zero is not None and packed.zero is not None:
                operand.zero[place].copy_(packed.zero)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        """What `Module.to` and its like go through. A packed weight moves but is never cast: its numbers are codes."""
        operand = self.operand()
        if isinstance(operand, Packed):
            for stored in (operand.data, operand.scale):
                cast = fn(stored.new_empty(0)).dtype
                if cast != stored.dtype:
                    raise TypeError(
                        f"a weight stored as {operand.format} cannot be cast to {cast}: its scales would no longer "
                        "fit; load the model in that dtype (`load_model(path, dtype=...)`, or `kogia convert`)"
                    )
        return super()._apply(fn, recurse)

    def _hold(self, packed: Packed) -> None:
        self.format = packed.format
        self.weight = nn.Parameter(packed.data, requires_grad=False)
        setattr(self, FORMATS[packed.format].scale_name, packed.scale)
        setattr(self, ZERO_NAME, packed.zero)


def project(x: Float[Tensor, "... in"], *layers: Linear) -> tuple[Float[Tensor, "... _"], ...]:
    """What each of several layers makes of `x`. Where they are trained, their products share what they can."""
    if not torch.is_grad_enabled() or any(layer.bias is not None or layer.format is not None for layer in layers):
        return tuple(layer(x) for layer in layers)
    weights, first = [layer.weight for layer in layers], layers[0].fp8
    if all(layer.fp8 is None for layer in layers):
        return linears(x, weights)
    if first is None or any(layer.fp8 is None or layer.fp8.kind != first.kind for layer in layers):
        return tuple(layer(x) for layer in layers)
    return first(x, weights, [layer.fp8.forms for layer in layers if layer.fp8 is not None])
