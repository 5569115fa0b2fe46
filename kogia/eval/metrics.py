"""Scores of one question from n sampled answers: pass@k and maj@k, both unbiased over the samples at hand.

With n samples of which c are right, the chance that k of them, drawn without replacement, hold a right one is

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)        (Chen et al. 2021, eq 1)

and pass@1 is the mean c / n (DeepSeek-R1 section 3). maj@k is the chance that the plurality answer of k of them is
right (cons@k of the R1 paper when k = n). Intervals over questions are in `kogia.eval.intervals`.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb, prod


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that k of the samples hold a right one. Needs k <= num_samples: never extrapolates."""
    _check_k(num_samples, k)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct = {num_correct}: must lie in 0..num_samples = {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer among k of the samples, drawn without replacement, is right.

    Answers vote by exact equality of the string the task extracted. A sample without an answer (None) is drawn but does
    not vote; draws where nobody votes count as wrong; ties are broken evenly. When samples with one and the same
    answer were judged differently, a win of that answer counts with its share of right samples.
    """
    assert len(answers) == len(correct), f"{len(answers)} answers, {len(correct)} judgements"
    _check_k(len(answers), k)
    votes = Counter(a for a in answers if a is not None)
    silent = len(answers) - votes.total()
    score = 0.0
    for answer in votes:
        right = sum(c for a, c in zip(answers, correct, strict=True) if a == answer) / votes[answer]
        if right > 0.0:
            others = [count for a, count in votes.items() if a != answer]
            score += right * sum(
                comb(votes[answer], wins) * _ways_to_lose(others, silent, k - wins, wins)
                for wins in range(1, min(votes[answer], k) + 1)
            )
    return score / comb(len(answers), k)


def _ways_to_lose(counts: list[int], silent: int, draws: int, limit: int) -> float:
    """Ways to draw `draws` samples of answers seen `counts` times so that none is drawn more than `limit` times.

    A way in which m answers tie at the limit weighs 1 / (1 + m). Dynamic programme over (drawn so far, ties).
    """
    states: dict[tuple[int, int], int] = {(0, 0): 1}
    left = sum(counts) + silent
    for count in counts:
        left -= count
        grown: Counter[tuple[int, int]] = Counter()
        for (drawn, ties), ways in states.items():
            # what stays to be drawn must fit into the answers that are left
            least = max(0, draws - drawn - left)
            for take in range(least, min(count, limit, draws - drawn) + 1):
                tie = 1 if take == limit else 0
                grown[drawn + take, ties + tie] += ways * comb(count, take)
        states = grown
    return sum(ways * comb(silent, draws - drawn) / (1 + ties) for (drawn, ties), ways in states.items())


def _check_k(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} with {num_samples} samples per question: needs 1 <= k <= samples; draw more samples")
