import math

import pytest

from kogia.train.config import OptimConfig
from kogia.train.schedule import Ramp, learning_rate


def rates(schedule: str, steps: list[int], **fields) -> list[float]:
    optim = OptimConfig(**{"lr": 1.0, "schedule": schedule, "warmup_steps": 4, "min_lr_ratio": 0.2, **fields})
    return [learning_rate(optim, step, 24) for step in steps]


def test_warm_up_is_linear_and_reaches_the_peak_on_its_last_step():
    assert rates("constant", [0, 1, 2, 3, 4, 23]) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimConfig(lr=3.0, warmup_steps=0, schedule="constant"), 0, 10) == 3.0


def test_each_schedule_has_the_values_worked_out_by_hand():
    # 20 steps follow the warm-up: step 4 is 0 % of them, 9 is 25 %, 14 is 50 %, 19 is 75 %, 24 would be 100 %
    assert rates("linear", [4, 14, 24]) == pytest.approx([1.0, 0.6, 0.2])
    assert rates("cosine", [4, 9, 14, 24]) == pytest.approx([1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2])
    assert rates("wsd", [4, 18, 19, 22, 24], decay_share=0.25) == pytest.approx([1.0, 1.0, 1.0, 0.52, 0.2])
    # v3: step 17 is 65 %, and the cosine goes from 67.57 % to 96.62 %; step 23 is 95 %, 94.4 % of the way
    assert rates("v3", [4, 17, 23], min_lr_ratio=0.1) == pytest.approx([1.0, 1.0, 0.1069], abs=1e-5)
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


def test_v3_has_the_rates_of_the_report_at_its_token_counts():
    optim = OptimConfig(lr=2.2e-4, schedule="v3", warmup_steps=0, min_lr_ratio=0.1)
    rates = {tokens: learning_rate(optim, tokens, 14_800) for tokens in (0, 9_999, 12_150, 14_301, 14_632, 14_634)}
    expected = [2.2e-4, 2.2e-4, (2.2e-4 + 2.2e-5) / 2, 2.2e-5, 2.2e-5, 7.3e-6]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-3)


def test_a_growing_batch_is_counted_by_hand():
    ramp = Ramp(last=5, first=1, steps=4)
    sizes = [1, 2, 3, 4, 5, 5, 5]
    assert [ramp.size(step) for step in range(7)] == sizes
    assert [ramp.before(step) for step in range(8)] == [sum(sizes[:step]) for step in range(8)]
    assert ramp.share(4, 6) == 10 / 20
    assert [ramp.steps_for(count) for count in (0.5, 1, 1.1, 10, 10.1, 15, 16)] == [1, 1, 2, 4, 5, 5, 6]
    assert [Ramp(last=3).steps_for(count) for count in (0.1, 3, 3.5, 9)] == [1, 1, 2, 3]


def test_shares_of_a_run_are_shares_of_its_tokens_while_the_batch_grows():
    optim = OptimConfig(lr=1.0, schedule="linear", warmup_steps=1, min_lr_ratio=0.0)
    ramp = Ramp(last=4, first=1, steps=3)  # sizes 1, 2, 3, 4, 4: after the warm-up 13 of which 0, 2, 5 and 9 are done
    assert [learning_rate(optim, step, 5, ramp) for step in range(1, 5)] == pytest.approx(
        [1 - done / 13 for done in (0, 2, 5, 9)]
    )
    assert [learning_rate(optim, step, 5, Ramp(last=7)) for step in range(5)] == pytest.approx(
        [learning_rate(optim, step, 5) for step in range(5)]
    )
