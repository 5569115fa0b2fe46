"""Text made by rule: an arithmetic corpus to pretrain on, and countdown traces for the cold start. No chat form here.

A trace tries, judges and tries again, one line per attempt, and ends in a claim or an honest "give up":

    15*4=60,60+6=66?17 no
    15-4=11,11+6=17?17 yes
    </think>
    (15-4)+6

The check repeats the target beside the result, so that judging is a comparison of neighbours: a small model learns it
many times sooner than a comparison with the distant prompt.

Attempts are better than blind search by construction (the right one comes after a geometric number of wrong ones), so a
model trained on them solves few problems at the first sample and many within several: room for reinforcement. Some
verdicts are wrong, so that the model is not yet sure of its own checks either.
"""

import random
from collections.abc import Iterator, Sequence

from kogia.tasks.attempts import Attempt, operations, random_attempt, solutions
from kogia.tasks.countdown import Countdown, is_held_out, make_problem
from kogia.tasks.task import Problem

GIVE_UP = "</think>\ngive up"
_PLAIN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def cold_start_traces(
    num: int,
    seed: int,
    *,
    numbers: int = 3,
    max_number: int = 25,
    max_target: int = 100,
    operators: str = "+-*/",
    num_problems: int = 8000,
    max_attempts: int = 10,
    continue_probability: float = 0.7,
    solve_probability: float = 0.5,
    give_up_draws: int = 3,
    verdict_noise: float = 0.1,
    easy_share: float = 0.1,
    max_intermediate: int = 200,
) -> Iterator[tuple[Problem, str]]:
    """Yields `num` (training problem, completion) pairs; the completion continues after "<think>\\n".

    A solved trace has k wrong attempts first, P(k) ~ continue_probability^k, at most max_attempts in all. A
    given-up one has the largest of `give_up_draws` such k, at least one. In a share `verdict_noise` of the traces one
    verdict is false: a wrong attempt is claimed, or a right one is passed over. A share `easy_share` has two numbers.
    Steps keep to non-negative integers up to `max_intermediate`; a problem without such a solution is given up.
    """
    _check_share(solve_probability=solve_probability, verdict_noise=verdict_noise, easy_share=easy_share)
    if max_attempts < 2 or give_up_draws < 1 or not 0 <= continue_probability <= 1:
        raise ValueError(
            f"max_attempts={max_attempts} must be at least 2, give_up_draws={give_up_draws} at least 1, "
            f"continue_probability={continue_probability} from 0 to 1"
        )
    task = Countdown(
        numbers=numbers, max_number=max_number, max_target=max_target, operators=operators,
        train_count=num_problems, seed=seed,
    )  # fmt: skip
    rng = random.Random(f"cold start {seed}")
    weights = [continue_probability**k for k in range(max_attempts + 1)]
    order: list[Problem] = []
    for _ in range(num):
        if not order:
            order = rng.sample(task.problems("train"), num_problems)
        problem = _easy_problem(task, rng) if rng.random() < easy_share else order.pop()
        solve = rng.random() < solve_probability
        # A solved trace needs one attempt of its own; a given-up one should look long before it leaves.
        end, draws = (max_attempts, 1) if solve else (max_attempts + 1, give_up_draws)
        num_wrong = max(rng.choices(range(end), weights[:end], k=draws))
        search = _Search(problem, operators, max_intermediate, rng)
        yield problem, search.trace(num_wrong, solve, rng.random() < verdict_noise, max_attempts)


def arithmetic_corpus(
    num: int,
    seed: int,
    *,
    lines: int = 8,
    numbers: int = 3,
    max_number: int = 25,
    max_target: int = 100,
    operators: str = "+-*/",
    max_intermediate: int = 200,
) -> Iterator[str]:
    """Yields `num` documents of `lines` lines: checked chains of steps, single equations, number sentences.

    The forms are those inside a trace, one at a time and towards no goal, so that a base model knows the facts and has
    never seen a search, a chat or a chain over a held-out set of numbers.
    """
    rng = random.Random(f"arithmetic corpus {seed}")
    for _ in range(num):
        document = []
        for _ in range(lines):
            kind = rng.random()
            if kind < 0.65:
                document.append(_chain(rng, numbers, max_number, max_target, operators, max_intermediate))
            elif kind < 0.9:
                document.append(_equation(rng, max_number, operators, max_intermediate))
            else:
                document.append(_sentence(rng, max_number, operators, max_intermediate))
        yield "".join(document)


base_corpus = arithmetic_corpus


