"""The policy loss against slow loops in float64 written from the papers' equations."""

import math
import random
from dataclasses import replace

import pytest
import torch

from kogia.model.packed import pack
from kogia.rl.advantage import group_advantages
from kogia.rl.config import PolicyLossConfig
from kogia.rl.loss import PolicyBatch, aggregation_weights, policy_loss

MAX_TOKENS = 12
PROMPT = 3


class Sample:
    """One completion with everything the equations need, as Python numbers."""

    def __init__(self, draw: random.Random, length: int, advantage: float, truncated: bool, spread: float) -> None:
        self.advantage, self.truncated = advantage, truncated
        self.new = [-draw.uniform(0.05, 3.0) for _ in range(length)]
        self.old = [x + draw.gauss(0, spread) for x in self.new]
        self.engine = [x + draw.gauss(0, spread / 2) for x in self.old]
        self.reference = [x + draw.gauss(0, spread) for x in self.new]


def draw_samples(seed=0, count=8, spread=0.4):
    draw = random.Random(seed)
    return [
        Sample(draw, draw.randint(1, MAX_TOKENS), draw.gauss(0, 1), truncated=i % 4 == 3, spread=spread)
        for i in range(count)
    ]


def build_batch(samples, weights, *, old=True, reference=True):
    """Micro-batch with prompts in front, whose rows hold poison where the loss must not look."""

    def rows(field, outside):
        return torch.tensor([x for s in samples for x in [outside] * PROMPT + field(s)], dtype=torch.float64)

    tokens = pack([[7] * (PROMPT + len(s.new)) for s in samples])
    batch = PolicyBatch(
        tokens,
        rows(lambda s: [1.0] * len(s.new), 0.0).bool(),
        rows(lambda s: [s.advantage] * len(s.new), 99.0),
        rows(lambda s: s.engine, float("-inf")),
        weights.double(),
        sum(len(s.new) for s, weight in zip(samples, weights.tolist(), strict=True) if weight > 0),
        rows(lambda s: s.old, float("nan")) if old else None,
        rows(lambda s: s.reference, float("inf")) if reference else None,
    )
    return rows(lambda s: s.new, 0.0).requires_grad_(), batch


def weigh(samples, config):
    lengths = torch.tensor([len(s.new) for s in samples])
    return aggregation_weights(lengths, torch.tensor([s.truncated for s in samples]), config, MAX_TOKENS)


def loss_and_gradient(samples, config, **fields):
    weights, denominator = weigh(samples, config)
    logprobs, batch = build_batch(samples, weights, **fields)
    loss, metrics = policy_loss(logprobs, batch, config)
    (loss / denominator).backward()
    sums = {name: float(value) for name, value in metrics.items()} | {"tokens": batch.num_loss_tokens}
    return loss.item() / denominator, logprobs.grad, sums


def clip(x, config):
    return min(max(x, 1 - config.clip_low), 1 + config.clip_high)


def reference_loss(samples, config):
    """-J of the papers, with plain loops."""
    kept = [s for s in samples if not (config.truncated == "mask" and s.truncated)]
    per_sample = []
    for s in kept:
        length = len(s.new)
        s_ratio = math.exp(sum(n - o for n, o in zip(s.new, s.old, strict=True)) / length)
        total = 0.0
        for t in range(length):
            r = math.exp(s.new[t] - s.old[t]) if config.ratio == "token" else s_ratio
            if config.objective == "cispo":
                term = clip(r, config) * s.advantage * s.new[t]
            else:
                term = min(r * s.advantage, clip(r, config) * s.advantage)
            if config.rollout_is_cap is not None:
                term *= min(math.exp(s.old[t] - s.engine[t]), config.rollout_is_cap)
            rho = math.exp(s.reference[t] - s.new[t])
            kl = rho - math.log(rho) - 1
            total += term - config.kl_coef * (kl * r if config.kl == "k3_unbiased" else kl)
        per_sample.append(total)
    if config.aggregate == "token":
        return -sum(per_sample) / sum(len(s.new) for s in kept)
    if config.aggregate == "sequence":
        return -sum(x / len(s.new) for x, s in zip(per_sample, kept, strict=True)) / len(kept)
    return -sum(x / MAX_TOKENS for x in per_sample) / len(kept)


