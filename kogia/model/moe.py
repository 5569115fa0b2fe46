"""DeepSeekMoE: many small routed experts, a few shared ones, balanced by a selection bias instead of a loss.

    h = u + FFN_shared(u) + sum_i g_i FFN_i(u)          (DeepSeekMoE eq 9; DeepSeek-V3 eq 12)

The bias b_i joins the affinity only to choose experts. After each optimiser step it moves by +-gamma towards the
experts that got fewer than their share (DeepSeek-V3 section 2.1.2; arXiv 2408.15664):
    b_i <- b_i + gamma * sign(mean_j c_j - c_i),   c_i = tokens sent to expert i over the whole global batch
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kogia.model.config import MoEConfig
from kogia.model.layers import FeedForward
from kogia.ops.fp8 import dequantize_blocks, quantize_blocks, scale_shape
from kogia.ops.moe import (
    affinities,
    combine,
    dispatch,
    gate_weights,
    grouped_linear,
    order_by_expert,
    select_experts,
    sequence_balance_loss,
    swiglu,
)


class Router(nn.Module):
    """Scores tokens against experts in float32 and picks topk of them."""

    e_score_correction_bias: Tensor | None
    load: Tensor

    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.score == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)
        self.balance_loss: Tensor | None = None
        """Sum over this forward's tokens of the sequence-wise balance loss; set by every training forward."""

    def forward(
        self, x: Float[Tensor, "tokens dim"], cu_seqlens: Int[Tensor, " seqs_plus_1"]
    ) -> tuple[Int[Tensor, "tokens topk"], Float[Tensor, "tokens topk"]]:
        c = self.config
        scores = affinities(x.float() @ self.weight.float().T, c.score)
        with torch.no_grad():
            expert_ids = select_experts(
                scores, self.e_score_correction_bias, topk=c.topk, num_groups=c.num_groups, topk_groups=c.topk_groups
            )
        if self.training and torch.is_grad_enabled():
            self.load += torch.bincount(expert_ids.flatten(), minlength=c.num_experts)
            self.balance_loss = sequence_balance_loss(scores, expert_ids, cu_seqlens)
        return expert_ids, gate_weights(scores, expert_ids, normalize=c.normalize_topk, scale=c.routed_scale)

    @torch.no_grad()
    def update_bias(self, speed: float) -> None:
        """Move the selection bias against `load`, then clear it. The caller has summed `load` over all ranks."""
        if self.e_score_correction_bias is not None and speed:
            load = self.load.double()
            self.e_score_correction_bias += speed * torch.sign(load.mean() - load).float()
        self.load.zero_()

    def max_violation(self) -> float:
        """MaxVio = (largest load - mean load) / mean load (arXiv 2408.15664); 0 is perfect balance."""
        load = self.load.double()
        return float(load.max() / load.mean() - 1) if load.sum() else 0.0


class Experts(nn.Module):
    """All routed experts of a layer, stacked: [experts, gate | up, dim] and [experts, dim, width].

    FP8 weights have their block scales beside them. Gate and up are scaled apart, as they are stored:
    [experts, 2, ceil(width / 128), ceil(dim / 128)] and [experts, ceil(dim / 128), ceil(width / 128)].
    """

    gate_up_scale_inv: Tensor | None
    down_scale_inv: Tensor | None

    def __init__(self, dim: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))
        self.register_buffer("gate_up_scale_inv", None)
        self.register_buffer("down_scale_inv", None)

    def forward(
        self, rows: Float[Tensor, "routed dim"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, "routed dim"]:
        if self.gate_up_scale_inv is not None:
            return self._forward_fp8(rows, counts)
        return grouped_linear(swiglu(grouped_linear(rows, self.gate_up_proj, counts)), self.down_proj, counts)

    def _forward_fp8(self, rows: Tensor, counts: Tensor) -> Float[Tensor, "routed dim"]:
        """One expert at a time: only the experts in use are dequantised, and never two at once."""
        out = []
        for expert, own in enumerate(rows.split(counts.tolist())):
            if len(own):
                gate_up, down = self.dense_expert(expert, rows.dtype)
                out.append(swiglu(own @ gate_up.T) @ down.T)
        return torch.cat(out) if out else rows

    def dense_expert(
        self, expert: int, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "two_width dim"], Float[Tensor, "dim width"]]:
        """(gate | up, down) of one expert, dequantised where they are FP8."""
        gate_up, down = self.gate_up_proj[expert], self.down_proj[expert]
        if self.gate_up_scale_inv is None or self.down_scale_inv is None:
            return gate_up, down
        halves = dequantize_blocks(gate_up.unflatten(0, (2, -1)), self.gate_up_scale_inv[expert], dtype)
        return halves.flatten(0, 1), dequantize_blocks(down, self.down_scale_inv[expert], dtype)

    def make_fp8(self) -> None:
        """Turn the stacks into uninitialised FP8 with uninitialised scales, on their device (meta included)."""
        gate_up, down, device = self.gate_up_proj, self.down_proj, self.gate_up_proj.device
        halves = gate_up.unflatten(1, (2, -1)).shape
        for name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
            empty = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))
        self.gate_up_scale_inv = torch.empty(scale_shape(halves), dtype=torch.float32, device=device)
        self.down_scale_inv = torch.empty(scale_shape(down.shape), dtype=torch.float32, device=device)

    @torch.no_grad()
    def quantize(self, *, power_of_two: bool = False) -> None:
        """Round dense stacks to FP8 blocks in place."""
        halves = self.gate_up_proj.unflatten(1, (2, -1))
        gate_up, self.gate_up_scale_inv = quantize_blocks(halves, power_of_two=power_of_two)
        down, self.down_scale_inv = quantize_blocks(self.down_proj, power_of_two=power_of_two)
        self.gate_up_proj = nn.Parameter(gate_up.flatten(1, 2), requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)


class MoE(nn.Module):
    def __init__(self, dim: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(dim, config)
        self.experts = Experts(dim, config.num_experts, config.expert_dim)
        shared = config.num_shared_experts * config.expert_dim
        self.shared_experts = FeedForward(dim, shared) if shared else None

    def forward(
        self, x: Float[Tensor, "tokens dim"], cu_seqlens: Int[Tensor, " seqs_plus_1"]
    ) -> Float[Tensor, "tokens dim"]:
        expert_ids, weights = self.gate(x, cu_seqlens)
        order = order_by_expert(expert_ids, self.config.num_experts)
        rows = dispatch(x, self.config.topk, order)
        routed = combine(self.experts(rows, order.counts), weights, order)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
