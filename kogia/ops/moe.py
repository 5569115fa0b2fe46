"""Mixture of experts: routing, permutation to expert order, the experts themselves, the balance loss.

s_i = sigmoid(u . e_i)  (DeepSeek-V3 eq 15)   or   softmax_i(u . e_i)  (DeepSeekMoE eq 5)
choose topk of s_i + b_i                      (eq 16: the bias only selects)
g_i = scale * s_i / sum of chosen s           (unbiased affinities weigh)

A token may use fewer or more experts than the model was trained with (`Activation`).

An expert id of -1 is nobody: such a copy of a token is sorted last, not counted, and weighs nothing in the sum.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op
from kogia.ops.linear import grouped_linear, grouped_outer, linear
from kogia.ops.packed import Packed
from kogia.ops.segments import Segments


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
    ordered: bool = False,
) -> Int[Tensor, "tokens topk"]:
    """Choose experts by biased score inside the best groups; order within a row carries no meaning, unless `ordered`
    puts the best first.

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
    return choice.topk(topk, dim=-1, sorted=ordered).indices


def gate_weights(
    scores: Float[Tensor, "tokens experts"], expert_ids: Int[Tensor, "tokens topk"], *, normalize: bool, scale: float
) -> Float[Tensor, "tokens topk"]:
    """Weights of the chosen experts, none of them nobody, from their unbiased affinities, times `scale`."""
    return _weigh(scores.gather(-1, expert_ids), normalize, scale)


def _weigh(chosen: Tensor, normalize: bool, scale: float) -> Tensor:
    if normalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * scale


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """How many routed experts tokens use, where it is not the number that the model was trained with.

    An expert weighs what it would among the trained number: what is left out is missing from the sum of the gates, and
    what is added comes on top. To keep their sum instead is worse, for fewer and for more (docs/activation.md).
    """

    most: int
    """Choices in a row: the largest number of any token."""
    limits: Int[Tensor, " tokens"] | None = None
    """Of each token, at most `most`; None gives all of them that."""
    thresholds: Float[Tensor, " tokens"] | None = None
    """An expert whose affinity is below this share of the token's best chosen one is dropped; None drops none."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What a router made of its tokens."""

    expert_ids: Int[Tensor, "tokens topk"]
    weights: Float[Tensor, "tokens topk"]
    scores: Float[Tensor, "tokens experts"]
    """All affinities, which the balance loss is of."""


@op(cuda=("kogia.ops.triton.moe",), invariant=("kogia.ops.invariant.moe",), cpu=("kogia.ops.cpu.moe",))
def route(
    x: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "experts dim"],
    bias: Float[Tensor, " experts"] | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
    given: Int[Tensor, "tokens topk"] | None = None,
    may_be_nobody: bool = False,
    activation: Activation | None = None,
) -> Routed:
    """Score tokens against experts in float32, choose and weigh. With `given` ids nothing is chosen; some of them may
    be -1 only where `may_be_nobody` says so. Without, `activation` stands in for `topk`."""
    logits = router_logits(x, weight)
    if activation is None and not may_be_nobody:
        return route_logits(
            logits,
            bias,
            given,
            score=score,
            topk=topk,
            num_groups=num_groups,
            topk_groups=topk_groups,
            normalize=normalize,
            scale=scale,
        )
    return choose_and_weigh(
        affinities(logits, score),
        bias,
        topk=topk,
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalize=normalize,
        scale=scale,
        given=given,
        may_be_nobody=may_be_nobody,
        activation=activation,
    )


@op(cuda=("kogia.ops.aten.router",))
def router_logits(
    x: Float[Tensor, "tokens dim"], weight: Float[Tensor, "experts dim"]
) -> Float[Tensor, "tokens experts"]:
    """x W^T in float32."""
    return x.float() @ weight.float().T


@op(cuda=("kogia.ops.triton.router_training",))
def route_logits(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"] | None,
    given: Int[Tensor, "tokens topk"] | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
) -> Routed:
    """`route` from the logits on, as the model was trained: everybody is somebody."""
    return choose_and_weigh(
        affinities(logits, score),
        bias,
        topk=topk,
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalize=normalize,
        scale=scale,
        given=given,
    )


def choose_and_weigh(
    scores: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"] | None,
    *,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
    given: Int[Tensor, "tokens topk"] | None = None,
    may_be_nobody: bool = False,
    activation: Activation | None = None,
    ordered: bool = False,
) -> Routed:
    """`route` from the affinities on; `ordered` chooses the best first."""
    best = given
    if given is None or activation is not None:
        with torch.no_grad():
            best = select_experts(
                scores,
                bias,
                topk=topk if activation is None else max(topk, activation.most),
                num_groups=num_groups,
                topk_groups=topk_groups,
                ordered=ordered or activation is not None,
            )
    assert best is not None, "what is not given is chosen"
    if activation is None and not may_be_nobody:
        return Routed(best, gate_weights(scores, best, normalize=normalize, scale=scale), scores)
    if activation is None:
        return Routed(best, _weigh(_affinity_of(scores, best), normalize, scale), scores)
    ids = _activated(best[:, : activation.most], scores, activation) if given is None else given
    weights = _affinity_of(scores, ids)
    if normalize:
        weights = weights / (scores.gather(-1, best[:, :topk]).sum(-1, keepdim=True) + 1e-20)
    return Routed(ids, weights * scale, scores)


def _affinity_of(scores: Float[Tensor, "tokens experts"], ids: Int[Tensor, "tokens chosen"]) -> Tensor:
    """Of each chosen expert; 0 of nobody."""
    return scores.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, 0.0)


def _activated(
    ids: Int[Tensor, "tokens most"], scores: Float[Tensor, "tokens experts"], activation: Activation
) -> Int[Tensor, "tokens most"]:
    """Of experts, the best first, those that each token uses; nobody beyond its limit and below its threshold."""
    if activation.limits is not None:
        rank = torch.arange(activation.most, device=ids.device)
        ids = torch.where(rank < activation.limits[:, None], ids, -1)
    if activation.thresholds is not None:
        chosen = _affinity_of(scores, ids)
        floor = chosen.amax(-1) * activation.thresholds
        ids = torch.where(chosen < floor[:, None], -1, ids)
    return ids


@op(cuda=("kogia.ops.triton.router_training",))
def expert_counts(expert_ids: Int[Tensor, "tokens topk"], num_experts: int) -> Int[Tensor, " experts"]:
    """Copies sent to each expert; nobody's are left out. Unlike bincount, it never waits for the device."""
    return _counts(_nobody_last(expert_ids, num_experts), num_experts)


def _nobody_last(expert_ids: Tensor, num_experts: int) -> Tensor:
    flat = expert_ids.flatten()
    return torch.where(flat < 0, num_experts, flat)


def _counts(ids: Tensor, num_experts: int) -> Tensor:
    counts = ids.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertOrder:
    """Token copies sorted by expert: `order[r]` is the copy (token * topk + choice) that stands in row r."""

    order: Int[Tensor, " routed"]
    inverse: Int[Tensor, " routed"]
    counts: Int[Tensor, " experts"]


def order_by_expert(expert_ids: Int[Tensor, "tokens topk"], num_experts: int) -> ExpertOrder:
    """Stable sort of all token copies by expert, with its inverse and the copies per expert."""
    ids = _nobody_last(expert_ids, num_experts)
    order = ids.to(torch.int16 if num_experts < 2**15 else torch.int64).argsort(stable=True)  # a sort goes by bytes
    inverse = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return ExpertOrder(order, inverse, expert_counts(expert_ids, num_experts))


