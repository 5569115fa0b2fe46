"""The mixture of experts: logits over blocks of rows, activations that are one function everywhere, sums in order."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.invariant.rows import times
from kogia.ops.moe import Routed, choose_and_weigh


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def route(
    x: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "experts dim"],
    bias: Float[Tensor, " experts"] | None,
    *,
    score: str,
    **options: Any,
) -> Routed:
    logits = times(x.float(), weight.float())
    scores = _sigmoid(logits) if score == "sigmoid" else logits.softmax(-1)
    return choose_and_weigh(scores, bias, ordered=True, **options)


def route_supports(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> str | None:
    return None


def silu_mul(gate: Float[Tensor, "rows width"], up: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    wide = gate.float()
    return (wide * _sigmoid(wide)).to(gate.dtype) * up


def silu_mul_supports(gate: Tensor, up: Tensor) -> str | None:
    return None


def gathered_sum(
    y: Float[Tensor, "routed dim"],
    inverse: Int[Tensor, " routed"],
    weights: Float[Tensor, "tokens topk"],
    *added: Float[Tensor, "tokens dim"],
) -> Float[Tensor, "tokens dim"]:
    """One choice after the other, in float32."""
    by_copy = y.index_select(0, inverse).view(*weights.shape, y.shape[1])
    weights = weights.to(y.dtype).float()
    total = torch.zeros_like(by_copy[:, 0], dtype=torch.float32)
    for choice in range(weights.shape[1]):
        total += weights[:, choice, None] * by_copy[:, choice].float()
    total = total.to(y.dtype)
    for each in added:
        total = each + total
    return total


def gathered_sum_supports(y: Tensor, inverse: Tensor, weights: Tensor, *added: Tensor) -> str | None:
    return None