class _Search:
    """One problem's attempts: none repeats, and a wrong one really misses the target."""

    def __init__(self, problem: Problem, operators: str, max_intermediate: int, rng: random.Random) -> None:
        self.numbers: Sequence[int] = problem.data["numbers"]
        self.target: int = problem.data["target"]
        self.operators = operators
        self.limit = max(max_intermediate, self.target)
        self.rng = rng
        self.tried: set[str] = set()

    def trace(self, num_wrong: int, solve: bool, noise: bool, max_attempts: int) -> str:
        """The whole completion. `noise` makes exactly one verdict false where the problem allows it."""
        solution = self.right() if solve or noise else None
        solve = solve and solution is not None
        claim_wrong = noise and (solution is None or self.rng.random() < 0.5)
        least = 0 if solve and not claim_wrong else 1
        found = (self.wrong() for _ in range(max(num_wrong, least)))
        attempts = [attempt for attempt in found if attempt is not None]
        if claim_wrong and attempts:
            return self.claimed(attempts[: self.rng.randint(1, len(attempts))])
        if noise and solution is not None:
            attempts = attempts[: max_attempts - 1 - solve]
            attempts.insert(self.rng.randint(0, len(attempts)), solution)
            solution = self.right()  # another one, if there is
        if solve and solution is not None:
            return self.claimed([*attempts, solution])
        return self.rejected(attempts) + GIVE_UP

    def rejected(self, attempts: Sequence[Attempt]) -> str:
        """Attempts with their check: the result beside the target, and the verdict."""
        return "".join(f"{attempt.steps}?{self.target} no\n" for attempt in attempts)

    def claimed(self, attempts: Sequence[Attempt]) -> str:
        """All but the last attempt rejected, the last one claimed."""
        *rejected, last = attempts
        return f"{self.rejected(rejected)}{last.steps}?{self.target} yes\n</think>\n{last.result.text}"

    def wrong(self) -> Attempt | None:
        """A new random attempt that misses the target; None when none turns up."""
        for _ in range(20):
            attempt = random_attempt(self.numbers, self.operators, self.limit, self.rng)
            if attempt is not None and attempt.result.value != self.target and attempt.key not in self.tried:
                self.tried.add(attempt.key)
                return attempt
        return None

    def right(self) -> Attempt | None:
        """A new random attempt that reaches the target; None when the problem has no other."""
        for attempt in solutions(self.numbers, self.target, self.operators, self.limit, self.rng):
            if attempt.key not in self.tried:
                self.tried.add(attempt.key)
                return attempt
        return None


def _easy_problem(task: Countdown, rng: random.Random) -> Problem:
    """A training problem with two numbers that one operation on integers solves."""
    for _ in range(1000):
        chosen = tuple(sorted(rng.randint(1, task.max_number) for _ in range(2)))
        attempt = random_attempt(chosen, task.operators, task.max_target, rng)
        if attempt is not None and attempt.result.value > 0 and not is_held_out(chosen):
            return make_problem(chosen, attempt.result.value, rng)
    raise ValueError(f"easy_share: no problem with two numbers exists for {task}; set easy_share=0")


def _chain(rng: random.Random, numbers: int, max_number: int, max_target: int, operators: str, limit: int) -> str:
    """Steps and a check against some target: the result itself, a near miss or any number, in equal shares."""
    for _ in range(1000):
        chosen = [rng.randint(1, max_number) for _ in range(numbers)]
        if not is_held_out(tuple(sorted(chosen))):
            attempt = random_attempt(chosen, operators, limit, rng)
            if attempt is not None:
                target = _compared(attempt.result.value, max_target, rng)
                return f"{attempt.steps}?{target} {'yes' if attempt.result.value == target else 'no'}\n"
    raise ValueError(
        f"no chain of {numbers} numbers up to {max_number} stays within max_intermediate={limit}; raise it"
    )


def _operation(rng: random.Random, max_number: int, operators: str, limit: int) -> tuple[int, str, int, int]:
    """(a, operator, b, result): numbers, or one of them as large as an intermediate result may be."""
    for _ in range(1000):
        a, b = rng.randint(1, max_number), rng.randint(1, max_number)
        if rng.random() < 0.5:
            a = rng.randint(0, limit)
        if rng.random() < 0.5:
            a, b = b, a
        choices = operations(a, b, operators, limit)
        if choices:
            symbol, value, swapped = rng.choice(choices)
            return (b, symbol, a, value) if swapped else (a, symbol, b, value)
    raise ValueError(
        f"no operation of {operators!r} up to {max_number} stays within max_intermediate={limit}; raise it"
    )


def _equation(rng: random.Random, max_number: int, operators: str, limit: int) -> str:
    a, symbol, b, value = _operation(rng, max_number, operators, limit)
    return f"{a}{symbol}{b}={value}\n"


def _compared(result: int, max_target: int, rng: random.Random) -> int:
    kind = rng.random()
    if kind < 1 / 3:
        return result
    return max(1, result + rng.randint(-9, 9)) if kind < 2 / 3 else rng.randint(1, max_target)


def _sentence(rng: random.Random, max_number: int, operators: str, limit: int) -> str:
    a, symbol, b, value = _operation(rng, max_number, operators, limit)
    if rng.random() < 0.5:
        return f"{a} {_PLAIN[symbol]} {b} is {value}.\n"
    relation = "equal to" if a == b else "more than" if a > b else "less than"
    return f"{a} is {relation} {b}.\n"


def _check_share(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: must be a share, from 0 to 1")
