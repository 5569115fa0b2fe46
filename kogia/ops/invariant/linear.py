"""Linear layers over blocks of rows."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.invariant.rows import times
from kogia.ops.packed import Packed


def linear(
    x: Float[Tensor, "... in"], weight: Tensor | Packed, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "... out"]:
    """Packed weights are made dense for each call."""
    y = times(x.flatten(0, -2), _dense(weight, x.dtype)).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def linear_supports(x: Tensor, weight: Tensor | Packed, bias: Tensor | None = None) -> str | None:
    return None


def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Tensor | Packed, counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """One expert at a time, which waits for `counts`; nobody's rows are zeros."""
    sizes: list[int] = counts.tolist()
    parts = x[: sum(sizes)].split(sizes)
    used = [e for e, size in enumerate(sizes) if size]
    out = [times(parts[e], _dense(weight[e], x.dtype).flatten(0, -2)) for e in used]
    width = math.prod(weight.data.shape[1:-1])
    return torch.cat([*out, x.new_zeros(x.shape[0] - sum(sizes), width)])


def grouped_linear_supports(x: Tensor, weight: Tensor | Packed, counts: Tensor) -> str | None:
    return None


def _dense(weight: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    return weight.dense(dtype) if isinstance(weight, Packed) else weight
