"""Intervals against tables, coverage by simulation, and the cluster bootstrap."""

import random
from math import comb, sqrt
from statistics import fmean, stdev

import pytest

from kogia.eval.intervals import Estimate, mcnemar, mean_interval, paired_difference, t_quantile

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 29: 2.045, 30: 2.042, 99: 1.984, 1000: 1.962}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_t_quantile_is_the_one_in_the_tables(freedom):
    assert t_quantile(freedom) == pytest.approx(TABLE[freedom], abs=6e-4)


def test_the_interval_is_the_t_interval_of_the_question_means_and_two_imagined_questions():
    scores = [0.25, 0.5, 0.125, 0.75, 1.0]
    widened = [*scores, 0.0, 1.0]
    reach = 2.4469 * stdev(widened) / sqrt(7)
    estimate = mean_interval(scores)
    assert estimate.mean == pytest.approx(0.525)
    assert estimate.low == pytest.approx(fmean(widened) - reach, abs=1e-4)
    assert estimate.high == pytest.approx(fmean(widened) + reach, abs=1e-4)


def test_the_interval_agrees_with_a_bootstrap_over_questions():
    draw = random.Random(2)
    scores = [draw.choice([0, 1, 2, 3, 5, 8]) / 8 for _ in range(200)]
    means = sorted(fmean(draw.choices(scores, k=200)) for _ in range(4000))
    estimate = mean_interval(scores)
    assert estimate.low == pytest.approx(means[100], abs=0.006)
    assert estimate.high == pytest.approx(means[3899], abs=0.006)


def coverage(draw, num_questions, num_samples, mean, spread, trials=400):
    """Share of intervals that hold the true mean; chances are Beta(mean, 1 - mean) times `spread` over questions."""
    covered = 0
    for _ in range(trials):
        chances = [draw.betavariate(mean * spread, (1 - mean) * spread) for _ in range(num_questions)]
        estimate = mean_interval([fmean(draw.random() < p for _ in range(num_samples)) for p in chances])
        covered += estimate.low <= mean <= estimate.high
    return covered / trials


@pytest.mark.parametrize("num_questions", [10, 20, 30])
@pytest.mark.parametrize("mean", [0.02, 0.1, 0.5, 0.95])
def test_the_interval_covers_the_truth_when_samples_of_a_question_agree(num_questions, mean):
    """Chances that differ wildly between questions, as of a model that can or cannot, and chances that hardly do.

    Student's interval alone covers in 81% of the worst of these cases; treating samples as independent is worse still.
    """
    draw = random.Random(f"{num_questions} {mean}")
    assert min(coverage(draw, num_questions, 8, mean, spread) for spread in (0.2, 1.0, 4.0, 50.0)) >= 0.93


@pytest.mark.parametrize("num_questions", [1, 2, 5, 10, 15, 20, 30, 100])
def test_single_samples_are_covered_at_every_chance(num_questions):
    """The exact coverage, summed over all outcomes; Wilson's interval, used elsewhere, falls to 0.84 here."""
    intervals = [mean_interval([1.0] * k + [0.0] * (num_questions - k)) for k in range(num_questions + 1)]
    for percent in range(1, 100):
        chance = percent / 100
        weights = [
            comb(num_questions, k) * chance**k * (1 - chance) ** (num_questions - k) for k in range(num_questions + 1)
        ]
        held = [interval.low <= chance <= interval.high for interval in intervals]
        assert sum(w for w, h in zip(weights, held, strict=True) if h) >= 0.93, percent


def test_one_right_sample_of_eighty_never_narrows_the_interval():
    for step in (1 / 8, 1 / 16, 1.0):
        none, one = mean_interval([0.0] * 10), mean_interval([step] + [0.0] * 9)
        assert none.low == one.low == 0.0
        assert 0.25 < none.high < one.high
        all_right, all_but_one = mean_interval([1.0] * 10), mean_interval([1.0 - step] + [1.0] * 9)
        assert all_right.high == all_but_one.high == 1.0
        assert all_but_one.low < all_right.low < 0.75


