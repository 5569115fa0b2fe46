"""Products with a weight that is dense or packed."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.packed import Packed

_are_rounded: ContextVar[bool] = ContextVar("_are_rounded", default=False)


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within the block, in this thread, kernels may round what they multiply of float32 numbers to bfloat16, and sum in
    float32: on processors with instructions for it that takes half the time. What cannot be done so is as without."""
    token = _are_rounded.set(True)
    try:
        yield
    finally:
        _are_rounded.reset(token)


def are_rounded() -> bool:
    """Whether this thread is within `rounded_products`."""
    return _are_rounded.get()


@op(cuda=("kogia.ops.triton.packed",))
def dequantize(weight: Packed, dtype: torch.dtype) -> Float[Tensor, "*stack out in"]:
    """The dense weight that a packed one stands for, rounded once to `dtype`."""
    return weight.dense(dtype)


@op(cpu=("kogia.ops.cpu.products",))
def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]) -> Float[Tensor, "rows columns"]:
    """a b^T without gradients: what products of layers, forward and backward, come down to. Both may be transposed
    views; with them a b is `product(a, b.T)`, and a^T b is `product(a.T, b.T)`."""
    return a @ b.T


@op(cuda=("kogia.ops.aten.linear",), cpu=("kogia.ops.cpu.products",))
def add_product(
    total: Float[Tensor, "rows columns"], a: Float[Tensor, "rows inner"], b: Float[Tensor, "columns inner"]
) -> Float[Tensor, "rows columns"]:
    """`total` += a b^T in place, without gradients, in the dtype of `total`, which may be the wider one."""
    return total.add_(product(a, b))


@op(
    invariant=("kogia.ops.invariant.linear",),
    cuda=("kogia.ops.w8a8.products", "kogia.ops.triton.linear"),
    cpu=("kogia.ops.cpu.linear", "kogia.ops.cpu.products"),
)
def linear(
    x: Float[Tensor, "... in"], weight: Tensor | Packed, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "... out"]:
    """x W^T + b. The reference makes a packed weight dense in the dtype of `x`; it takes no gradient."""
    return F.linear(x, _dense(weight, x.dtype), bias)


@op(cuda=("kogia.ops.aten.linear",))
def linears(x: Float[Tensor, "... in"], weights: Sequence[Float[Tensor, "_ in"]]) -> tuple[Float[Tensor, "... _"], ...]:
    """x W^T of several dense weights."""
    return tuple(linear(x, weight) for weight in weights)


@op(
    cuda=("kogia.ops.triton.hopper_grouped",),
    cpu=("kogia.ops.cpu.products",),
    any=("kogia.ops.aten.linear",),
    invariant=("kogia.ops.invariant.linear",),
)
def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Tensor | Packed, counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """Rows in expert order times the matrix of their expert, of [experts, out, in], without bias.

    Of [experts, parts, out, in] the outputs of all parts stand side by side. Rows beyond the sum of `counts` are
    nobody's: what comes out for them is finite and means nothing. The reference waits for `counts`; it takes one expert
    at a time, so that of packed weights only those in use are made dense.
    """
    sizes: list[int] = counts.tolist()
    nobodys = x.shape[0] - sum(sizes)
    parts = x.split([*sizes, nobodys])
    wanted = [e for e, size in enumerate(sizes) if size or isinstance(weight, Tensor)]
    out = [F.linear(parts[e], _dense(weight[e], x.dtype).flatten(0, -2)) for e in wanted]
    width = math.prod(weight.data.shape[1:-1])
    return torch.cat([*out, x.new_zeros(nobodys, width)])


@op(cpu=("kogia.ops.cpu.products",), any=("kogia.ops.aten.linear",))
def grouped_outer(
    a: Float[Tensor, "routed out"], b: Float[Tensor, "routed in"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "experts out in"]:
    """a_e^T b_e over the rows of each expert, without gradients: the gradient of a stack of weights. Rows beyond the
    sum of `counts` are zero in one of the two, and may be anybody's."""
    sizes = [*counts.tolist(), a.shape[0] - int(counts.sum())]
    parts = zip(a.split(sizes)[:-1], b.split(sizes)[:-1], strict=True)
    return torch.stack([part.T @ rows for part, rows in parts])


def _dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    return dequantize(weight, dtype) if isinstance(weight, Packed) else weight
