"""Arithmetic chains: "compute 3+4*2-5", with exact integer answers and the usual precedence."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from kogia.tasks.countdown import is_held_out
from kogia.tasks.expression import parse_expression
from kogia.tasks.format import RewardOptions
from kogia.tasks.task import Problem, Response, Verdict, check_split
from kogia.text.chat import Message

_INTEGER = re.compile(r"-?[0-9]{1,64}")  # 16 numbers of up to 1000 multiply to 49 digits


@dataclass(frozen=True, kw_only=True)
class Arithmetic(RewardOptions):
    """`length` numbers of 1..max_number. Train and test are divided by a hash of the sorted numbers."""

    name: ClassVar[str] = "arithmetic"
    length: int = 4
    max_number: int = 20
    operators: str = "+-*"
    train_count: int = 8000
    test_count: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.length <= 16:
            raise ValueError(f"length={self.length}: a chain has 2 to 16 numbers")
        if not 1 <= self.max_number <= 1000:
            raise ValueError(f"max_number={self.max_number}: must be 1 to 1000")
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"operators={self.operators!r}: must be a choice of + - * written together, like '+-'")

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "test". Raises ValueError when there are not as many as asked for."""
        check_split(split)
        count = self.train_count if split == "train" else self.test_count
        return _problems(split, self.length, self.max_number, self.operators, count, self.seed)

    def verify(self, problem: Problem, response: Response) -> Verdict:
        """Only an integer alone counts as an answer."""
        parsed, answer = self.read(response)
        early = self.early_verdict(response, parsed.closed, answer)
        if early is not None:
            return early
        if not _INTEGER.fullmatch(answer):
            return self.verdict(response, "parse_fail", answer, "not an integer")
        if int(answer) != problem.data["answer"]:
            return self.verdict(response, "wrong", answer, f"is not {problem.data['answer']}")
        return self.verdict(response, "ok", answer)


@cache
def _problems(split: str, length: int, max_number: int, operators: str, count: int, seed: int) -> tuple[Problem, ...]:
    rng = random.Random(f"arithmetic {seed} {split}")
    chains: dict[str, None] = {}
    for _ in range(1000 + 40 * count):
        if len(chains) == count:
            break
        numbers = [rng.randint(1, max_number) for _ in range(length)]
        if is_held_out(tuple(sorted(numbers))) == (split == "test"):
            chains[_chain(numbers, [rng.choice(operators) for _ in numbers[1:]])] = None
    if len(chains) < count:
        raise ValueError(
            f"{split}_count={count}: found only {len(chains)} different {split} chains with length={length}, "
            f"max_number={max_number}, operators={operators!r}; ask for fewer or raise one of these"
        )
    return tuple(_problem(chain) for chain in chains)


def make_chain(numbers: Sequence[int], operators: Sequence[str]) -> Problem:
    """The problem of a chain: its numbers, and the operators between them."""
    return _problem(_chain(numbers, operators))


def _chain(numbers: Sequence[int], operators: Sequence[str]) -> str:
    rest = (symbol + str(number) for symbol, number in zip(operators, numbers[1:], strict=True))
    return str(numbers[0]) + "".join(rest)


def _problem(chain: str) -> Problem:
    value = parse_expression(chain).value
    assert value is not None, chain
    return Problem(f"arithmetic/{chain}", (Message("user", f"compute {chain}"),), {"answer": int(value)})
