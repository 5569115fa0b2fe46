"""Advantages against plain arithmetic, and the shaping and control rewards."""

from math import nan
from pathlib import Path
from statistics import fmean, pstdev, stdev

import pytest
import torch

from kogia.rl import advantage as advantage_module
from kogia.rl import config as config_module
from kogia.rl.advantage import group_advantages, is_zero_variance, overlong_penalty, random_rewards

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def test_advantages_are_standard_scores_with_the_sample_deviation():
    groups = [[1.0, 0.0, 0.0, -0.3], [0.1, 0.9, 1.1, 1.1]]
    scored = group_advantages(torch.tensor(groups), normalize_std=True)
    plain = group_advantages(torch.tensor(groups), normalize_std=False)
    for row, group in enumerate(groups):
        expected = [(r - fmean(group)) / (stdev(group) + 1e-6) for r in group]
        assert scored[row].tolist() == pytest.approx(expected, abs=1e-5)
        assert plain[row].tolist() == pytest.approx([r - fmean(group) for r in group], abs=1e-6)


STATED = {
    "sample": (0.4717, [0.689, 0.053, 0.689, -1.431]),
    "population": (0.4085, [0.796, 0.061, 0.796, -1.652]),
}


@pytest.mark.parametrize("std", STATED)
def test_the_stated_deviation_and_advantages_are_what_comes_out(std):
    rewards, (deviation, advantages) = [1.0, 0.7, 1.0, 0.0], STATED[std]
    group = torch.tensor([rewards], dtype=torch.float64)
    scored = group_advantages(group, normalize_std=True, std=std)[0]
    assert scored.tolist() == pytest.approx(advantages, abs=6e-4)
    assert ((group[0] - group.mean()) / scored).tolist() == pytest.approx([deviation] * 4, abs=6e-5)
    for place in (advantage_module.__doc__, Path(config_module.__file__).read_text(), ARCHITECTURE.read_text()):
        words = " ".join(place.split())
        assert f"{deviation}" in words and all(f"{value}" in words for value in advantages)


@pytest.mark.parametrize("group", [[1.0, 0.0], [-0.3, 1.0, 1.0, 1.0, 0.1], [5.0, nan, 6.0, 8.0]])
def test_either_deviation_is_that_of_the_statistics_module(group):
    judged = [reward for reward in group if reward == reward]
    for std, deviation in (("sample", stdev(judged)), ("population", pstdev(judged))):
        scored = group_advantages(torch.tensor([group], dtype=torch.float64), normalize_std=True, std=std)[0].tolist()
        expected = [(reward - fmean(judged)) / (deviation + 1e-6) for reward in judged]
        assert [a for a, reward in zip(scored, group) if reward == reward] == pytest.approx(expected)


def test_a_group_with_one_reward_has_exactly_zero_advantage_despite_rounding():
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.mean()).abs().max() > 0.0  # the float32 mean of seven 0.1 is not 0.1
    for normalize in (True, False):
        assert group_advantages(rewards, normalize_std=normalize).tolist() == [[0.0] * 7]


def test_zero_variance_groups_are_told_apart():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [-0.3, -0.3]])
    assert is_zero_variance(rewards).tolist() == [True, True, False, True]


def test_advantages_ignore_shift_and_scale_when_normalised():
    rewards = torch.tensor([[1.0, 0.0, 2.0, 0.5]], dtype=torch.float64)
    base = group_advantages(rewards, normalize_std=True)
    moved = group_advantages(100 * rewards + 7, normalize_std=True)
    torch.testing.assert_close(base, moved, atol=1e-5, rtol=0)
    assert base.sum().abs() < 1e-12


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group_size = 1"):
        group_advantages(torch.ones(3, 1), normalize_std=True)


def test_the_overlong_penalty_follows_dapo_equation_13():
    lengths = torch.tensor([0, 16384, 18432, 20480, 30000])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == pytest.approx([0.0, 0.0, -0.5, -1.0, -1.0])
    with pytest.raises(ValueError, match="overlong_buffer = 300"):
        overlong_penalty(lengths, 200, 300)


def test_permuted_rewards_keep_each_group_and_lose_the_order():
    rewards = torch.arange(40.0).reshape(5, 8)
    shuffled = random_rewards(rewards, "permute", torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.sort(dim=1).values, rewards)
    assert not torch.equal(shuffled, rewards)
    again = random_rewards(rewards, "permute", torch.Generator().manual_seed(0))
    assert torch.equal(shuffled, again)


def test_bernoulli_rewards_are_fair_coins_independent_of_the_samples():
    rewards = torch.cat([torch.ones(200, 16), torch.zeros(200, 16)])
    coins = random_rewards(rewards, "bernoulli", torch.Generator().manual_seed(1))
    assert set(coins.unique().tolist()) == {0.0, 1.0}
    assert coins[:200].mean().item() == pytest.approx(0.5, abs=0.03)
    assert coins[200:].mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "group", [[1.0, -0.3, -0.3, nan], [nan, nan, 1.0, 0.0], [1.0, 0.7, nan, 1.0], [-0.3, nan, -0.1, -0.2]]
)
def test_a_failed_check_neither_pays_nor_moves_the_baseline(group, normalize):
    judged = [r for r in group if r == r]
    advantages = group_advantages(torch.tensor([group]), normalize_std=normalize)[0]
    alone = iter(group_advantages(torch.tensor([judged]), normalize_std=normalize)[0].tolist())
    for reward, advantage in zip(group, advantages.tolist(), strict=True):
        expected = min(advantages.tolist()) if reward != reward else next(alone)
        assert advantage == pytest.approx(expected)
    assert min(advantages.tolist()) < 0.0


@pytest.mark.parametrize("group", [[nan, nan, nan], [1.0, nan, nan], [1.0, 1.0, nan], [-0.3, -0.3, nan]])
def test_a_group_with_one_reward_beside_failed_checks_teaches_nothing(group):
    rewards = torch.tensor([group])
    assert is_zero_variance(rewards).tolist() == [True]
    assert group_advantages(rewards, normalize_std=True).tolist() == [[0.0, 0.0, 0.0]]
