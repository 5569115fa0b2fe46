"""Small modules every part of the model shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kogia.model.cache import StepCache
from kogia.model.config import Recompute
from kogia.model.linear import Linear, project
from kogia.model.routing import Routing
from kogia.ops.embed import embed
from kogia.ops.logprob import linear_logprob, linear_loss
from kogia.ops.moe import Activation, SharedExperts, silu_mul
from kogia.ops.norm import add_rms_norm, residual_sum, rms_norm
from kogia.ops.segments import Segments


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """What one forward pass shares between its layers: computed once, passed as an argument."""

    segments: Segments
    cos: Float[Tensor, "tokens half"]
    sin: Float[Tensor, "tokens half"]
    cache: StepCache | None = None
    routing: Routing | None = None
    """Choices to replay, and where they are recorded; None records nothing."""
    latent_ranks: Int[Tensor, " tokens"] | None = None
    """How much of each token's latent is left; nested dropout, without a cache only."""
    activation: Activation | None = None
    """How many routed experts tokens use; None is the number that the model was trained with."""
    recompute: Recompute = "none"
    """What of each layer the backward pass does again, instead of having kept it."""

    def run(self, part: Recompute, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """`compute(*args)`, which is `part` of a layer. Routers repeat their choices and count once (`Routing`)."""
        if self.recompute != part or not torch.is_grad_enabled():
            return compute(*args)
        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


class Embedding(nn.Embedding):
    def forward(self, input: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens dim"]:
        return embed(input, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return rms_norm(x, self.weight, self.eps)


class ResidualNorm(nn.Module):
    """The norm of a residual sum, which comes with it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self, x: Float[Tensor, "... dim"], delta: Float[Tensor, "... dim"]
    ) -> tuple[Float[Tensor, "... dim"], Float[Tensor, "... dim"]]:
        return add_rms_norm(x, delta, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Also the shared experts, fused into one of their total width."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(
        self, x: Float[Tensor, "tokens dim"], step: StepContext, residual: Float[Tensor, "tokens dim"] | None = None
    ) -> Float[Tensor, "tokens dim"]:
        """`residual` + FFN(x). `step` is what every feed-forward part takes; this one needs nothing of it."""
        y = self.down_proj(silu_mul(*project(x, self.gate_proj, self.up_proj)))
        return y if residual is None else residual_sum(residual, y)

    def operands(self) -> SharedExperts:
        """The weights, for an op that computes this part along with others."""
        return self.gate_proj.operand(), self.up_proj.operand(), self.down_proj.operand()


class Head(Linear):
    """The output head, applied to normed hidden states."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "rows dim"],
        targets: Int[Tensor, " rows"] | None = None,
        temperature: float = 1.0,
        *,
        summed: bool = False,
        counted: Bool[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows vocab"] | tuple[Tensor, ...]:
        """Logits; or, given `targets`, their log-probabilities and the entropies, without ever holding the logits; or,
        `summed`, the loss of those that are `counted`, which alone has a gradient, in front of the two."""
        if targets is None:
            return super().forward(x)
        if summed:
            return linear_loss(x, self.dense_weight(x.dtype), targets, counted)
        return linear_logprob(x, self.operand(), targets, temperature)
