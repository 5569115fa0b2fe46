"""DeepSeekMoE: many small routed experts, a few shared ones, balanced by a selection bias instead of a loss.

    h = u + FFN_shared(u) + sum_i g_i FFN_i(u)          (DeepSeekMoE eq 9; DeepSeek-V3 eq 12)

The bias b_i joins the affinity only to choose experts. After each optimiser step it moves by +-gamma towards the
experts that got fewer than their share (DeepSeek-V3 section 2.1.2; arXiv 2408.15664):
    b_i <- b_i + gamma * sign(mean_j c_j - c_i),   c_i = tokens sent to expert i over the whole global batch
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kogia.model.config import MoEConfig
from kogia.model.layers import FeedForward, StepContext
from kogia.model.linear import Linear
from kogia.ops.moe import Routed, SharedExperts, balance_losses, mix_experts, route
from kogia.ops.norm import branches, residual_sum


class Router(nn.Module):
    """Scores tokens against experts in float32 and picks topk of them."""

    e_score_correction_bias: Tensor | None

    def __init__(self, dim: int, config: MoEConfig, mixture: int) -> None:
        super().__init__()
        self.config, self.mixture = config, mixture
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Routed:
        c, routing = self.config, step.routing
        routed = route(
            x,
            self.weight,
            self.e_score_correction_bias,
            score=c.score,
            topk=c.topk,
            num_groups=c.num_groups,
            topk_groups=c.topk_groups,
            normalize=c.normalize_topk,
            scale=c.routed_scale,
            given=None if routing is None else routing.ids(self.mixture),
            may_be_nobody=routing is not None and (self.mixture in routing.given or step.activation is not None),
            activation=step.activation,
        )
        if routing is not None:
            routing.record(self.mixture, routed.expert_ids, c.num_experts)
            if routing.losses:
                losses = balance_losses(routed.scores, routed.expert_ids, step.segments, routing.balance)
                routing.add_balance_losses(self.mixture, losses)
        return routed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """What `Module.to` and its like go through. The bias moves but stays float32: its steps are of 0.001."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != bias.dtype:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    @torch.no_grad()
    def update_bias(self, load: Int[Tensor, " experts"], speed: float) -> None:
        """Move the selection bias against the load of a whole optimiser step, summed over all ranks."""
        if self.e_score_correction_bias is not None and speed:
            load = load.double()
            self.e_score_correction_bias += speed * torch.sign(load.mean() - load).float()


def max_violation(loads: Int[Tensor, "mixtures experts"]) -> Float[Tensor, " mixtures"]:
    """MaxVio = (largest load - mean load) / mean load (arXiv 2408.15664); 0 is perfect balance, NaN without load."""
    loads = loads.double()
    return loads.amax(-1) / loads.mean(-1) - 1


class Experts(nn.Module):
    """All routed experts of a layer, on this device.

    What takes its place, with experts elsewhere, has the same `forward`.
    """

    first = 0
    """The number in its layer of the first expert held."""

    def __init__(self, dim: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(dim, width, stack=(num_experts, 2))
        self.down_proj = Linear(width, dim, stack=(num_experts,))

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        expert_ids: Int[Tensor, "tokens topk"],
        weights: Float[Tensor, "tokens topk"],
        shared: SharedExperts | None = None,
        residual: Float[Tensor, "tokens dim"] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """Weighted sum of the outputs of each token's experts, where an id of -1 is nobody; and on top of `residual`
        the shared experts', whose weights are `shared`."""
        up, down = self.gate_up_proj, self.down_proj
        if up.fp8 is not None and down.fp8 is not None and shared is None and torch.is_grad_enabled():
            y = up.fp8(x, expert_ids, weights, up.weight, down.weight, (up.fp8.forms, down.fp8.forms))
            return y if residual is None else residual + y
        routed = up.operand(), down.operand()
        return mix_experts(x, expert_ids, weights, *routed, shared=shared, residual=residual)


class SomeExperts(Experts):
    """One rank's equal share of the routed experts of a layer, as they are (expert parallelism).

    It is asked for all choices of all tokens and adds what its own experts do; the sum over the ranks is the layer's.
    """

    def __init__(self, dim: int, num_experts: int, width: int, rank: int, size: int) -> None:
        """`num_experts` are those of all ranks."""
        super().__init__(dim, num_experts // size, width)
        self.num_experts, self.first = num_experts, rank * (num_experts // size)
        self._own: Tensor | None = None
        """[num_experts + 1] the place here of each expert of the layer; -1, which is nobody, elsewhere and at the end.
        Recorded graphs read it."""

    def forward(
        self,
        x: Float[Tensor, "tokens dim"],
        expert_ids: Int[Tensor, "tokens topk"],
        weights: Float[Tensor, "tokens topk"],
        shared: SharedExperts | None = None,
        residual: Float[Tensor, "tokens dim"] | None = None,
    ) -> Float[Tensor, "tokens dim"]:
        """`expert_ids` are places among all experts of the layer."""
        return super().forward(x, self.place(x.device)[expert_ids], weights, shared, residual)

    def place(self, device: torch.device) -> Int[Tensor, " experts_and_nobody"]:
        """Make `_own` where it is not there; once before a graph is recorded, which would not fill it."""
        if self._own is None or self._own.device != device:
            held = torch.arange(len(self.gate_up_proj.weight), device=device)
            places = torch.full((self.num_experts + 1,), -1, device=device)
            self._own = places.index_copy_(0, self.first + held, held)
        return self._own


class MoE(nn.Module):
    def __init__(self, dim: int, config: MoEConfig, mixture: int) -> None:
        """`mixture` is its place among the model's mixtures, by which `Routing` knows it."""
        super().__init__()
        self.gate = Router(dim, config, mixture)
        self.experts = Experts(dim, config.num_experts, config.expert_dim)
        shared = config.num_shared_experts * config.expert_dim
        self.shared_experts = FeedForward(dim, shared) if shared else None

    def forward(
        self, x: Float[Tensor, "tokens dim"], step: StepContext, residual: Float[Tensor, "tokens dim"] | None = None
    ) -> Float[Tensor, "tokens dim"]:
        """`residual` + the routed and shared experts' sum. With a cache, the shared ones ride along with the routed:
        each alone is a small product. Without one they are a module like any other, which may be sharded by itself."""
        shared = self.shared_experts
        if shared is None or step.cache is not None:
            routed, weights = self.gate(x, step), None if shared is None else shared.operands()
            return self.experts(x, routed.expert_ids, routed.weights, weights, residual)
        for_router, for_experts, for_shared = branches(x, 3)
        routed = self.gate(for_router, step)
        y, z = self.experts(for_experts, routed.expert_ids, routed.weights), shared(for_shared, step)
        return y + z if residual is None else residual_sum(residual, y, z)
