"""Attempts at a countdown problem, written as a model is to write them: "15-4=11,11+6=17".

Steps keep to non-negative integers up to a limit, so a small model can carry them out; every solvable problem whose
solution needs no fraction has such a form.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """A number or a combination of numbers, as a value and an expression."""

    value: int
    text: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """Steps that use every number once, such as "15-4=11,11+6=17", and the result as one term."""

    steps: str
    result: Term

    @property
    def key(self) -> str:
        """The same for every order of steps and of what they add or multiply."""
        return ",".join(sorted(map(_commuted, self.steps.split(","))))


def random_attempt(numbers: Sequence[int], operators: str, limit: int, rng: random.Random) -> Attempt | None:
    """Combines random pairs by random operations until one term is left; None when a pair allows no operation."""
    terms = [_leaf(number) for number in numbers]
    steps = []
    while len(terms) > 1:
        a = terms.pop(rng.randrange(len(terms)))
        b = terms.pop(rng.randrange(len(terms)))
        choices = operations(a.value, b.value, operators, limit)
        if not choices:
            return None
        symbol, value, swapped = choices[rng.randrange(len(choices))]
        combined, step = _combine(*((b, a) if swapped else (a, b)), symbol, value)
        steps.append(step)
        terms.append(combined)
    return Attempt(",".join(steps), terms[0])


def solutions(numbers: Sequence[int], target: int, operators: str, limit: int, rng: random.Random) -> Iterator[Attempt]:
    """All attempts that reach the target, in random order; commuted writings of one solution may both occur."""
    yield from _reach([_leaf(number) for number in numbers], target, operators, limit, rng, "")


def _reach(
    terms: Sequence[Term], target: int, operators: str, limit: int, rng: random.Random, steps: str
) -> Iterator[Attempt]:
    """`solutions` from terms partly combined by `steps`; depth first."""
    pairs = [(i, j) for i in range(len(terms)) for j in range(i)]
    rng.shuffle(pairs)
    for i, j in pairs:
        a, b = (terms[i], terms[j]) if rng.random() < 0.5 else (terms[j], terms[i])
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        choices = operations(a.value, b.value, operators, limit)
        rng.shuffle(choices)
        for symbol, value, swapped in choices:
            if not rest and value != target:
                continue
            combined, step = _combine(*((b, a) if swapped else (a, b)), symbol, value)
            if rest:
                yield from _reach([*rest, combined], target, operators, limit, rng, f"{steps}{step},")
            else:
                yield Attempt(steps + step, combined)


def operations(a: int, b: int, operators: str, limit: int) -> list[tuple[str, int, bool]]:
    """(operator, result, swapped) of each operation on a and b that stays a non-negative integer up to `limit`.

    One order per operator: a difference and a quotient are written the way round that is allowed.
    """
    choices = []
    if "+" in operators and a + b <= limit:
        choices.append(("+", a + b, False))
    if "-" in operators:
        choices.append(("-", abs(a - b), b > a))
    if "*" in operators and a * b <= limit:
        choices.append(("*", a * b, False))
    if "/" in operators:
        if b and a % b == 0:
            choices.append(("/", a // b, False))
        elif a and b % a == 0:
            choices.append(("/", b // a, True))
    return choices


def _leaf(number: int) -> Term:
    return Term(number, str(number))


def _combine(a: Term, b: Term, symbol: str, value: int) -> tuple[Term, str]:
    """The term "a symbol b", with brackets around whatever is itself a combination, and the step that says so."""
    left = a.text if a.text.isdigit() else f"({a.text})"
    right = b.text if b.text.isdigit() else f"({b.text})"
    return Term(value, f"{left}{symbol}{right}"), f"{a.value}{symbol}{b.value}={value}"


def _commuted(step: str) -> str:
    for symbol in "+*":
        if symbol in step:
            left, _, value = step.partition("=")
            return symbol.join(sorted(left.split(symbol))) + "=" + value
    return step