class _ToExperts(torch.autograd.Function):
    """Rows gathered from tokens; the backward is the inverse gather and a sum: deterministic, no scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.topk = topk
        return x.index_select(0, order // topk)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        by_copy = grads[0].index_select(0, ctx.saved_tensors[0])
        return by_copy.view(-1, ctx.topk, by_copy.shape[1]).sum(1), None, None, None


class _ToCopies(torch.autograd.Function):
    """Rows in the order of token copies; the backward is the inverse gather."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def dispatch(x: Float[Tensor, "tokens dim"], topk: int, order: ExpertOrder) -> Float[Tensor, "routed dim"]:
    """Copy every token to its experts, rows in expert order."""
    if not torch.is_grad_enabled():
        return x.index_select(0, order.order // topk)
    return _ToExperts.apply(x, order.order, order.inverse, topk)  # pyright: ignore[reportReturnType]


@op(cuda=("kogia.ops.triton.moe",), invariant=("kogia.ops.invariant.moe",))
def gathered_sum(
    y: Float[Tensor, "routed dim"],
    inverse: Int[Tensor, " routed"],
    weights: Float[Tensor, "tokens topk"],
    *added: Float[Tensor, "tokens dim"],
) -> Float[Tensor, "tokens dim"]:
    """sum_j weights[t, j] * y[inverse[t * topk + j]] and what is `added`, without gradients; weights are rounded to the
    dtype of y."""
    return _added(_weighted_sum(y.index_select(0, inverse), weights), added)


def _weighted_sum(by_copy: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(weights.to(by_copy.dtype)[:, None], by_copy.view(*weights.shape, by_copy.shape[1])).squeeze(1)


def _added(total: Tensor, parts: Iterable[Tensor]) -> Tensor:
    for each in parts:
        total = each + total
    return total


@op(cuda=("kogia.ops.triton.experts",), cpu=("kogia.ops.cpu.moe",))
def sum_copies(
    y: Float[Tensor, "routed dim"], inverse: Int[Tensor, " routed"], topk: int
) -> Float[Tensor, "tokens dim"]:
    """sum_j y[inverse[t * topk + j]], without gradients."""
    by_copy = y.index_select(0, inverse).view(-1, topk, y.shape[1])
    return by_copy.to(_wide(y)).sum(1).to(y.dtype)


def combine(
    y: Float[Tensor, "routed dim"],
    weights: Float[Tensor, "tokens topk"],
    order: ExpertOrder,
    *added: Float[Tensor, "tokens dim"],
) -> Float[Tensor, "tokens dim"]:
    """Weighted sum of each token's expert outputs, and what is `added` to it, one after the other."""
    if not torch.is_grad_enabled():
        return gathered_sum(y, order.inverse, weights, *added)
    by_copy: Tensor = _ToCopies.apply(y, order.order, order.inverse)  # pyright: ignore[reportAssignmentType]
    return _added(_weighted_sum(by_copy, weights), added)


SharedExperts = tuple[Tensor | Packed, Tensor | Packed, Tensor | Packed]
"""Gate, up and down matrices of the shared experts, which are one of their total width."""


@op(cuda=("kogia.ops.w8a8.products", "kogia.ops.triton.moe"), cpu=("kogia.ops.cpu.moe",))
def mix_experts(
    x: Float[Tensor, "tokens dim"],
    expert_ids: Int[Tensor, "tokens topk"],
    weights: Float[Tensor, "tokens topk"],
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Float[Tensor, "tokens dim"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """residual + sum_j weights[t, j] * FFN_{expert_ids[t, j]}(x[t]) + FFN_shared(x[t]), over experts stored as
    [experts, gate | up, width, dim] and [experts, dim, width].

    With gradients it is `_Experts`, unless weights are packed, which take none, or shared experts come along.
    """
    order = order_by_expert(expert_ids, len(gate_up))
    weights = weights.masked_fill(expert_ids < 0, 0.0)
    if torch.is_grad_enabled() and shared is None and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        y: Tensor = _Experts.apply(x, weights, gate_up, down, order.order, order.inverse, order.counts)  # pyright: ignore[reportAssignmentType]
        return y if residual is None else residual + y
    rows = grouped_linear(dispatch(x, expert_ids.shape[1], order), gate_up, order.counts)
    y = grouped_linear(silu_mul(*rows.chunk(2, dim=-1)), down, order.counts)
    added = []
    if shared is not None:
        gate, up, back = shared
        added.append(linear(silu_mul(linear(x, gate), linear(x, up)), back))
    if residual is not None:
        added.append(residual)
    return combine(y, weights, order, *added)


class _Experts(torch.autograd.Function):
    """The routed experts in training, keeping of every copy of a token gate and up alone.

    The gates weigh what goes into the down-projection instead of what comes out: the sum is the same, and the gradient
    of a gate is a product of narrow rows that are there anyway (SonicMoE, arXiv 2512.14080). The backward pass gathers
    the rows of tokens again, and computes silu(gate) * up again with its gradient. Copies are summed by gathering them
    there, too, so that two runs are equal bit for bit.
    """

    @staticmethod
    def forward(ctx, *operands: Tensor) -> Tensor:
        """`operands`: x, weights, gate_up, down, and the fields of an ExpertOrder."""
        x, weights, gate_up, down, order, inverse, counts = operands
        topk = weights.shape[1]
        by_row = weights.flatten().index_select(0, order)
        both = grouped_linear(x.index_select(0, order // topk), gate_up, counts)
        y = grouped_linear(weighted_silu_mul(both, by_row), down, counts)
        ctx.save_for_backward(x, both, by_row, gate_up, down, order, inverse, counts)
        ctx.topk = topk
        return sum_copies(y, inverse, topk)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, both, by_row, gate_up, down, order, inverse, counts = ctx.saved_tensors
        token = order // ctx.topk
        grad_y = grads[0].index_select(0, token)
        grad_hidden = grouped_linear(grad_y, down.transpose(1, 2), counts)
        grad_both, grad_by_row, hidden = weighted_silu_mul_backward(grad_hidden, both, by_row)
        grad_gate_up = grad_down = None
        if ctx.needs_input_grad[2]:
            grad_down = grouped_outer(grad_y, hidden, counts)
            grad_gate_up = grouped_outer(grad_both, x.index_select(0, token), counts).view_as(gate_up)
        grad_rows = grouped_linear(grad_both, gate_up.flatten(1, 2).transpose(1, 2), counts)
        grad_weights = grad_by_row.index_select(0, inverse).view(-1, ctx.topk)
        return sum_copies(grad_rows, inverse, ctx.topk), grad_weights, grad_gate_up, grad_down, None, None, None


@op(
    cuda=("kogia.ops.triton.moe", "kogia.ops.triton.experts"),
    invariant=("kogia.ops.invariant.moe",),
    cpu=("kogia.ops.cpu.moe",),
)
def silu_mul(gate: Float[Tensor, "rows width"], up: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """silu(gate) * up, the inside of SwiGLU."""
    return F.silu(gate) * up


@op(cuda=("kogia.ops.triton.experts",), cpu=("kogia.ops.cpu.moe",))
def weighted_silu_mul(
    both: Float[Tensor, "routed gate_and_up"], weights: Float[Tensor, " routed"]
) -> Float[Tensor, "routed width"]:
    """weights * silu(gate) * up of rows [gate ; up], rounded once, without gradients."""
    gate, up = both.to(_wide(both)).chunk(2, -1)
    return (F.silu(gate) * up).mul_(weights[:, None]).to(both.dtype)


@op(cuda=("kogia.ops.triton.experts",), cpu=("kogia.ops.cpu.moe",))
def weighted_silu_mul_backward(
    grad: Float[Tensor, "routed width"], both: Float[Tensor, "routed gate_and_up"], weights: Float[Tensor, " routed"]
) -> tuple[Float[Tensor, "routed gate_and_up"], Float[Tensor, " routed"], Float[Tensor, "routed width"]]:
    """(gradient of `both`, gradient of `weights`, the forward's result) of `weighted_silu_mul`."""
    gate, up = both.to(_wide(both)).chunk(2, -1)
    activated = F.silu(gate)
    product, weighted = activated * up, grad * weights[:, None]
    grad_both = torch.cat((torch.ops.aten.silu_backward(weighted * up, gate), weighted * activated), -1)
    grad_weights = (grad * product).sum(-1)
    return grad_both.to(both.dtype), grad_weights, product.mul_(weights[:, None]).to(both.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class Balance:
    """Over what loads are to be even."""

    over: Literal["sequence", "batch"] = "sequence"
    """Each sequence by itself (DeepSeek-V2, V3), or all tokens of the pass together (DeepSeek-V3 section 4.5.3)."""
    devices: int = 1
    """The experts lie on as many, neighbours together; 1 leaves out the two losses of devices."""
    reach: int = 1
    """Devices that a token is meant to be sent to."""


def balance_losses(
    scores: Float[Tensor, "tokens experts"],
    expert_ids: Int[Tensor, "tokens topk"],
    segments: Segments,
    balance: Balance = Balance(),
) -> Float[Tensor, " losses"]:
    """The balance loss of experts, and with devices those of devices and of communication, before their factors alpha.

    Of each sequence of T tokens, or of the batch, with P_i the mean of s_i / sum_j s_j (DeepSeek-V3 eq 17-20 for
    sigmoid; a softmax has sum 1, DeepSeek-V2 eq 23-31), and E_d the experts of device d:
        experts         T sum_i f_i P_i     f_i = experts / (topk T) * (copies sent to i)
        devices         T sum_d f'_d P'_d   f'_d = the mean of f_i over E_d,   P'_d = the sum of P_i over E_d
        communication   T sum_d f''_d P'_d  f''_d = devices / (reach T) * (tokens sent to d)
    They are SUMS over tokens: divide by the token count. Perfect balance gives 1 per token, each. The counts are those
    of the actual selection and carry no gradient.
    """
    (num_tokens, num_experts), topk, num_groups = scores.shape, expert_ids.shape[1], segments.num_seqs
    owner, lengths, bounds = segments.owner, segments.device_lengths, segments.cu_seqlens
    if balance.over == "batch":
        owner, num_groups, lengths = torch.zeros_like(owner), 1, torch.full_like(lengths[:1], num_tokens)
        bounds = torch.cat((bounds[:1], bounds[-1:]))
    total_p = affinity_sums(scores, owner, bounds)
    places = torch.where(expert_ids < 0, -1, owner[:, None] * num_experts + expert_ids)
    copies = expert_counts(places, num_groups * num_experts).view_as(total_p)
    f = copies.to(scores.dtype) * (num_experts / topk) / lengths[:, None]
    losses = [(f * total_p).sum()]
    if balance.devices > 1:
        by_device = total_p.unflatten(-1, (balance.devices, -1)).sum(-1)
        losses.append((f.unflatten(-1, (balance.devices, -1)).mean(-1) * by_device).sum())
        sent = scores.new_zeros(num_groups, balance.devices).index_add(0, owner, _sent_to(expert_ids, scores, balance))
        losses.append((sent * (balance.devices / balance.reach) / lengths[:, None] * by_device).sum())
    return torch.stack(losses)


@op(cuda=("kogia.ops.triton.router_training",))
def affinity_sums(
    scores: Float[Tensor, "tokens experts"], owner: Int[Tensor, " tokens"], bounds: Int[Tensor, " groups_plus_1"]
) -> Float[Tensor, "groups experts"]:
    """Sums of s_i / sum_j s_j over groups of tokens, which begin and end at `bounds`: `owner` is the group of each."""
    normed = scores / scores.sum(-1, keepdim=True)
    return scores.new_zeros(len(bounds) - 1, scores.shape[1]).index_add(0, owner, normed)


def _sent_to(expert_ids: Tensor, like: Tensor, balance: Balance) -> Float[Tensor, "tokens devices"]:
    """1 for the devices that a token is sent to, 0 for others."""
    devices = torch.where(expert_ids < 0, balance.devices, expert_ids // (like.shape[1] // balance.devices))
    return like.new_zeros(len(like), balance.devices + 1).scatter(1, devices, 1.0)[:, : balance.devices]