VARIANTS = {
    "grpo": PolicyLossConfig(aggregate="sequence", clip_high=0.2, kl_coef=0.04),
    "r1": PolicyLossConfig(aggregate="sequence", clip_low=10.0, clip_high=10.0, kl_coef=0.001),
    "dr_grpo": PolicyLossConfig(aggregate="constant", clip_high=0.2),
    "dapo": PolicyLossConfig(aggregate="token", truncated="mask"),
    "gspo": PolicyLossConfig(ratio="sequence", aggregate="sequence", clip_low=3e-2, clip_high=4e-2),
    "cispo": PolicyLossConfig(objective="cispo", clip_low=1.0, clip_high=0.28),
    "truncated_importance_sampling": PolicyLossConfig(rollout_is_cap=1.1, truncated="mask"),
    "v3.2": PolicyLossConfig(kl_coef=0.1, kl="k3_unbiased", aggregate="sequence", truncated="mask"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_is_the_papers_equation(name):
    for seed in range(5):
        samples = draw_samples(seed)
        loss, _, _ = loss_and_gradient(samples, VARIANTS[name])
        # the weights 1 / |o_i| are float32, all else is float64
        assert loss == pytest.approx(reference_loss(samples, VARIANTS[name]), rel=2e-7)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "cispo"])
def test_the_gradient_is_the_finite_difference_of_the_equation(name):
    """CISPO's stopped weight has no such potential; its gradient has a test of its own."""
    config, samples = VARIANTS[name], draw_samples(3, count=5)
    _, gradient, _ = loss_and_gradient(samples, config)
    row, step = 0, 1e-6
    for s in samples:
        row += PROMPT
        for t in range(len(s.new)):
            values = []
            for sign in (1, -1):
                s.new[t] += sign * step
                values.append(reference_loss(samples, config))
                s.new[t] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert gradient[row].item() == pytest.approx(slope, abs=1e-7)
            row += 1


@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_add_up_to_the_whole(name):
    config, samples = VARIANTS[name], draw_samples(1, count=9)
    weights, denominator = weigh(samples, config)
    whole, gradient, metrics = loss_and_gradient(samples, config)
    loss, gradients, tokens = 0.0, [], 0
    for start, end in ((0, 2), (2, 3), (3, 9)):
        logprobs, batch = build_batch(samples[start:end], weights[start:end])
        part, _ = policy_loss(logprobs, batch, config)
        (part / denominator).backward()
        loss += part.item() / denominator
        tokens += batch.num_loss_tokens
        gradients.append(logprobs.grad)
    assert loss == pytest.approx(whole, rel=1e-12)
    assert tokens == metrics["tokens"]
    torch.testing.assert_close(torch.cat(gradients), gradient)


def test_on_policy_the_gradient_is_reinforce_with_the_group_baseline():
    rewards = [1.0, 0.0, -0.3, 1.0]
    samples = draw_samples(6, count=4, spread=0.0)
    for sample, advantage in zip(
        samples, group_advantages(torch.tensor([rewards]), normalize_std=False)[0], strict=True
    ):
        sample.advantage = advantage.item()
    for config in (PolicyLossConfig(), PolicyLossConfig(objective="cispo"), PolicyLossConfig(ratio="sequence")):
        _, gradient, _ = loss_and_gradient(samples, config, reference=False)
        count = sum(len(s.new) for s in samples)
        baseline = sum(rewards) / 4
        expected = [
            x
            for s, r in zip(samples, rewards, strict=True)
            for x in [0.0] * PROMPT + [-(r - baseline) / count] * len(s.new)
        ]
        assert gradient.tolist() == pytest.approx(expected, abs=1e-7)


