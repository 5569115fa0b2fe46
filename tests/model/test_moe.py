import pytest
import torch
import torch.nn.functional as F

from kogia.model.config import MoEConfig
from kogia.model.layers import StepContext
from kogia.model.moe import MoE, Router, max_violation
from kogia.model.routing import Routing
from kogia.ops.segments import segments_of


def step(*lengths: int, routing: Routing | None = None) -> StepContext:
    nothing = torch.empty(0, 0)
    return StepContext(segments_of(lengths), nothing, nothing, routing=routing)


def build(config: MoEConfig, dim: int = 8, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(dim, config, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.normal_()
    return moe


def loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 equations 12 to 16, token by token in float64, without groups."""
    c, out = moe.gate.config, []
    for u in x.double():
        logits = moe.gate.weight.double() @ u
        s = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(0)
        bias = moe.gate.e_score_correction_bias
        chosen = (s if bias is None else s + bias.double()).topk(c.topk).indices
        gates = s[chosen] / s[chosen].sum() if c.normalize_topk else s[chosen]
        y = 0.0
        for gate, e in zip(gates, chosen.tolist(), strict=True):
            w_gate, w_up = moe.experts.gate_up_proj.weight[e].double()
            y = y + c.routed_scale * gate * (
                moe.experts.down_proj.weight[e].double() @ (F.silu(w_gate @ u) * (w_up @ u))
            )
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            hidden = F.silu(shared.gate_proj.weight.double() @ u) * (shared.up_proj.weight.double() @ u)
            y = y + shared.down_proj.weight.double() @ hidden
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig(num_experts=6, num_shared_experts=1, topk=2, expert_dim=4, routed_scale=2.5),
        MoEConfig(num_experts=5, num_shared_experts=2, topk=3, expert_dim=3, score="softmax", normalize_topk=False),
        MoEConfig(num_experts=7, num_shared_experts=0, topk=1, expert_dim=4, normalize_topk=False),
    ],
    ids=["v3", "v2-lite", "no shared expert"],
)
def test_a_mixture_layer_is_the_token_by_token_formula(config):
    moe, x = build(config), torch.randn(9, 8, requires_grad=True)
    got, want = moe(x, step(4, 5)), loop(moe, x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    leaves, upstream = (x, *moe.parameters()), torch.randn(9, 8)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, leaves, upstream.double())
    for ours, theirs in zip(got_grads, want_grads, strict=True):  # the router's among them, through the gates alone
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_loads_are_counted_by_the_routing_of_the_step_and_by_nothing_else():
    moe, x = build(MoEConfig(num_experts=4, topk=2, expert_dim=4)), torch.randn(6, 8)
    routing = Routing(losses=True)
    moe(x, step(6, routing=routing))
    ids = moe.gate(x, step(6)).expert_ids
    assert routing.chosen[0].equal(ids)
    assert routing.loads(1).tolist() == [torch.bincount(ids.flatten(), minlength=4).tolist()]
    assert routing.balance_loss() > 0
    assert Routing().loads(1) is None
    assert Routing().balance_loss() is None


def test_given_choices_are_replayed_and_nobody_weighs_nothing():
    moe, x = build(MoEConfig(num_experts=4, topk=2, expert_dim=4, num_shared_experts=0)), torch.randn(3, 8)
    given = torch.tensor([[3, 1], [2, -1], [-1, -1]])
    routing = Routing({0: given})
    got = moe(x, step(3, routing=routing))
    assert routing.loads(1).tolist() == [[0, 1, 1, 1]]
    scores = (x @ moe.gate.weight.T).sigmoid()

    def expert(e: int, u: torch.Tensor) -> torch.Tensor:
        w_gate, w_up = moe.experts.gate_up_proj.weight[e]
        return moe.experts.down_proj.weight[e] @ (F.silu(w_gate @ u) * (w_up @ u))

    both = scores[0, 3] * expert(3, x[0]) + scores[0, 1] * expert(1, x[0])
    torch.testing.assert_close(got[0], both / (scores[0, 3] + scores[0, 1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], expert(2, x[1]), rtol=1e-4, atol=1e-4)
    assert got[2].eq(0).all()


def test_the_bias_moves_towards_underused_experts_by_the_sign_alone():
    router = Router(4, MoEConfig(num_experts=4, topk=1), 0)
    router.update_bias(torch.tensor([100, 5, 4, 1]), 0.001)  # mean 27.5
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([-0.001, 0.001, 0.001, 0.001]))
    router.update_bias(torch.tensor([3, 5, 4, 4]), 0.01)  # two stand exactly at the mean
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.009, -0.009, 0.001, 0.001]))


def test_speed_zero_or_no_load_leaves_the_bias():
    router = Router(4, MoEConfig(num_experts=4, topk=1), 0)
    router.update_bias(torch.tensor([9, 3, 3, 3]), 0.0)
    router.update_bias(torch.zeros(4, dtype=torch.long), 0.1)  # every expert stands at the mean
    assert router.e_score_correction_bias.eq(0).all()


def test_the_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    router = Router(8, MoEConfig(num_experts=8, topk=2), 0)
    torch.nn.init.normal_(router.weight)
    x, violations = torch.randn(256, 8) + 1.0, []
    for _ in range(150):
        routing = Routing()
        router(x, step(256, routing=routing))
        loads = routing.loads(1)
        violations.append(max_violation(loads).item())
        router.update_bias(loads[0], 0.01)
    assert violations[0] > 0.5
    assert sum(violations[-20:]) / 20 < 0.15


def test_the_bias_is_no_parameter_and_is_saved():
    moe = build(MoEConfig(num_experts=4, topk=2, expert_dim=4))
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())
    assert "gate.e_score_correction_bias" in moe.state_dict()


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float16)]
)
def test_the_bias_stays_float32_to_the_bit_when_the_model_is_cast(cast):
    moe = build(MoEConfig(num_experts=4, topk=2, expert_dim=4))
    before = torch.randn(4)
    moe.gate.e_score_correction_bias.copy_(before)
    cast(moe)
    assert moe.gate.weight.dtype != torch.float32
    assert moe.gate.e_score_correction_bias.dtype == torch.float32
    assert moe.gate.e_score_correction_bias.equal(before)
    assert "e_score_correction_bias" in dict(moe.gate.named_buffers())


def test_softmax_routers_carry_no_bias():
    router = Router(4, MoEConfig(num_experts=4, topk=1, score="softmax"), 0)
    assert router.e_score_correction_bias is None
    router.update_bias(torch.tensor([5, 1, 1, 1]), 0.001)
    assert router.e_score_correction_bias is None


def test_max_violation_is_the_excess_of_the_busiest_expert():
    loads = torch.tensor([[6, 2, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(max_violation(loads), torch.tensor([0.5, 3.0, float("nan")]).double(), equal_nan=True)


def test_the_bias_steers_the_choice_and_never_the_weights():
    moe, x = build(MoEConfig(num_experts=6, topk=2, expert_dim=4)), torch.randn(5, 8)
    router = moe.gate
    router.e_score_correction_bias.zero_()[4] = 10.0
    routed = router(x, step(5))
    assert (routed.expert_ids == 4).any(1).all()
    scores = (x @ router.weight.T).sigmoid().gather(1, routed.expert_ids)
    torch.testing.assert_close(routed.weights, scores / scores.sum(1, keepdim=True))
