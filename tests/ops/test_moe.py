import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kogia.ops.dispatch import use_backend
from kogia.ops.linear import grouped_linear, grouped_outer
from kogia.ops.moe import (
    Activation,
    Balance,
    affinities,
    balance_losses,
    combine,
    dispatch,
    gate_weights,
    mix_experts,
    order_by_expert,
    route,
    select_experts,
    silu_mul,
)
from kogia.ops.segments import segments_of


def choose(scores: list[float], bias: list[float] | None, topk: int, num_groups: int, topk_groups: int) -> set[int]:
    """One token, as DeepSeek-V3 section 2.1.2 (bias given) or DeepSeek-V2 section 2.2.2 (none) write it."""
    choice = [s + b for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    size = len(choice) // num_groups
    groups = [choice[g * size : (g + 1) * size] for g in range(num_groups)]
    rank = [sum(sorted(g)[-2:]) if bias is not None else max(g) for g in groups]
    kept = sorted(range(num_groups), key=lambda g: -rank[g])[:topk_groups]
    open_experts = [e for e in range(len(choice)) if e // size in kept]
    return set(sorted(open_experts, key=lambda e: -choice[e])[:topk])


@given(
    seed=st.integers(0, 10_000), groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (8, 3)]), biased=st.booleans()
)
def test_selection_is_the_loop_of_the_paper(seed, groups, biased):
    torch.manual_seed(seed)
    logits = torch.randn(6, 16)
    scores = affinities(logits, "sigmoid" if biased else "softmax")
    bias = torch.randn(16) if biased else None
    got = select_experts(scores, bias, topk=3, num_groups=groups[0], topk_groups=groups[1])
    for t in range(6):
        want = choose(scores[t].tolist(), bias.tolist() if biased else None, 3, *groups)
        assert set(got[t].tolist()) == want
    assert got.unique(dim=1).shape[1] == 3


def test_affinities_are_sigmoid_or_softmax_over_all_experts_in_float32():
    logits = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.bfloat16)
    sigmoid, softmax = affinities(logits, "sigmoid"), affinities(logits, "softmax")
    torch.testing.assert_close(sigmoid, 1 / (1 + torch.tensor([[0.0, -1.0, 2.0]]).exp()))
    torch.testing.assert_close(softmax, torch.tensor([[0.259496, 0.705385, 0.035119]]), rtol=1e-4, atol=1e-5)


def test_a_closed_group_stays_closed_when_every_open_score_is_negative():
    # biases make all of group 0 negative; masking group 1 with 0 instead of -inf would choose from it
    scores = torch.tensor([[0.3, 0.2, 0.1, 0.4]])
    bias = torch.tensor([-0.5, -0.5, -9.0, -9.0])
    got = select_experts(scores, bias, topk=2, num_groups=2, topk_groups=1)
    assert set(got[0].tolist()) == {0, 1}


def test_two_good_experts_beat_one_excellent_one_only_when_a_bias_is_given():
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5]])
    assert set(select_experts(scores, torch.zeros(4), topk=2, num_groups=2, topk_groups=1)[0].tolist()) == {2, 3}
    assert set(select_experts(scores, None, topk=2, num_groups=2, topk_groups=1)[0].tolist()) == {0, 1}


def test_groups_of_a_single_expert_work():
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    got = select_experts(scores, torch.tensor([1.0, 0.0, 0.0]), topk=2, num_groups=3, topk_groups=2)
    assert set(got[0].tolist()) == {0, 1}


