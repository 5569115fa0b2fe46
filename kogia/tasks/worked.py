"""Problems of all kinds with their solutions, without end: text to pretrain on, and traces for a cold start.

Text has the form

    Question: compute 3+4*2
    3+4*2=3+8
    3+8=11
    Answer: 11

and no chat in it. Traces are the same steps in the form of a completion. Neither ever holds a problem of a test split.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache

from kogia.tasks.arithmetic import make_chain
from kogia.tasks.attempts import random_attempt
from kogia.tasks.countdown import is_held_out, make_problem
from kogia.tasks.knights import Knights
from kogia.tasks.mazes import Mazes
from kogia.tasks.puzzle import Puzzle
from kogia.tasks.strings import Strings
from kogia.tasks.task import Problem
from kogia.text.tokenizer import END_THINK

Worked = tuple[Problem, str, str]
"""A problem, the steps to its answer, the answer."""
Maker = Callable[[random.Random], Worked]

KINDS = ("countdown", "arithmetic", "knights", "strings", "mazes")
LEVELS: dict[str, tuple[int, ...]] = {
    "countdown": (3, 3, 3, 4),
    "arithmetic": (2, 3, 3, 4),
    "knights": (2, 3, 3, 3),
    "strings": (1, 2, 2, 3, 3, 4),
    "mazes": (3, 4, 4, 5),
}
"""Sizes that are drawn, each as often as it stands here: of countdown and arithmetic how many numbers there are."""
LARGEST = 25
MAX_TARGET = 100
MAX_WRONG = 4
"""Attempts before the right one."""


def worked_text(num: int, seed: int, *, problems: int = 8, kinds: str = ",".join(KINDS)) -> Iterator[str]:
    """Yields `num` documents of so many problems each; `kinds` are names with commas between."""
    rng = random.Random(f"worked text {seed}")
    chosen = _chosen(kinds)
    for _ in range(num):
        kind = rng.choice(chosen) if rng.random() < 0.5 else ""
        found = (draw_worked(kind or rng.choice(chosen), rng) for _ in range(problems))
        yield "\n".join(_as_text(*each) for each in found)


def worked_traces(num: int, seed: int, *, kinds: str = ",".join(KINDS)) -> Iterator[tuple[Problem, str]]:
    """Yields `num` (training problem, completion) pairs; the completion continues after "<think>\\n"."""
    rng = random.Random(f"worked traces {seed}")
    chosen = _chosen(kinds)
    for _ in range(num):
        problem, steps, answer = draw_worked(rng.choice(chosen), rng)
        yield problem, f"{steps}\n{END_THINK}\n{answer}"


def draw_worked(kind: str, rng: random.Random) -> Worked:
    """A training problem of one of KINDS and its solution."""
    level = rng.choice(LEVELS[kind])
    if kind == "countdown":
        return worked_countdown(level, rng)
    if kind == "arithmetic":
        return worked_arithmetic(level, rng)
    task = _puzzle(kind, level)
    problem = task.draw_from("train", rng)
    return problem, *task.work(problem)


def worked_countdown(numbers: int, rng: random.Random, operators: str = "+-*/") -> Worked:
    """A target that some attempt reaches, after up to MAX_WRONG others that do not."""
    while True:
        chosen = [rng.randint(1, LARGEST) for _ in range(numbers)]
        right = random_attempt(chosen, operators, 2 * MAX_TARGET, rng)
        if right is None or not 1 <= right.result.value <= MAX_TARGET or is_held_out(tuple(sorted(chosen))):
            continue
        target = right.result.value
        tried = (random_attempt(chosen, operators, 2 * MAX_TARGET, rng) for _ in range(rng.randint(0, MAX_WRONG)))
        wrong = {each.key: each for each in tried if each is not None and each.result.value != target}
        lines = [f"{each.steps}?{target} no" for each in wrong.values()] + [f"{right.steps}?{target} yes"]
        return make_problem(tuple(sorted(chosen)), target, rng), "\n".join(lines), right.result.text


def worked_arithmetic(length: int, rng: random.Random, operators: str = "+-*", largest: int = 20) -> Worked:
    """A chain, and what is left of it after each operation, products first."""
    while True:
        numbers = [rng.randint(1, largest) for _ in range(length)]
        if not is_held_out(tuple(sorted(numbers))):
            break
    symbols = [rng.choice(operators) for _ in numbers[1:]]
    problem = make_chain(numbers, symbols)
    left, lines = _joined(numbers, symbols), []
    while symbols:
        at = symbols.index("*") if "*" in symbols else 0
        a, b, symbol = numbers[at], numbers[at + 1], symbols.pop(at)
        numbers[at : at + 2] = [a * b if symbol == "*" else a + b if symbol == "+" else a - b]
        before, left = left, _joined(numbers, symbols)
        lines.append(f"{before}={left}")
    return problem, "\n".join(lines), left


def _joined(numbers: list[int], symbols: list[str]) -> str:
    return str(numbers[0]) + "".join(f"{symbol}{number}" for symbol, number in zip(symbols, numbers[1:], strict=True))


def _as_text(problem: Problem, steps: str, answer: str) -> str:
    return f"Question: {problem.messages[-1].content}\n{steps}\nAnswer: {answer}\n"


@cache
def _puzzle(kind: str, level: int) -> Puzzle:
    return {"knights": Knights, "strings": Strings, "mazes": Mazes}[kind](level=level)


def _chosen(kinds: str) -> list[str]:
    chosen = kinds.split(",")
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"kinds={kinds!r}: {unknown[0]!r} is none of {', '.join(KINDS)}")
    return chosen
