import math

import pytest

from kogia.train.config import OptimConfig
from kogia.train.schedule import learning_rate


def rates(schedule: str, steps: list[int], **fields) -> list[float]:
    optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.2, **fields)
    return [learning_rate(optim, step, 24) for step in steps]


def test_warm_up_is_linear_and_reaches_the_peak_on_its_last_step():
    assert rates("constant", [0, 1, 2, 3, 4, 23]) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimConfig(lr=3.0, warmup_steps=0, schedule="constant"), 0, 10) == 3.0


def test_each_schedule_has_the_values_worked_out_by_hand():
    # 20 steps follow the warm-up: step 4 is 0 % of them, 9 is 25 %, 14 is 50 %, 19 is 75 %, 24 would be 100 %
    assert rates("linear", [4, 14, 24]) == pytest.approx([1.0, 0.6, 0.2])
    assert rates("cosine", [4, 9, 14, 24]) == pytest.approx([1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2])
    assert rates("wsd", [4, 18, 19, 22, 24], decay_share=0.25) == pytest.approx([1.0, 1.0, 1.0, 0.52, 0.2])
    assert rates("step", [15, 16, 21, 22], step_at=(0.6, 0.9)) == pytest.approx([1.0, 0.316, 0.316, 0.316**2])


def test_wrong_optimiser_settings_are_errors_that_name_value_and_rule():
    for fields, words in (
        ({"lr": 0.0}, r"optim.lr = 0.0.*above 0"),
        ({"betas": (0.9, 1.0)}, r"optim.betas = \(0.9, 1.0\)"),
        ({"clip": -1.0}, r"optim.clip = -1.0"),
        ({"step_at": (0.9, 0.6)}, "rising"),
        ({"decay_share": 0.0}, r"decay_share = 0.0"),
        ({"weight_decay": math.inf}, "optim.weight_decay = inf: must be a finite number"),
        ({"eps": math.nan}, "optim.eps = nan: must be a finite number"),
        ({"betas": (math.nan, 0.9)}, r"optim.betas\[0\] = nan: must be a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            OptimConfig(**fields)


def test_without_a_number_the_warm_up_is_a_tenth_of_a_short_run_and_20_steps_of_a_longer_one():
    optim = OptimConfig(lr=1.0, schedule="constant")
    assert [optim.warmup(num) for num in (1, 9, 10, 60, 200, 100_000)] == [0, 0, 1, 6, 20, 20]
    assert learning_rate(optim, 0, 6) == 1.0  # six steps of fine-tuning are not spent on warming up
    assert [learning_rate(optim, step, 60) for step in (0, 5, 6)] == pytest.approx([1 / 6, 1.0, 1.0])
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=20), 0, 6) == 0.05