def activated(
    logits: list[float], bias: list[float] | None, trained: int, limit: int, threshold: float
) -> dict[int, float]:
    """Expert -> gate of one token that may use `limit` experts, as a loop; the gates of the trained number sum to 2.5
    (DeepSeek-V3 eq 13)."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    order = sorted(range(len(choice)), key=lambda e: -choice[e])
    chosen = order[:limit]
    floor = threshold * max(scores[e] for e in chosen)
    kept = [e for e in chosen if scores[e] >= floor]
    return {e: 2.5 * scores[e] / sum(scores[k] for k in order[:trained]) for e in kept}


@given(seed=st.integers(0, 10_000), biased=st.booleans(), trained=st.integers(1, 8), own=st.booleans())
def test_each_token_uses_its_own_number_of_experts_as_a_loop_says(seed, biased, trained, own):
    torch.manual_seed(seed)
    x, weight = torch.randn(6, 5), torch.randn(8, 5)
    bias = torch.randn(8) * 0.3 if biased else None
    limits = torch.randint(1, 9, (6,)) if own else torch.full((6,), 3)
    thresholds = torch.rand(6).masked_fill(torch.rand(6) < 0.3, 0.0)
    activation = Activation(int(limits.max()), limits if own else None, thresholds)
    options = {"score": "sigmoid", "topk": trained, "num_groups": 1, "topk_groups": 1, "normalize": True, "scale": 2.5}
    routed = route(x, weight, bias, **options, activation=activation)
    for t in range(6):
        got = {e: w for e, w in zip(routed.expert_ids[t].tolist(), routed.weights[t].tolist(), strict=True) if e >= 0}
        logits = (weight.double() @ x[t].double()).tolist()
        want = activated(logits, bias.tolist() if biased else None, trained, int(limits[t]), float(thresholds[t]))
        assert got.keys() == want.keys()
        assert all(abs(got[e] - want[e]) < 1e-4 for e in want)
        assert (routed.weights[t][routed.expert_ids[t] < 0] == 0).all()
    replayed = route(x, weight, bias, **options, activation=activation, given=routed.expert_ids)
    assert torch.equal(replayed.expert_ids, routed.expert_ids)
    assert torch.equal(replayed.weights, routed.weights)


def test_gates_come_from_unbiased_scores():
    scores, ids = torch.tensor([[0.2, 0.8, 0.4, 0.1]]), torch.tensor([[3, 1]])
    got = gate_weights(scores, ids, normalize=True, scale=2.5)
    torch.testing.assert_close(got, torch.tensor([[2.5 * 0.1 / 0.9, 2.5 * 0.8 / 0.9]]))
    got = gate_weights(scores, ids, normalize=False, scale=16.0)
    torch.testing.assert_close(got, torch.tensor([[1.6, 12.8]]))


def test_gates_of_vanishing_scores_are_finite():
    got = gate_weights(torch.zeros(1, 4), torch.tensor([[0, 1]]), normalize=True, scale=1.0)
    assert got.tolist() == [[0.0, 0.0]]


def pick(tokens: int, topk: int, experts: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :topk]


def test_rows_come_in_expert_order_and_tokens_keep_their_order_inside_an_expert():
    order = order_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert order.order.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.counts.tolist() == [2, 0, 2, 2, 0]
    assert order.order[order.inverse].tolist() == list(range(6))


@given(tokens=st.integers(0, 9), topk=st.integers(1, 4), seed=st.integers(0, 99))
def test_dispatch_and_combine_are_the_weighted_sum_over_chosen_experts(tokens, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.rand(tokens, topk, generator=generator, dtype=torch.float64).requires_grad_()
    ids = pick(tokens, topk, 6, seed)
    order = order_by_expert(ids, 6)
    factor = torch.arange(1.0, 7.0, dtype=torch.float64)  # expert e multiplies by e + 1
    rows = dispatch(x, topk, order) * factor.repeat_interleave(order.counts)[:, None]
    got = combine(rows, weights, order)
    want = (
        torch.stack([sum(weights[t, j] * factor[ids[t, j]] * x[t] for j in range(topk)) for t in range(tokens)])
        if tokens
        else x * 1
    )
    torch.testing.assert_close(got, want)
    if tokens:
        upstream = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad(got, (x, weights), upstream), torch.autograd.grad(want, (x, weights), upstream)
        )


def loop_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.stack([weight[e] @ row for e, row in zip(owner, x, strict=True)]) if len(x) else x @ weight[0].T


@pytest.mark.parametrize("widths", [(8, 12), (7, 12), (8, 5), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "counts", [[3, 0, 2, 0], [0, 0, 5, 0], [0, 0, 0, 4], [1, 1, 1, 1], [9, 4, 0, 1], [0, 0, 0, 0]], ids=str
)
def test_grouped_linear_is_the_loop_over_rows(widths, counts):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), widths[0], requires_grad=True)
    weight = torch.randn(4, widths[1], widths[0], requires_grad=True)
    upstream = torch.randn(sum(counts), widths[1])
    got = grouped_linear(x, weight, torch.tensor(counts))
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    want = loop_linear(wide_x, wide_weight, torch.tensor(counts))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got_grads = torch.autograd.grad(got, (x, weight), upstream)
    want_grads = torch.autograd.grad(want, (wide_x, wide_weight), upstream.double())
    for ours, theirs in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_grouped_linear_runs_in_float64_which_the_fused_product_refuses_by_name():
    torch.manual_seed(0)
    x, weight, counts = torch.randn(5, 8).double(), torch.randn(4, 12, 8).double(), torch.tensor([2, 0, 3, 0])
    torch.testing.assert_close(grouped_linear(x, weight, counts), loop_linear(x, weight, counts))
    with use_backend("aten"), pytest.raises(ValueError, match=r"not torch.float64 and torch.float64"):
        grouped_linear(x, weight, counts)
    with use_backend("aten"), pytest.raises(ValueError, match=r"not torch.bfloat16 and torch.float32"):
        grouped_linear(x.bfloat16(), weight.float(), counts)


def test_bfloat16_grouped_linear_is_close_to_float64():
    torch.manual_seed(1)
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    counts = torch.tensor([4, 0, 2])
    want = loop_linear(x.double(), weight.double(), counts)
    torch.testing.assert_close(grouped_linear(x, weight, counts).double(), want, rtol=0.02, atol=0.05)


def poison(sizes: list[int]) -> None:
    """Hand the allocator freed blocks full of NaN, so that uninitialised memory shows."""
    for size in sizes:
        blocks = [torch.full((size,), float("nan")) for _ in range(8)]
        del blocks


def expert_pass(x: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
    order = order_by_expert(ids, gate_up.shape[0])
    rows = dispatch(leaves[0], ids.shape[1], order)
    y = grouped_linear(silu_mul(*grouped_linear(rows, leaves[1], order.counts).chunk(2, -1)), leaves[2], order.counts)
    out = combine(y, torch.full(ids.shape, 0.5), order)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("width", [8, 6])
def test_poisoned_memory_never_shows_and_two_runs_are_bitwise_equal(width):
    torch.manual_seed(2)
    x, gate_up, down = torch.randn(5, 8), torch.randn(9, 2 * width, 8), torch.randn(9, 8, width)
    ids = torch.tensor([[0, 3], [3, 4], [4, 0], [0, 4], [3, 0]])  # six of nine experts idle, the last ones among them
    sizes = [10 * 2 * width, 10 * 8, 10 * width, gate_up.numel(), down.numel(), 40]
    runs = []
    for _ in range(3):
        poison(sizes)
        runs.append(expert_pass(x, ids, gate_up, down))
    for first, second in zip(runs[0], runs[1], strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
    idle = [1, 2, 5, 6, 7, 8]
    assert runs[2][2][idle].eq(0).all()
    assert runs[2][3][idle].eq(0).all()


def experts_loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token, choice by choice, as DeepSeekMoE equation 9 writes it."""
    rows = []
    for t in range(len(x)):
        row = x[t] * 0
        for j, e in enumerate(ids[t].tolist()):
            if e >= 0:
                row = row + weights[t, j] * (down[e] @ (F.silu(gate_up[e, 0] @ x[t]) * (gate_up[e, 1] @ x[t])))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("nobody", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("tokens", "topk", "experts"), [(1, 1, 4), (7, 2, 4), (20, 3, 5), (2, 4, 9)], ids=str)