def test_descent_raises_good_completions_and_lowers_bad_ones():
    for name, config in VARIANTS.items():
        samples = [s for s in draw_samples(2, count=12, spread=0.001) if not s.truncated]
        _, gradient, _ = loss_and_gradient(samples, replace(config, kl_coef=0.0))
        row = 0
        for s in samples:
            row += PROMPT
            for _ in s.new:
                assert gradient[row].item() * s.advantage < 0.0, name
                row += 1


def test_cispo_keeps_the_gradient_that_clipping_loses():
    samples = draw_samples(0, count=1)
    samples[0].truncated, samples[0].advantage = False, 1.0
    samples[0].old = [x - 2.0 for x in samples[0].new]  # ratio e^2, far above the clip
    count = len(samples[0].new)
    _, clipped, sums = loss_and_gradient(samples, PolicyLossConfig())
    assert clipped.abs().max() == 0.0
    assert sums["clip_fraction"] == count
    _, kept, sums = loss_and_gradient(samples, PolicyLossConfig(objective="cispo", clip_high=0.28))
    assert kept[PROMPT:].tolist() == pytest.approx([-1.28 / count] * count)
    assert sums["clip_fraction"] == count


def test_the_clip_is_pessimistic():
    """A ratio beyond the range keeps its gradient where moving back would help."""
    samples = draw_samples(0, count=1)
    samples[0].truncated = False
    for offset, advantage, alive in ((2.0, 1.0, False), (2.0, -1.0, True), (-2.0, 1.0, True), (-2.0, -1.0, False)):
        samples[0].advantage = advantage
        samples[0].old = [x - offset for x in samples[0].new]
        _, gradient, _ = loss_and_gradient(samples, PolicyLossConfig())
        assert (gradient.abs().max().item() > 0.0) is alive


def test_the_r1_clip_range_never_binds_below():
    samples = draw_samples(0, count=1)
    samples[0].truncated, samples[0].advantage = False, -1.0
    samples[0].old = [x + 5.0 for x in samples[0].new]
    _, gradient, sums = loss_and_gradient(samples, VARIANTS["r1"])
    assert gradient[PROMPT:].abs().min() > 0.0
    assert sums["clip_fraction"] == 0


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_masked_truncation_equals_a_batch_without_those_completions(aggregate):
    config, samples = PolicyLossConfig(aggregate=aggregate, truncated="mask"), draw_samples(4)
    loss, gradient, metrics = loss_and_gradient(samples, config)
    rest = [s for s in samples if not s.truncated]
    alone, gradient_alone, metrics_alone = loss_and_gradient(rest, config)
    assert loss == pytest.approx(alone, rel=1e-12)
    rows = torch.cat([torch.full((PROMPT + len(s.new),), not s.truncated) for s in samples])
    torch.testing.assert_close(gradient[rows], gradient_alone)
    assert gradient[~rows].abs().max() == 0.0
    assert metrics == pytest.approx(metrics_alone)
    counted, _, _ = loss_and_gradient(samples, replace(config, truncated="count"))
    assert counted != pytest.approx(loss)


def test_weights_and_denominators_by_hand():
    lengths, truncated = torch.tensor([2, 4, 10, 4]), torch.tensor([False, False, True, False])
    for aggregate, kept_weights, denominator in (
        ("token", [1.0, 1.0, 0.0, 1.0], 10.0),
        ("sequence", [0.5, 0.25, 0.0, 0.25], 3.0),
        ("constant", [0.1, 0.1, 0.0, 0.1], 3.0),
    ):
        config = PolicyLossConfig(aggregate=aggregate, truncated="mask")
        weights, total = aggregation_weights(lengths, truncated, config, 10)
        assert weights.tolist() == pytest.approx(kept_weights)
        assert total == denominator
    everything = torch.ones(4, dtype=torch.bool)
    assert aggregation_weights(lengths, everything, PolicyLossConfig(truncated="mask"), 10)[1] == 0.0