def test_no_success_and_no_failure_come_near_the_rule_of_three():
    none, all_right = mean_interval([0.0] * 100), mean_interval([1.0] * 100)
    assert (none.low, none.mean) == (0.0, 0.0)
    assert none.high == pytest.approx(0.03, abs=1e-3)
    assert (all_right.high, all_right.mean) == (1.0, 1.0)
    assert all_right.low == pytest.approx(0.97, abs=1e-3)


def test_one_question_or_equal_scores_never_give_a_point_interval():
    assert mean_interval([0.5]).high - mean_interval([0.5]).low > 0.8
    equal = mean_interval([0.5] * 10)
    assert equal.low < 0.4
    assert equal.high > 0.6


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
    assert paired.difference.high - paired.difference.low < 0.5 * (apart.high - apart.low)
    assert paired.is_significant


def test_a_paired_difference_matches_the_variance_identity():
    """Half a pair that gained everything and half a pair that lost everything add 1 + mean^2 to the squares."""
    draw = random.Random(5)
    a = {str(i): draw.random() for i in range(50)}
    b = {str(i): draw.random() for i in range(50)}
    paired = paired_difference(a, b)
    x, y = list(a.values()), list(b.values())
    var = [sum((v - fmean(z)) ** 2 for v in z) / 49 for z in (x, y)]
    assert paired.correlation is not None
    spread = var[0] + var[1] - 2 * paired.correlation * sqrt(var[0] * var[1])
    mean, centre = paired.difference.mean, paired.difference.mean * 50 / 51
    squares = 49 * spread + 50 * (mean - centre) ** 2 + 1 + centre**2
    assert paired.difference.high - centre == pytest.approx(t_quantile(50) * sqrt(squares / 50 / 51))
    assert paired.p_value is None


@pytest.mark.parametrize(
    ("gains", "losses", "p_value"),
    [
        (4, 0, 0.125),
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (9, 2, 0.0654),
        (10, 2, 0.0386),
        (3, 3, 1.0),
        (0, 0, 1.0),
    ],
)
@pytest.mark.parametrize("same", [0, 20, 300])
def test_single_answers_differ_significantly_where_the_exact_test_says_so(gains, losses, p_value, same):
    deltas = [1.0] * gains + [-1.0] * losses + [0.0] * same
    assert mcnemar(deltas) == pytest.approx(p_value, abs=1e-4)
    if deltas:
        before = {str(i): float(d < 0) for i, d in enumerate(deltas)}
        paired = paired_difference(before, {str(i): before[str(i)] + d for i, d in enumerate(deltas)})
        assert paired.p_value == pytest.approx(p_value, abs=1e-4)
        assert paired.is_significant == (p_value < 0.05)


@pytest.mark.parametrize("num_questions", [10, 20, 30])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_paired_difference_covers_the_truth(num_questions, share):
    """A share of the questions, easy or hard, moves halfway to certainty; eight samples before and after."""
    draw, covered, trials = random.Random(f"{num_questions} {share}"), 0, 400
    for trial in range(trials):
        mean = (0.02, 0.5, 0.9)[trial % 3]
        before = [draw.betavariate(0.5 * mean, 0.5 * (1 - mean)) for _ in range(num_questions)]
        after = [p + (1 - p) / 2 if draw.random() < share else p for p in before]
        scores = [
            {str(i): fmean(draw.random() < p for _ in range(8)) for i, p in enumerate(chances)}
            for chances in (before, after)
        ]
        difference = paired_difference(*scores).difference
        covered += difference.low <= share * (1 - mean) / 2 <= difference.high
    assert covered / trials >= 0.93


def test_models_that_do_not_differ_are_seldom_called_different():
    draw, called, trials = random.Random(6), 0, 500
    for _ in range(trials):
        chances = [draw.random() for _ in range(30)]
        one, two = ({str(i): float(draw.random() < p) for i, p in enumerate(chances)} for _ in range(2))
        called += paired_difference(one, two).is_significant
    assert called / trials <= 0.05


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
