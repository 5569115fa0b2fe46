"""95% intervals with the question as the unit: samples of one question are not independent evidence.

The mean over questions x_1..x_n of per-question scores has standard error s / sqrt(n), s the sample deviation (Miller
2024, "Adding error bars to evals"), and Student's t covers small n. But few questions with rare successes say little
of s: one right sample of 80 gave a narrower interval than none. So two questions are imagined besides, one that was
always wrong and one that was always right, as Agresti and Coull (1998) do for single trials and Agresti and Min (2005)
for pairs. With 10 to 30 questions the interval then covers the truth in 93% of cases or more, however the chances of
the questions are spread and wherever the mean lies; with hundreds of questions the two no longer show.

Whether two models differ where each answered once, right or wrong, is decided by McNemar's exact test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan, comb, cos, inf, pi, sin, sqrt
from statistics import fmean, stdev

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
    p_value: float | None = None
    """Of McNemar's exact test, two-sided; None where scores are not all 0 or 1."""

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
    low, high = _t_interval(scores, (0.0, 1.0), weight=1.0)
    mean = fmean(scores)
    return Estimate(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)))


def unbounded_interval(values: Sequence[float]) -> Estimate:
    """Mean of values that have no bounds, such as losses, with Student's interval. Raises on no value.

    Of a single value nothing is known but itself: the interval is infinite.
    """
    if not values:
        raise ValueError("no values: an interval needs at least one")
    mean = fmean(values)
    reach = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values)) if len(values) > 1 else inf
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> PairedDifference:
    """Compare two checkpoints by their per-question scores, keyed by problem id, on the ids they share.

    Pairing removes the spread of difficulty between questions: Var = Var(a) + Var(b) - 2 Cov(a, b).
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError("the two evaluations share no problem id: evaluate the same task, split and seed")
    a, b = [first[key] for key in shared], [second[key] for key in shared]
    deltas = [y - x for x, y in zip(a, b, strict=True)]
    low, high = _t_interval(deltas, (-1.0, 1.0), weight=0.5)
    p_value = mcnemar(deltas) if set(a) | set(b) <= {0.0, 1.0} else None
    if p_value is not None and p_value > 1.0 - CONFIDENCE:  # the interval must not claim what the exact test does not
        low, high = min(low, 0.0), max(high, 0.0)
    estimate = Estimate(fmean(deltas), max(-1.0, low), min(1.0, high))
    return PairedDifference(estimate, _correlation(a, b), len(deltas), p_value)


def mcnemar(deltas: Sequence[float]) -> float:
    """Exact two-sided p-value of gains (+1) and losses (-1) being equally likely; unchanged pairs say nothing."""
    gains, losses = sum(d > 0 for d in deltas), sum(d < 0 for d in deltas)
    changed = gains + losses
    tail = sum(comb(changed, i) for i in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**changed)


def _t_interval(values: Sequence[float], imagined: tuple[float, float], weight: float) -> tuple[float, float]:
    """Ends of Student's interval for the mean of the values and of the imagined ones, which count `weight` each."""
    count = len(values) + 2 * weight
    centre = (sum(values) + weight * sum(imagined)) / count
    squares = sum((x - centre) ** 2 for x in values) + weight * sum((x - centre) ** 2 for x in imagined)
    reach = t_quantile(round(count) - 1) * sqrt(squares / (count - 1) / count)
    return centre - reach, centre + reach


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


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 2 or min(a) == max(a) or min(b) == max(b):
        return None
    mean_a, mean_b = fmean(a), fmean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1)
    return covariance / (stdev(a) * stdev(b))