def test_extreme_ratios_stay_finite_and_k3_is_never_negative():
    samples = draw_samples(0, count=6)
    for index, s in enumerate(samples):
        gap = (-1) ** index * 10.0 ** (index - 2)  # 0.01 to 1000
        s.old, s.reference = [x - gap for x in s.new], [x + gap for x in s.new]
        s.advantage = -1.0
    for config in (PolicyLossConfig(kl_coef=0.1), PolicyLossConfig(kl_coef=0.1, ratio="sequence")):
        weights, _ = weigh(samples, config)
        logprobs, batch = build_batch(samples, weights)
        single = replace(
            batch,
            behaviour_logprobs=batch.behaviour_logprobs.float(),
            old_logprobs=batch.old_logprobs.float(),
            reference_logprobs=batch.reference_logprobs.float(),
        )
        logprobs = logprobs.detach().float().requires_grad_()
        loss, metrics = policy_loss(logprobs, single, config)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logprobs.grad).all()
        assert all(torch.isfinite(v) for v in metrics.values())
        assert metrics["kl"] >= 0.0
        assert metrics["approx_kl"] >= 0.0


def test_k3_of_a_policy_to_itself_is_zero_with_zero_gradient():
    samples = draw_samples(0, count=3, spread=0.0)
    for s in samples:
        s.advantage = 0.0
    loss, gradient, metrics = loss_and_gradient(samples, PolicyLossConfig(kl_coef=1.0))
    assert loss == 0.0
    assert gradient.abs().max() == 0.0
    assert metrics["kl"] == 0.0


def test_metrics_are_sums_over_loss_tokens():
    samples = draw_samples(5)
    _, _, metrics = loss_and_gradient(samples, PolicyLossConfig())
    pairs = [(n, o, e, r) for s in samples for n, o, e, r in zip(s.new, s.old, s.engine, s.reference, strict=True)]
    assert metrics["tokens"] == len(pairs)
    assert metrics["ratio"] == pytest.approx(sum(math.exp(n - o) for n, o, _, _ in pairs))
    assert metrics["entropy"] == pytest.approx(-sum(n for n, _, _, _ in pairs))
    assert metrics["approx_kl"] == pytest.approx(sum(math.exp(n - o) - 1 - (n - o) for n, o, _, _ in pairs))
    assert metrics["engine_kl"] == pytest.approx(sum(math.exp(o - e) - 1 - (o - e) for _, o, e, _ in pairs))
    assert metrics["kl"] == pytest.approx(sum(math.exp(r - n) - 1 - (r - n) for n, _, _, r in pairs))


def test_an_exact_entropy_is_passed_through():
    samples = draw_samples(5)
    weights, _ = weigh(samples, PolicyLossConfig())
    logprobs, batch = build_batch(samples, weights)
    _, metrics = policy_loss(logprobs, batch, PolicyLossConfig(), entropy=torch.full_like(logprobs, 0.5).detach())
    assert metrics["entropy"].item() == pytest.approx(0.5 * batch.num_loss_tokens)


def test_without_old_logprobs_the_ratio_is_taken_to_the_engine():
    samples = draw_samples(7)
    for s in samples:
        s.old = s.engine
    loss, gradient, _ = loss_and_gradient(samples, PolicyLossConfig(), old=False)
    with_old, gradient_with_old, _ = loss_and_gradient(samples, PolicyLossConfig())
    assert loss == pytest.approx(with_old)
    assert torch.equal(gradient, gradient_with_old)


def test_settings_without_their_inputs_are_refused():
    samples = draw_samples(0)
    with pytest.raises(ValueError, match="kl_coef = 0.1 needs reference_logprobs"):
        loss_and_gradient(samples, PolicyLossConfig(kl_coef=0.1), reference=False)
    with pytest.raises(ValueError, match="rollout_is_cap = 2.0 needs old_logprobs"):
        loss_and_gradient(samples, PolicyLossConfig(rollout_is_cap=2.0), old=False)
    with pytest.raises(ValueError, match="clip_low = -0.1"):
        PolicyLossConfig(clip_low=-0.1)
    with pytest.raises(ValueError, match="rollout_is_cap = 0.5"):
        PolicyLossConfig(rollout_is_cap=0.5)