def test_experts_in_training_have_the_values_and_gradients_of_the_loop(tokens, topk, experts, nobody):
    torch.manual_seed(tokens)
    dim, width = 8, 12
    leaves = [torch.randn(tokens, dim), torch.rand(tokens, topk), torch.randn(experts, 2, width, dim)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.randn(experts, dim, width))]
    ids = pick(tokens, topk, experts).masked_fill(torch.rand(tokens, topk) < nobody, -1)
    upstream = torch.randn(tokens, dim)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = experts_loop(wide[0], ids, *wide[1:])
    want = [want, *torch.autograd.grad(want, wide, upstream.double(), materialize_grads=True)]
    poison([tokens * topk * 2 * width, tokens * topk * dim, *(leaf.numel() for leaf in leaves)])
    got = mix_experts(leaves[0], ids, *leaves[1:])
    got = [got, *torch.autograd.grad(got, leaves, upstream)]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_experts_whose_weights_are_frozen_pass_the_gradient_on():
    torch.manual_seed(0)
    x, weights, ids = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2), pick(6, 2, 4)
    gate_up, down = torch.randn(4, 2, 12, 8), torch.randn(4, 8, 12)
    results = mix_experts(x, ids, weights, gate_up, down), experts_loop(x, ids, weights, gate_up, down)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("counts", [[300, 0, 190, 0], [0, 0, 0, 490], [100, 100, 100, 90]], ids=str)
