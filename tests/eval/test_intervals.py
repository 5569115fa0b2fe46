"""Intervals against tables, coverage by simulation, and the cluster bootstrap."""

import random
from math import sqrt
from statistics import fmean

import pytest

from kogia.eval.intervals import Estimate, mean_interval, paired_difference, t_quantile, wilson_interval

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042, 99: 1.984, 1000: 1.962}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_t_quantile_is_the_one_in_the_tables(freedom):
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=6e-4)


def test_the_interval_is_the_t_interval_of_the_question_means():
    scores = [0.25, 0.5, 0.125, 0.75, 1.0]
    mean = 0.525
    deviation = sqrt(sum((s - mean) ** 2 for s in scores) / 4)
    estimate = mean_interval(scores)
    assert estimate.mean == pytest.approx(mean)
    assert estimate.low == pytest.approx(mean - 2.7764 * deviation / sqrt(5), abs=1e-4)
    assert estimate.high == pytest.approx(min(1.0, mean + 2.7764 * deviation / sqrt(5)), abs=1e-4)


def test_the_interval_agrees_with_a_bootstrap_over_questions():
    draw = random.Random(2)
    scores = [draw.choice([0, 1, 2, 3, 5, 8]) / 8 for _ in range(200)]
    means = sorted(fmean(draw.choices(scores, k=200)) for _ in range(4000))
    estimate = mean_interval(scores)
    assert estimate.low == pytest.approx(means[100], abs=0.006)
    assert estimate.high == pytest.approx(means[3899], abs=0.006)


def test_the_interval_covers_the_truth_when_samples_of_a_question_agree():
    """Treating 20 x 8 correlated samples as 160 independent ones would cover far less often."""
    draw, covered = random.Random(3), 0
    for _ in range(1000):
        chances = [draw.betavariate(0.5, 0.5) for _ in range(20)]
        estimate = mean_interval([fmean(draw.random() < p for _ in range(8)) for p in chances])
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_single_sample_scores_take_the_wilson_interval():
    estimate = mean_interval([1.0] * 15 + [0.0] * 5)
    # Newcombe 1998, method 3, worked by hand for 15 of 20
    assert estimate.low == pytest.approx(0.5313, abs=1e-4)
    assert estimate.high == pytest.approx(0.8881, abs=1e-4)
    assert wilson_interval(0.75, 20) == estimate


def test_no_success_and_no_failure_take_the_rule_of_three():
    none, all_right = mean_interval([0.0] * 100), mean_interval([1.0] * 100)
    assert (none.low, none.mean) == (0.0, 0.0)
    assert none.high == pytest.approx(0.03, abs=5e-4)
    assert (all_right.high, all_right.mean) == (1.0, 1.0)
    assert all_right.low == pytest.approx(0.97, abs=5e-4)
    assert (1 - none.high) ** 100 == pytest.approx(0.05)


def test_one_question_or_equal_scores_never_give_a_point_interval():
    assert mean_interval([0.5]).high - mean_interval([0.5]).low > 0.8
    equal = mean_interval([0.5] * 10)
    assert equal.low < 0.3
    assert equal.high > 0.7


def test_bounds_and_bad_scores():
    estimate = mean_interval([0.9, 1.0, 1.0, 0.7])
    assert estimate.high == 1.0
    assert 0.0 <= estimate.low < estimate.mean
    with pytest.raises(ValueError, match="no questions"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        mean_interval([0.2, 1.5])


def test_a_paired_difference_is_narrower_than_two_intervals_when_scores_correlate():
    draw = random.Random(4)
    before = {f"q{i}": draw.random() * 0.8 for i in range(100)}
    after = {key: min(1.0, value + 0.1 + draw.gauss(0, 0.05)) for key, value in before.items()}
    paired = paired_difference(before, after)
    apart = mean_interval(list(after.values()))
    assert paired.difference.mean == pytest.approx(fmean(after.values()) - fmean(before.values()))
    assert paired.num_questions == 100
    assert paired.correlation is not None
    assert paired.correlation > 0.9
    assert paired.difference.high - paired.difference.low < 0.4 * (apart.high - apart.low)
    assert paired.is_significant


def test_a_paired_difference_matches_the_variance_identity():
    draw = random.Random(5)
    a = {str(i): draw.random() for i in range(50)}
    b = {str(i): draw.random() for i in range(50)}
    paired = paired_difference(a, b)
    x, y = list(a.values()), list(b.values())
    var = [sum((v - fmean(z)) ** 2 for v in z) / 49 for z in (x, y)]
    assert paired.correlation is not None
    spread = sqrt((var[0] + var[1] - 2 * paired.correlation * sqrt(var[0] * var[1])) / 50)
    assert paired.difference.high - paired.difference.mean == pytest.approx(t_quantile(49) * spread)


def test_a_paired_difference_uses_only_shared_questions():
    paired = paired_difference({"a": 0.0, "b": 0.5, "x": 1.0}, {"b": 0.5, "a": 1.0, "y": 0.0})
    assert paired.num_questions == 2
    assert paired.difference.mean == pytest.approx(0.5)
    with pytest.raises(ValueError, match="share no problem id"):
        paired_difference({"a": 0.0}, {"b": 0.0})


def test_identical_checkpoints_do_not_differ_significantly():
    same = {str(i): float(i % 2) for i in range(30)}
    paired = paired_difference(same, same)
    assert paired.difference.mean == 0.0
    assert paired.difference.low < 0.0 < paired.difference.high
    assert not paired.is_significant


def test_estimates_overlap_like_closed_intervals():
    assert Estimate(0.2, 0.1, 0.3).overlaps(Estimate(0.35, 0.3, 0.4))
    assert not Estimate(0.2, 0.1, 0.3).overlaps(Estimate(0.4, 0.31, 0.5))
