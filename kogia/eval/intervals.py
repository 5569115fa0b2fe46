"""95% intervals with the question as the unit: samples of one question are not independent evidence.

The mean over questions x_1..x_n of per-question scores has standard error s / sqrt(n), s the sample deviation (Miller
2024, "Adding error bars to evals"); Student's t covers small n. Scores that are all 0 or 1 take the Wilson interval,
and no failure or no success at all takes the exact one-sided bound 1 - 0.05^(1/n), the "rule of three" 3/n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan, cos, pi, sin, sqrt
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and the ends of its interval."""

    mean: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        return [self.mean, self.low, self.high]

    def overlaps(self, other: "Estimate") -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class PairedDifference:
    """Second minus first, over the questions both answered."""

    difference: Estimate
    correlation: float | None
    """Pearson correlation of the two per-question scores; None when one of them is constant."""
    num_questions: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.difference.low > 0.0 or self.difference.high < 0.0


def mean_interval(scores: Sequence[float]) -> Estimate:
    """Mean of per-question scores in [0, 1] with its interval, bounded to [0, 1]. Raises on no question."""
    if not scores:
        raise ValueError("no questions: an interval needs at least one per-question score")
    if min(scores) < 0.0 or max(scores) > 1.0:
        raise ValueError(f"scores span {min(scores)}..{max(scores)}: per-question scores must lie in [0, 1]")
    mean, count = fmean(scores), len(scores)
    if mean in (0.0, 1.0):
        reach = _rule_of_three(count)
        return Estimate(mean, max(0.0, mean - reach), min(1.0, mean + reach))
    if min(scores) == max(scores) or all(s in (0.0, 1.0) for s in scores):
        # Equal fractions have no spread to measure; n Bernoulli draws are the widest distribution with that mean.
        return wilson_interval(mean, count)
    reach = t_quantile(count - 1) * stdev(scores) / sqrt(count)
    return Estimate(mean, max(0.0, mean - reach), min(1.0, mean + reach))


def wilson_interval(share: float, count: int) -> Estimate:
    """Wilson score interval of a share of successes among `count` independent trials."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    shrink = 1.0 + z * z / count
    centre = (share + z * z / (2 * count)) / shrink
    reach = z / shrink * sqrt(share * (1.0 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, centre - reach), min(1.0, centre + reach))


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> PairedDifference:
    """Compare two checkpoints by their per-question scores, keyed by problem id, on the ids they share.

    Pairing removes the spread of difficulty between questions: Var = Var(a) + Var(b) - 2 Cov(a, b).
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("the two evaluations share no problem id: evaluate the same task, split and seed")
    a, b = [first[key] for key in shared], [second[key] for key in shared]
    deltas = [y - x for x, y in zip(a, b, strict=True)]
    mean, count = fmean(deltas), len(deltas)
    if min(deltas) == max(deltas):
        reach = _rule_of_three(count)
    else:
        reach = t_quantile(count - 1) * stdev(deltas) / sqrt(count)
    estimate = Estimate(mean, max(-1.0, mean - reach), min(1.0, mean + reach))
    return PairedDifference(estimate, _correlation(a, b), count)


@lru_cache(maxsize=1024)
def t_quantile(freedom: int) -> float:
    """Two-sided 95% quantile of Student's t with `freedom` >= 1 degrees, by bisection of its exact distribution."""
    assert freedom >= 1, freedom
    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, freedom: int) -> float:
    """P(|T| <= t): the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    power = cos(angle) if odd else 1.0
    total = power if freedom > 1 else 0.0
    for step in range(2 + odd, freedom, 2):
        power *= cos(angle) ** 2 * (step - 1) / step
        total += power
    total *= sin(angle)
    return (angle + total) * 2 / pi if odd else total


def _rule_of_three(count: int) -> float:
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / count)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 2 or min(a) == max(a) or min(b) == max(b):
        return None
    mean_a, mean_b = fmean(a), fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1)
    return covariance / (stdev(a) * stdev(b))
