"""RL settings: recipes survive a round trip and mistakes are named."""

import pytest

from kogia.config import from_dict, to_dict
from kogia.rl.config import PolicyLossConfig, RLConfig


def test_settings_survive_a_recipe():
    loss = PolicyLossConfig(objective="cispo", clip_low=1.0, kl_coef=0.001, rollout_is_cap=2.0)
    config = RLConfig("m", loss=loss, random_reward="permute", reference_every=400)
    assert from_dict(RLConfig, to_dict(config)) == config
    assert from_dict(RLConfig, {"init": "m"}) == RLConfig("m")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "init is missing"),
        ({"group_size": 1}, "group_size = 1: must be at least 2"),
        ({"temperature": 0.0}, "a rollout must sample"),
        ({"updates_per_rollout": 33}, "at most prompts_per_step = 32"),
        ({"overlong_penalty": 0.5}, "overlong_buffer = 0"),
        ({"reference_every": 400}, "without loss.kl_coef"),
        ({"std": "population", "normalize_std": False}, "std = 'population' without normalize_std"),
        ({"resume": True, "overwrite": True}, "both set"),
        ({"loss": {"aggregate": "tokens"}}, "did you mean 'token'"),
        ({"loss": {"clip_hi": 0.3}}, "did you mean 'clip_high'"),
        ({"random_reward": "yes"}, "random_reward = 'yes'"),
        ({"task_options": {"sudoku": {}}}, "no such task"),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RLConfig, {"init": "m", **data} if data else {})
