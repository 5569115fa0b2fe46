import pytest
import torch
import torch.nn.functional as F

from kogia.model.config import MoEConfig
from kogia.model.moe import MoE, Router


def build(config: MoEConfig, dim: int = 8, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(dim, config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.normal_()
    return moe


def loop(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3 equations 12 to 16, token by token in float64, without groups."""
    c, out = moe.config, []
    for u in x.double():
        logits = moe.gate.weight.double() @ u
        s = logits.sigmoid() if c.score == "sigmoid" else logits.softmax(0)
        bias = moe.gate.e_score_correction_bias
        chosen = (s if bias is None else s + bias.double()).topk(c.topk).indices
        gates = s[chosen] / s[chosen].sum() if c.normalize_topk else s[chosen]
        y = 0.0
        for gate, e in zip(gates, chosen.tolist(), strict=True):
            w_gate, w_up = moe.experts.gate_up_proj[e].double().chunk(2)
            y = y + c.routed_scale * gate * (moe.experts.down_proj[e].double() @ (F.silu(w_gate @ u) * (w_up @ u)))
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
    got, want = moe(x, torch.tensor([0, 4, 9])), loop(moe, x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    leaves, upstream = (x, *moe.parameters()), torch.randn(9, 8)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, leaves, upstream.double())
    for ours, theirs in zip(got_grads, want_grads, strict=True):  # the router's among them, through the gates alone
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_load_counts_only_training_forwards_with_gradients():
    moe, x = build(MoEConfig(num_experts=4, topk=2, expert_dim=4)), torch.randn(6, 8)
    ends = torch.tensor([0, 6])
    moe.eval()(x, ends)
    assert moe.gate.load.sum() == 0
    assert moe.gate.balance_loss is None
    moe.train()
    with torch.no_grad():
        moe(x, ends)
    assert moe.gate.load.sum() == 0
    moe(x, ends)
    expert_ids, _ = moe.gate(x, ends)
    assert moe.gate.load.tolist() == (2 * torch.bincount(expert_ids.flatten(), minlength=4)).tolist()
    assert moe.gate.balance_loss is not None


def test_the_bias_moves_towards_underused_experts_by_the_sign_alone():
    router = Router(4, MoEConfig(num_experts=4, topk=1))
    router.load.copy_(torch.tensor([100, 5, 4, 1]))  # mean 27.5
    router.update_bias(0.001)
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([-0.001, 0.001, 0.001, 0.001]))
    assert router.load.sum() == 0
    router.load.copy_(torch.tensor([3, 5, 4, 4]))  # two stand exactly at the mean
    router.update_bias(0.01)
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.009, -0.009, 0.001, 0.001]))


def test_speed_zero_freezes_the_bias_and_still_clears_the_load():
    router = Router(4, MoEConfig(num_experts=4, topk=1))
    router.load.fill_(3)[0] = 9
    router.update_bias(0.0)
    assert router.e_score_correction_bias.eq(0).all()
    assert router.load.eq(0).all()


def test_the_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    router = Router(8, MoEConfig(num_experts=8, topk=2)).train()
    torch.nn.init.normal_(router.weight)
    x, ends, violations = torch.randn(256, 8) + 1.0, torch.tensor([0, 256]), []
    for _ in range(150):
        router(x, ends)
        violations.append(router.max_violation())
        router.update_bias(0.01)
    assert violations[0] > 0.5
    assert sum(violations[-20:]) / 20 < 0.15


def test_evaluation_leaves_the_bias_alone_and_the_bias_is_no_parameter():
    moe, x = build(MoEConfig(num_experts=4, topk=2, expert_dim=4)).eval(), torch.randn(6, 8)
    before = moe.gate.e_score_correction_bias.clone()
    moe(x, torch.tensor([0, 6]))
    moe.gate.update_bias(0.1)  # no load was counted, every expert stands at the mean
    assert torch.equal(moe.gate.e_score_correction_bias, before)
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())
    assert "gate.e_score_correction_bias" in moe.state_dict()
    assert "gate.load" not in moe.state_dict()


def test_softmax_routers_carry_no_bias():
    router = Router(4, MoEConfig(num_experts=4, topk=1, score="softmax"))
    assert router.e_score_correction_bias is None
    router.load.fill_(1)[0] = 5
    router.update_bias(0.001)
    assert router.load.eq(0).all()


def test_max_violation_is_the_excess_of_the_busiest_expert():
    router = Router(4, MoEConfig(num_experts=4, topk=1))
    assert router.max_violation() == 0.0
    router.load.copy_(torch.tensor([6, 2, 4, 4]))
    assert router.max_violation() == pytest.approx(0.5)
    router.load.copy_(torch.tensor([16, 0, 0, 0]))
    assert router.max_violation() == pytest.approx(3.0)


def test_the_bias_steers_the_choice_and_never_the_weights():
    moe, x, ends = build(MoEConfig(num_experts=6, topk=2, expert_dim=4)), torch.randn(5, 8), torch.tensor([0, 5])
    router = moe.gate
    router.e_score_correction_bias.zero_()[4] = 10.0
    ids, weights = router(x, ends)
    assert (ids == 4).any(1).all()
    scores = (x @ router.weight.T).sigmoid().gather(1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(1, keepdim=True))
