"""Mixture-of-experts pieces: routing, permutation to expert order, grouped linear, balance loss.

s_i = sigmoid(u . e_i)  (DeepSeek-V3 eq 15)   or   softmax_i(u . e_i)  (DeepSeekMoE eq 5)
choose topk of s_i + b_i                      (eq 16: the bias only selects)
g_i = scale * s_i / sum of chosen s           (unbiased affinities weigh)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def affinities(logits: Float[Tensor, "tokens experts"], score: str) -> Float[Tensor, "tokens experts"]:
    """Token-to-expert affinities in float32."""
    return logits.float().sigmoid() if score == "sigmoid" else logits.float().softmax(-1)


def select_experts(
    scores: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"] | None,
    *,
    topk: int,
    num_groups: int,
    topk_groups: int,
) -> Int[Tensor, "tokens topk"]:
    """Choose experts by biased score inside the best groups; order within a row carries no meaning.

    A group's score is the sum of its two best biased scores when a bias is given (DeepSeek-V3), else its best score
    (DeepSeek-V2, device-limited routing). Other groups are masked with -inf: a masked 0 could beat a negative score.
    """
    choice = scores if bias is None else scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        group_scores = (
            grouped.amax(-1) if bias is None else grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        )
        kept = group_scores.topk(topk_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
        choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    return choice.topk(topk, dim=-1, sorted=False).indices


def gate_weights(
    scores: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens topk"], *, normalize: bool, scale: float
) -> Float[Tensor, "tokens topk"]:
    """Weights of the chosen experts from their unbiased affinities, times `scale`."""
    weights = scores.gather(-1, expert_ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Token copies sorted by expert: `order[r]` is the copy (token * topk + choice) that stands in row r."""

    order: Int[Tensor, " routed"]
    inverse: Int[Tensor, " routed"]
    counts: Int[Tensor, " experts"]


def order_by_expert(expert_ids: Int[Tensor, "tokens topk"], num_experts: int) -> ExpertOrder:
    """Stable sort of all token copies by expert, with its inverse and the copies per expert."""
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return ExpertOrder(order, inverse, torch.bincount(flat, minlength=num_experts))


class _PermuteRows(torch.autograd.Function):
    """Row permutation whose backward is the inverse gather: deterministic, no scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def dispatch(x: Float[Tensor, "tokens dim"], topk: int, order: ExpertOrder) -> Float[Tensor, "routed dim"]:
    """Copy every token to its experts, rows in expert order."""
    copies = x[:, None].expand(-1, topk, -1).reshape(-1, x.shape[1])
    return _PermuteRows.apply(copies, order.order, order.inverse)  # pyright: ignore[reportReturnType]


def combine(
    y: Float[Tensor, "routed dim"], weights: Float[Tensor, "tokens topk"], order: ExpertOrder
) -> Float[Tensor, "tokens dim"]:
    """Weighted sum of each token's expert outputs."""
    by_token: Tensor = _PermuteRows.apply(y, order.inverse, order.order)  # pyright: ignore[reportAssignmentType]
    return torch.bmm(weights.to(y.dtype)[:, None], by_token.view(*weights.shape, y.shape[1])).squeeze(1)


def grouped_linear(
    x: Float[Tensor, "routed in"], weight: Float[Tensor, "experts out in"], counts: Int[Tensor, " experts"]
) -> Float[Tensor, "routed out"]:
    """Rows in expert order times their expert's matrix, without bias. `counts` must sum to the rows of `x`."""
    if (x.shape[1] * x.element_size()) % 16 or (weight.shape[1] * x.element_size()) % 16:
        # grouped_mm wants 16-byte strides; odd widths take one product per expert
        return torch.cat([rows @ w.T for rows, w in zip(x.split(counts.tolist()), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def swiglu(gate_up: Float[Tensor, "rows two_width"]) -> Float[Tensor, "rows width"]:
    """silu(gate) * up of a fused [gate | up] projection."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sequence_balance_loss(
    scores: Float[Tensor, "tokens experts"],
    expert_ids: Int[Tensor, "tokens topk"],
    cu_seqlens: Int[Tensor, " seqs_plus_1"],
) -> Float[Tensor, ""]:
    """Complementary sequence-wise balance loss (DeepSeek-V3 eq 17-20), before its factor alpha.

    sum over sequences of T * sum_i f_i P_i, with f_i = experts / (topk T) * (copies sent to i) and P_i the sequence
    mean of s_i / sum_j s_j. It is a SUM over tokens: divide by the token count. Perfect balance gives 1 per token.
    The counts are those of the actual selection and carry no gradient.
    """
    num_experts, topk = scores.shape[1], expert_ids.shape[1]
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    normed = scores / scores.sum(-1, keepdim=True)
    total_p = scores.new_zeros(len(lengths), num_experts).index_add(0, owner, normed)
    copies = torch.bincount((owner[:, None] * num_experts + expert_ids).flatten(), minlength=total_p.numel())
    f = copies.view_as(total_p).to(scores.dtype) * (num_experts / topk) / lengths[:, None]
    return (f * total_p).sum()
