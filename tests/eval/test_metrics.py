"""pass@k and maj@k against the enumeration of every subset, and against simulation."""

import random
from collections import Counter
from itertools import combinations
from math import comb
from statistics import fmean

import pytest

from kogia.eval.metrics import majority_at_k, pass_at_k


def enumerated_majority(answers, correct, k):
    """maj@k by looking at every subset of k samples; ties are shared evenly."""
    scores = []
    for subset in combinations(range(len(answers)), k):
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        top = max(votes.values(), default=0)
        winners = [a for a, c in votes.items() if c == top]
        rights = [fmean(correct[i] for i in range(len(answers)) if answers[i] == w) for w in winners]
        scores.append(fmean(rights) if rights else 0.0)
    return fmean(scores)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample():
    for n in range(1, 8):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                share = fmean(any(s) for s in combinations(samples, k))
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_one_is_the_mean_and_many_samples_do_not_overflow():
    assert pass_at_k(64, 13, 1) == pytest.approx(13 / 64)
    assert pass_at_k(5000, 700, 64) == pytest.approx(1 - comb(4300, 64) / comb(5000, 64), rel=1e-9)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not():
    draw, p, k, n = random.Random(0), 0.2, 4, 8
    counts = [sum(draw.random() < p for _ in range(n)) for _ in range(20000)]
    truth = 1 - (1 - p) ** k
    assert fmean(pass_at_k(n, c, k) for c in counts) == pytest.approx(truth, abs=0.008)
    assert fmean(1 - (1 - c / n) ** k for c in counts) < truth - 0.03


@pytest.mark.parametrize("k", [0, 9])
def test_a_k_beyond_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} with 8 samples"):
        pass_at_k(8, 3, k)
    with pytest.raises(ValueError, match=f"k = {k} with 8 samples"):
        majority_at_k(["1"] * 8, [True] * 8, k)


def test_majority_is_the_mean_over_every_subset():
    draw = random.Random(1)
    for _ in range(150):
        n = draw.randint(1, 7)
        answers = [draw.choice(["a", "b", "c", "d", None]) for _ in range(n)]
        correct = [a == "a" or (a == "b" and draw.random() < 0.5) for a in answers]
        for k in range(1, n + 1):
            assert majority_at_k(answers, correct, k) == pytest.approx(enumerated_majority(answers, correct, k))


def test_majority_of_all_samples_is_one_vote_with_shared_ties():
    assert majority_at_k(["7", "7", "8", None], [True, True, False, False], 4) == 1.0
    assert majority_at_k(["7", "8", "9", None], [True, False, False, False], 4) == pytest.approx(1 / 3)
    assert majority_at_k([None, None], [False, False], 2) == 0.0


def test_majority_of_one_is_pass_at_one():
    answers, correct = ["a", "b", "a", None, "c"], [True, False, True, False, False]
    assert majority_at_k(answers, correct, 1) == pytest.approx(pass_at_k(5, 2, 1))


def test_majority_over_many_distinct_answers_is_quick():
    answers = ["right"] * 16 + [str(i) for i in range(48)]
    assert majority_at_k(answers, [a == "right" for a in answers], 64) == 1.0