def test_the_gradient_of_a_stack_is_the_product_over_each_experts_rows_in_poisoned_memory(backend, counts):
    torch.manual_seed(0)
    a, b = torch.randn(490, 64), torch.randn(490, 96)
    a[sum(counts) :] = 0.0
    poison([4 * 64 * 96])
    with use_backend(backend, ["grouped_outer"]):
        got = grouped_outer(a, b, torch.tensor(counts))
    parts = zip(a.double().split([*counts, 490 - sum(counts)])[:4], b.split([*counts, 490 - sum(counts)]), strict=False)
    want = torch.stack([part.T @ rows.double() for part, rows in parts])
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_experts_pass_numerical_differentiation_in_float64():
    torch.manual_seed(0)
    leaves = [torch.randn(4, 3), torch.rand(4, 2), torch.randn(3, 2, 4, 3), torch.randn(3, 3, 4)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    ids = torch.tensor([[0, 2], [2, -1], [0, 2], [-1, -1]])
    assert torch.autograd.gradcheck(lambda x, *rest: mix_experts(x, ids, *rest), leaves)


def test_the_gate_comes_first_and_is_the_one_activated():
    got = silu_mul(*torch.tensor([[1.0, -2.0, 3.0, 5.0]]).chunk(2, -1))
    torch.testing.assert_close(got, F.silu(torch.tensor([[1.0, -2.0]])) * torch.tensor([[3.0, 5.0]]))


def balance_loop(scores: Tensor, ids: Tensor, lengths: list[int]) -> Tensor:
    """DeepSeek-V3 equations 17 to 20 for each sequence, times its length."""
    experts, topk, total, start = scores.shape[1], ids.shape[1], 0.0, 0
    for length in lengths:
        span = range(start, start + length)
        loss = 0.0
        for i in range(experts):
            chosen = sum(int(i in ids[t].tolist()) for t in span)
            f = experts / (topk * length) * chosen
            p = sum(scores[t, i] / scores[t].sum() for t in span) / length
            loss = loss + f * p
        total = total + length * loss
        start += length
    return total


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), topk=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_balance_loss_is_the_loop_of_the_paper_in_value_and_gradient(lengths, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sum(lengths), 4, generator=generator, dtype=torch.float64).requires_grad_()
    ids = pick(sum(lengths), topk, 4, seed)
    (got,) = balance_losses(scores, ids, segments_of(lengths))
    want = balance_loop(scores, ids, lengths)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores))


