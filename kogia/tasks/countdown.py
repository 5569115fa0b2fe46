"""Countdown: reach a target from given numbers, each used exactly once, with + - * /.

Problems are enumerated, not downloaded: a multiset of numbers from 1..max_number and a target in 1..max_target that is
reachable in exact rational arithmetic. Train and test are divided by a hash of the multiset, so that no reordering of
the same numbers stands on both sides.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations, combinations_with_replacement
from typing import ClassVar

from kogia.tasks.expression import parse_expression
from kogia.tasks.format import RewardOptions
from kogia.tasks.task import Problem, Response, Verdict, check_split
from kogia.text.chat import Message

TEST_SHARE = 5  # one multiset in five is held out

Rational = tuple[int, int]  # numerator, positive denominator, in lowest terms: several times faster than Fraction


@dataclass(frozen=True, kw_only=True)
class Countdown(RewardOptions):
    """The options of the task; `problems` is the same for the same options, whatever the machine."""

    name: ClassVar[str] = "countdown"
    numbers: int = 3
    max_number: int = 25
    max_target: int = 100
    operators: str = "+-*/"
    train_count: int = 8000
    test_count: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 4:
            raise ValueError(f"numbers={self.numbers}: countdown is played with 2, 3 or 4 numbers")
        for option in ("max_number", "max_target", "train_count", "test_count"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}: must be at least 1")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators={self.operators!r}: must be a choice of + - * / written together, like '+-*'")

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "test". Raises ValueError when there are not as many as asked for."""
        check_split(split)
        count = self.train_count if split == "train" else self.test_count
        sizes = (self.numbers, self.max_number, self.max_target)
        return _problems(split, *sizes, "".join(sorted(set(self.operators))), count, self.seed)

    def verify(self, problem: Problem, response: Response) -> Verdict:
        """A wrong or undefined value and wrongly used numbers are a false claim ("wrong")."""
        parsed, answer = self.read(response)
        early = self.early_verdict(response, parsed.closed, answer)
        if early is not None:
            return early
        try:
            expression = parse_expression(answer, self.operators)
        except ValueError as error:
            return self.verdict(response, "parse_fail", answer, str(error))
        target, numbers = problem.data["target"], problem.data["numbers"]
        if sorted(expression.numbers) != sorted(numbers):
            return self.verdict(response, "wrong", answer, f"uses {list(expression.numbers)}, not {numbers}")
        if expression.value != target:
            return self.verdict(response, "wrong", answer, f"is {expression.value}, not {target}")
        return self.verdict(response, "ok", answer)


@lru_cache(maxsize=1 << 16)
def is_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a sorted multiset of numbers belongs to the test split, in this and every other task over numbers."""
    assert tuple(sorted(numbers)) == numbers, f"{numbers} is not sorted"
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0


def is_reachable(numbers: tuple[int, ...], target: int, operators: str = "+-*/") -> bool:
    """Whether some expression over all of the sorted `numbers` has exactly the value `target`."""
    for left, right in _divisions(numbers):
        values, others = _values(left, operators), _values(right, operators)
        if any(not others.isdisjoint(_partners((target, 1), value, operators)) for value in values):
            return True
    return False


@cache
def _problems(
    split: str, numbers: int, max_number: int, max_target: int, operators: str, count: int, seed: int
) -> tuple[Problem, ...]:
    rng = random.Random(f"countdown {seed} {split}")
    multisets = [
        chosen
        for chosen in combinations_with_replacement(range(1, max_number + 1), numbers)
        if is_held_out(chosen) == (split == "test")
    ]
    rng.shuffle(multisets)
    # Every multiset gives one problem before any gives a second: as many different multisets as possible.
    remaining = {chosen: _reachable_targets(chosen, max_target, operators, rng) for chosen in multisets}
    problems: list[Problem] = []
    while remaining and len(problems) < count:
        for chosen in list(remaining)[: count - len(problems)]:
            target = next(remaining[chosen], None)
            if target is None:
                del remaining[chosen]
            else:
                problems.append(make_problem(chosen, target, rng))
    if len(problems) < count:
        raise ValueError(
            f"{split}_count={count}: only {len(problems)} {split} problems exist with numbers={numbers}, "
            f"max_number={max_number}, max_target={max_target}; ask for fewer or raise one of these"
        )
    rng.shuffle(problems)
    return tuple(problems)


def _reachable_targets(chosen: tuple[int, ...], max_target: int, operators: str, rng: random.Random) -> Iterator[int]:
    """Lazily, the targets of one multiset in random order."""
    for target in rng.sample(range(1, max_target + 1), max_target):
        if is_reachable(chosen, target, operators):
            yield target


def make_problem(chosen: tuple[int, ...], target: int, rng: random.Random) -> Problem:
    """The problem of a sorted multiset and a target; `rng` decides in which order the numbers are shown."""
    shown = rng.sample(chosen, len(chosen))
    return Problem(
        id=f"countdown/{'-'.join(map(str, chosen))}={target}",
        messages=(Message("user", f"numbers {' '.join(map(str, shown))} target {target}"),),
        data={"numbers": shown, "target": target},
    )


@cache
def _divisions(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All ways to divide a sorted multiset in two non-empty parts, the smaller or equal part first, no way twice."""
    found = {}
    for size in range(1, len(numbers) // 2 + 1):
        for picked in combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in picked)
            right = tuple(number for i, number in enumerate(numbers) if i not in picked)
            found[(left, right)] = None
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def _values(numbers: tuple[int, ...], operators: str) -> frozenset[Rational]:
    """All values of expressions that use every one of the numbers."""
    if len(numbers) == 1:
        return frozenset({(numbers[0], 1)})
    found = set()
    for left, right in _divisions(numbers):
        for a in _values(left, operators):
            for b in _values(right, operators):
                found.update(_results(a, b, operators))
    return frozenset(found)


def _results(a: Rational, b: Rational, operators: str) -> Iterator[Rational]:
    """a+b, a-b, b-a, a*b, a/b, b/a as far as the operators and zero allow."""
    (p, q), (r, s) = a, b
    if "+" in operators:
        yield _reduced(p * s + r * q, q * s)
    if "-" in operators:
        yield _reduced(p * s - r * q, q * s)
        yield _reduced(r * q - p * s, q * s)
    if "*" in operators:
        yield _reduced(p * r, q * s)
    if "/" in operators:
        if r:
            yield _reduced(p * s, q * r)
        if p:
            yield _reduced(q * r, p * s)


def _partners(target: Rational, a: Rational, operators: str) -> Iterator[Rational]:
    """Every b with which a, in one operation and either order, gives the target (which is not zero)."""
    (t, u), (p, q) = target, a
    if "+" in operators:
        yield _reduced(t * q - p * u, u * q)
    if "-" in operators:
        yield _reduced(p * u - t * q, u * q)
        yield _reduced(p * u + t * q, u * q)
    if p and "*" in operators:
        yield _reduced(t * q, u * p)
    if p and "/" in operators:
        yield _reduced(p * u, q * t)
        yield _reduced(t * p, u * q)


def _reduced(numerator: int, denominator: int) -> Rational:
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    divisor = math.gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor
