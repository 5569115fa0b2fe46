"""Knights, who say only what is true, and knaves, who say only what is false: who is what?

Everybody makes one claim about one or two of them. Puzzles have exactly one solution, which is found by trying: a case
is given up at the first claim that does not fit, and the last case that is left is the answer.

    Ann knight, Bob knight: Ann's claim is true, fits; Bob's claim is false, does not fit.
    Ann knight, Bob knave: Ann's claim is true, fits; Bob's claim is false, fits.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from kogia.tasks.puzzle import Puzzle
from kogia.tasks.task import Problem, Status
from kogia.text.chat import Message

NAMES = "Ann Bob Cid Dan Eve Fay Gus Hal Ida Jon Kim Leo Mia Ned Pam Ray Sue Tom Uma Zoe".split()
KINDS = ("knave", "knight")
_ROLE = re.compile(r"\b([A-Z][a-z]+)\b[^a-zA-Z]*(?:is a |is )?(knight|knave)\b")

Claim = tuple[str, int, int]
"""(form, whom, whom else): a key of FORMS and two people by number; of forms about one person they are the same."""
Case = Sequence[bool]
"""Whether each person is a knight."""

FORMS = {
    "knight": "{a} is a knight",
    "knave": "{a} is a knave",
    "knights": "{a} and {b} are both knights",
    "knaves": "{a} and {b} are both knaves",
    "same": "{a} and {b} are of the same kind",
    "different": "{a} and {b} are of different kinds",
    "any": "at least one of {a} and {b} is a knave",
    "if": "if {a} is a knight, then {b} is a knight",
}
_SINGLE = ("knight", "knave")
_PAIRS = tuple(form for form in FORMS if form not in _SINGLE)


@dataclass(frozen=True, kw_only=True)
class Knights(Puzzle):
    """`level`: how many people there are. An answer says of each what they are: "Ann knight, Bob knave"."""

    name: ClassVar[str] = "knights"
    levels: ClassVar[range] = range(2, 6)

    def draw(self, rng: random.Random) -> Problem:
        while True:
            claims = [_claim(speaker, self.level, rng) for speaker in range(self.level)]
            if len(solutions(claims)) == 1:
                return make_problem(claims, rng.sample(NAMES, self.level))

    def work(self, problem: Problem) -> tuple[str, str]:
        names, claims = problem.data["names"], read_claims(problem)
        (solution,) = solutions(claims)
        lines = []
        for case in cases(len(claims)):
            lines.append(f"{_describe(names, case)}: {_tried(names, claims, case)}.")
            if case == solution:
                break
        return "\n".join(lines), _describe(names, solution)

    def judge(self, problem: Problem, answer: str) -> tuple[Status, str]:
        """Everybody has to be named once. The order is free."""
        names = problem.data["names"]
        said = _ROLE.findall(answer)
        if sorted(name for name, _ in said) != sorted(names):
            return "parse_fail", f"does not say of each of {', '.join(names)} once what they are"
        case = tuple(dict(said)[name] == "knight" for name in names)
        if not fits(read_claims(problem), case):
            return "wrong", "does not fit the claims"
        return "ok", ""


def cases(people: int) -> list[tuple[bool, ...]]:
    """Everybody a knight first, everybody a knave last."""
    return list(product((True, False), repeat=people))


def solutions(claims: Sequence[Claim]) -> list[tuple[bool, ...]]:
    return [case for case in cases(len(claims)) if fits(claims, case)]


def fits(claims: Sequence[Claim], case: Case) -> bool:
    """Whether the claims of knights are true, and those of knaves false."""
    return all(is_true(claim, case) == case[speaker] for speaker, claim in enumerate(claims))


def is_true(claim: Claim, case: Case) -> bool:
    form, first, second = claim
    a, b = case[first], case[second]
    match form:
        case "knight":
            return a
        case "knave":
            return not a
        case "knights":
            return a and b
        case "knaves":
            return not (a or b)
        case "same":
            return a == b
        case "different":
            return a != b
        case "any":
            return not (a and b)
        case "if":
            return b or not a
    raise ValueError(f"claim {form!r}: must be one of {', '.join(FORMS)}")


def make_problem(claims: Sequence[Claim], names: Sequence[str]) -> Problem:
    """The id leaves out the names, so that one puzzle under other names is the same one."""
    told = [f"{name}: {_in_words(claim, names)}." for name, claim in zip(names, claims, strict=True)]
    people = f"{', '.join(names[:-1])} and {names[-1]}"
    text = f"Knights tell the truth, knaves lie. What are {people}?\n" + "\n".join(told)
    key = ";".join(f"{form} {first} {second}" for form, first, second in claims)
    data = {"names": list(names), "claims": [list(claim) for claim in claims]}
    return Problem(f"knights/{key}", (Message("user", text),), data)


def read_claims(problem: Problem) -> list[Claim]:
    """What everybody claims, from the lists that JSON makes of it."""
    return [(form, first, second) for form, first, second in problem.data["claims"]]


def _claim(speaker: int, people: int, rng: random.Random) -> Claim:
    if rng.random() < 0.3:
        other = rng.choice([person for person in range(people) if person != speaker])
        return rng.choice(_SINGLE), other, other
    form = rng.choice(_PAIRS)
    first, second = rng.sample(range(people), 2)
    if form != "if":
        first, second = sorted((first, second))
    return form, first, second


def _in_words(claim: Claim, names: Sequence[str]) -> str:
    form, first, second = claim
    return FORMS[form].format(a=names[first], b=names[second])


def _describe(names: Sequence[str], case: Case) -> str:
    return ", ".join(f"{name} {KINDS[is_knight]}" for name, is_knight in zip(names, case, strict=True))


def _tried(names: Sequence[str], claims: Sequence[Claim], case: Case) -> str:
    """The claims in order, up to the first that does not fit."""
    found = []
    for speaker, claim in enumerate(claims):
        truth = is_true(claim, case)
        fitting = truth == case[speaker]
        found.append(f"{names[speaker]} says {'true' if truth else 'false'}, {'fits' if fitting else 'no'}")
        if not fitting:
            break
    return "; ".join(found)