def test_perfect_balance_costs_one_per_token_and_collapse_costs_more():
    ids = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    ends = segments_of([2, 2])
    assert balance_losses(torch.full((4, 4), 0.3), ids, ends).item() == pytest.approx(4.0)
    collapsed = torch.tensor([[0.9, 0.9, 0.0, 0.0]] * 4)
    assert balance_losses(collapsed, torch.tensor([[0, 1]] * 4), ends).item() == pytest.approx(8.0)


def balances_by_hand(scores, ids, lengths, balance: Balance) -> list[float]:
    """Token by token and device by device, as DeepSeek-V2 writes eq 23 to 31."""
    (_, num_experts), topk, devices = scores.shape, ids.shape[1], balance.devices
    lengths = [sum(lengths)] if balance.over == "batch" else lengths
    totals, start, per_device = [0.0, 0.0, 0.0], 0, num_experts // devices
    for length in lengths:
        rows = range(start, start + length)
        p = [sum(float(scores[t, i] / scores[t].sum()) for t in rows) / length for i in range(num_experts)]
        counts = [sum(ids[t].tolist().count(i) for t in rows) for i in range(num_experts)]
        f = [num_experts / (topk * length) * count for count in counts]
        held = [range(d * per_device, (d + 1) * per_device) for d in range(devices)]
        p_device = [sum(p[i] for i in experts) for experts in held]
        f_device = [sum(f[i] for i in experts) / per_device for experts in held]
        sent = [sum(any(i in experts for i in ids[t].tolist()) for t in rows) for experts in held]
        f_sent = [devices / (balance.reach * length) * count for count in sent]
        totals[0] += length * sum(map(operator.mul, f, p))
        totals[1] += length * sum(map(operator.mul, f_device, p_device))
        totals[2] += length * sum(map(operator.mul, f_sent, p_device))
        start += length
    return totals


@pytest.mark.parametrize("over", ["sequence", "batch"])
@pytest.mark.parametrize("devices", [2, 3, 6])
def test_losses_of_devices_are_the_formulas_of_deepseek_v2(over, devices):
    generator = torch.Generator().manual_seed(devices)
    scores = torch.rand(14, 6, generator=generator, dtype=torch.float64)
    ids = scores.topk(3).indices
    balance = Balance(over, devices, reach=2)
    got = balance_losses(scores, ids, segments_of([5, 1, 8]), balance)
    assert got.tolist() == pytest.approx(balances_by_hand(scores, ids, [5, 1, 8], balance))


def test_all_balance_losses_are_one_per_token_at_perfect_balance_and_nobody_counts_nowhere():
    ids = torch.tensor([[0, 2], [1, 3], [2, 0], [3, 1]])
    even = balance_losses(torch.full((4, 4), 0.3), ids, segments_of([4]), Balance("sequence", 2, reach=2))
    assert even.tolist() == pytest.approx([4.0, 4.0, 4.0])
    nobody = balance_losses(torch.full((4, 4), 0.3), torch.full((4, 2), -1), segments_of([4]), Balance("batch", 2, 2))
    assert nobody.tolist() == [0.0, 0.0, 0.0]


def test_a_batch_may_be_balanced_whose_sequences_are_not():
    ids = torch.tensor([[0, 1]] * 4 + [[2, 3]] * 4)
    scores = torch.full((8, 4), 0.1).scatter(1, ids, 0.9)
    by_sequence, by_batch = (
        balance_losses(scores, ids, segments_of([4, 4]), Balance(over)).item() for over in ("sequence", "batch")
    )
    assert by_batch == pytest.approx(8.0)
    assert by_sequence == pytest.approx(8.0 * 1.8)
