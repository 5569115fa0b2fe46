"""Routers in training, behind their logits: affinities, choice and weights in one pass, their gradient in another; how
many copies of tokens each expert gets; and the sums of affinities that balance losses are of, without atomics."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.moe import Routed
from kogia.ops.triton.common import LAUNCH, PDL, kernel, refusal, trained_refusal, training_refusal, wait_for_inputs

_TILE = 2048
_MOST_BINS = 2048
_SHARES = 16
"""Programs that add up the affinities of one group."""


@kernel
def _choose(
    logits, bias, scores, ids, weights, num_tokens, scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALIZE: tl.constexpr,
    GIVEN: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, a = t < num_tokens, tl.arange(0, PADDED)
    real = a < E
    inside = there[:, None] & real[None, :]
    at = t[:, None] * E + a[None, :]
    logit = tl.load(logits + at, inside, float("-inf"))
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-logit))
    else:
        top = tl.max(logit, 1)
        s = tl.exp(logit - tl.where(there, top, 0.0)[:, None])
        s = s / tl.where(there, tl.sum(s, 1), 1.0)[:, None]
    tl.store(scores + at, s, inside)
    choice = s
    if BIASED:
        choice = choice + tl.load(bias + a, real, 0.0)[None, :]
    # NaN compares with nothing: left in, the largest could be a place beyond the last expert
    choice = tl.where(real[None, :] & (choice == choice), choice, float("-inf"))
    k = tl.arange(0, CHOICES)[None, :]
    places = tl.zeros((ROWS, CHOICES), tl.int32)
    chances = tl.zeros((ROWS, CHOICES), tl.float32)
    for i in tl.static_range(K):
        if GIVEN:
            chosen = tl.load(ids + t * K + i, there, 0).to(tl.int32)
        else:
            chosen = tl.argmax(choice, 1)
            places = tl.where(k == i, chosen[:, None], places)
        mine = a[None, :] == chosen[:, None]
        chances = tl.where(k == i, tl.sum(tl.where(mine, s, 0.0), 1)[:, None], chances)
        choice = tl.where(mine, float("-inf"), choice)
    factor = tl.zeros((ROWS,), tl.float32) + scale
    if NORMALIZE:
        factor = factor / (tl.sum(chances, 1) + 1e-20)
    to, wanted = t[:, None] * K + k, there[:, None] & (k < K)
    tl.store(weights + to, chances * factor[:, None], wanted)
    if not GIVEN:
        tl.store(ids + to, places.to(tl.int64), wanted)


@kernel
def _choose_backward(
    grad_weights, grad_scores, scores, ids, grad_logits, num_tokens, scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHED: tl.constexpr,
    SCORED: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, a = t < num_tokens, tl.arange(0, PADDED)
    inside = there[:, None] & (a < E)[None, :]
    at = t[:, None] * E + a[None, :]
    s = tl.load(scores + at, inside, 0.0)
    grad = tl.zeros((ROWS, PADDED), tl.float32)
    if WEIGHED:
        is_chosen = tl.zeros((ROWS, PADDED), tl.int32)
        for i in tl.static_range(K):
            mine = a[None, :] == tl.load(ids + t * K + i, there, 0).to(tl.int32)[:, None]
            grad += tl.where(mine, tl.load(grad_weights + t * K + i, there, 0.0)[:, None], 0.0)
            is_chosen = tl.where(mine, 1, is_chosen)
        if NORMALIZE:
            total = tl.sum(tl.where(is_chosen == 1, s, 0.0), 1) + 1e-20
            inner = tl.sum(grad * s, 1) / total
            grad = tl.where(is_chosen == 1, (grad - inner[:, None]) * (scale / total)[:, None], 0.0)
        else:
            grad *= scale
    if SCORED:
        grad += tl.load(grad_scores + at, inside, 0.0)
    if SIGMOID:
        grad *= s * (1.0 - s)
    else:
        grad = s * (grad - tl.sum(grad * s, 1)[:, None])
    tl.store(grad_logits + at, grad, inside)


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        bias: Tensor | None,
        given: Tensor | None,
        score: str,
        topk: int,
        normalize: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, experts = logits.shape
        scores, weights = torch.empty_like(logits), logits.new_empty(tokens, topk)
        ids = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device) if given is None else given
        tile = _tile(experts)
        _choose[(triton.cdiv(tokens, tile["ROWS"]),)](
            logits, scores if bias is None else bias, scores, ids, weights, tokens, scale,
            E=experts, K=topk, SIGMOID=score == "sigmoid", BIASED=bias is not None, NORMALIZE=normalize,
            GIVEN=given is not None, CHOICES=triton.next_power_of_2(topk), **tile, PDL=PDL, num_warps=4, **LAUNCH,
        )  # fmt: skip
        ctx.save_for_backward(scores, ids)
        ctx.options = {"SIGMOID": score == "sigmoid", "NORMALIZE": normalize}
        ctx.scale = scale
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return ids, weights, scores

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scores, ids = ctx.saved_tensors
        of_weights, of_scores = (None if each is None else each.contiguous() for each in grads[1:])
        (tokens, experts), grad_logits = scores.shape, torch.empty_like(scores)
        tile = _tile(experts)
        _choose_backward[(triton.cdiv(tokens, tile["ROWS"]),)](
            scores if of_weights is None else of_weights, scores if of_scores is None else of_scores, scores, ids,
            grad_logits, tokens, ctx.scale, E=experts, K=ids.shape[1], WEIGHED=of_weights is not None,
            SCORED=of_scores is not None, **ctx.options, **tile, PDL=PDL, num_warps=4, **LAUNCH,
        )  # fmt: skip
        return grad_logits, None, None, None, None, None, None


def _tile(experts: int) -> dict[str, int]:
    padded = triton.next_power_of_2(experts)
    return {"ROWS": max(1, min(64, _TILE // padded)), "PADDED": padded}


def route_logits(
    logits: Tensor,
    bias: Tensor | None,
    given: Tensor | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
) -> Routed:
    """Of equally good experts the lower number is chosen."""
    found: Any = _Choice.apply(logits, bias, given, score, topk, normalize, scale)
    ids, weights, scores = found
    return Routed(ids, weights, scores)


def route_logits_supports(
    logits: Tensor,
    bias: Tensor | None,
    given: Tensor | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
) -> str | None:
    if not logits.numel():
        return "it takes one token at least"
    if num_groups > 1 and given is None:
        return "it chooses among all experts, not within groups"
    if logits.dtype != torch.float32 or not logits.is_contiguous() or logits.shape[1] > _TILE:
        return f"it takes contiguous float32 logits of at most {_TILE} experts"
    floats = None if bias is None else refusal(bias, dtypes=(torch.float32,))
    return training_refusal() or floats or (None if given is None else refusal(given, dtypes=(torch.int64,)))


@kernel
def _count(ids, counts, numel, BINS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Integers are added up in any order to the same sum."""
    wait_for_inputs(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bin = tl.load(ids + n, n < numel, -1).to(tl.int32)
    found = tl.histogram(tl.where(bin < 0, BINS, bin), PADDED)
    a = tl.arange(0, PADDED)
    tl.atomic_add(counts + a, found.to(tl.int64), (a < BINS) & (found > 0))


def expert_counts(expert_ids: Tensor, num_experts: int) -> Tensor:
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
    _count[(triton.cdiv(expert_ids.numel(), _TILE),)](
        expert_ids, counts, expert_ids.numel(), BINS=num_experts, PADDED=triton.next_power_of_2(num_experts + 1),
        BLOCK=_TILE, PDL=PDL, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return counts


def expert_counts_supports(expert_ids: Tensor, num_experts: int) -> str | None:
    if num_experts >= _MOST_BINS or expert_ids.numel() < _TILE:
        return f"it counts {_TILE} copies of tokens or more, and less than {_MOST_BINS} experts"
    return training_refusal() or refusal(expert_ids, dtypes=(torch.int64,))


@kernel
def _affinity_sums(
    scores, bounds, sums, E: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Programs of a group take turns at tiles of its rows."""
    wait_for_inputs(PDL)
    group, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, end = tl.load(bounds + group).to(tl.int32), tl.load(bounds + group + 1).to(tl.int32)
    a = tl.arange(0, PADDED)
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for start in range(first + share * ROWS, end, shares * ROWS):
        row = start + tl.arange(0, ROWS)
        there = row < end
        s = tl.load(scores + row[:, None].to(tl.int64) * E + a[None, :], there[:, None] & (a < E)[None, :], 0.0)
        total += s / tl.where(there, tl.sum(s, 1), 1.0)[:, None]
    tl.store(sums + (group.to(tl.int64) * shares + share) * E + a, tl.sum(total, 0), a < E)


@kernel
def _affinity_sums_backward(
    grad, scores, owner, grad_scores, num_tokens, E: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, a = t < num_tokens, tl.arange(0, PADDED)
    inside = there[:, None] & (a < E)[None, :]
    s = tl.load(scores + t[:, None] * E + a[None, :], inside, 0.0)
    of_group = tl.load(grad + tl.load(owner + t, there, 0)[:, None] * E + a[None, :], inside, 0.0)
    total = tl.where(there, tl.sum(s, 1), 1.0)
    value = (of_group - (tl.sum(of_group * s, 1) / total)[:, None]) / total[:, None]
    tl.store(grad_scores + t[:, None] * E + a[None, :], value, inside)


class _AffinitySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, owner: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(scores, owner)
        groups, experts = len(bounds) - 1, scores.shape[1]
        sums = scores.new_empty(groups, _SHARES, experts)
        _affinity_sums[(groups, _SHARES)](
            scores, bounds, sums, E=experts, **_tile(experts), PDL=PDL, num_warps=4, **LAUNCH
        )
        return sums.sum(1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        scores, owner = ctx.saved_tensors
        (tokens, experts), tile, grad_scores = scores.shape, _tile(scores.shape[1]), torch.empty_like(scores)
        _affinity_sums_backward[(triton.cdiv(tokens, tile["ROWS"]),)](
            grads[0].contiguous(), scores, owner, grad_scores, tokens, E=experts, **tile, PDL=PDL, num_warps=4, **LAUNCH
        )
        return grad_scores, None, None


def affinity_sums(scores: Tensor, owner: Tensor, bounds: Tensor) -> Tensor:
    return _AffinitySums.apply(scores, owner, bounds)  # pyright: ignore[reportReturnType]


def affinity_sums_supports(scores: Tensor, owner: Tensor, bounds: Tensor) -> str | None:
    if not scores.numel() or scores.shape[1] > _TILE:
        return f"it takes one token at least and at most {_TILE} experts"
    if not (scores.is_contiguous() and owner.is_contiguous() and bounds.is_contiguous()):
        return "it takes contiguous tensors"
    return training_refusal() or trained_refusal(scores, dtypes=(torch.float32,))
