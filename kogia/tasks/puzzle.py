"""Puzzles made by rule, each with its worked solution: what knights, strings and mazes have in common.

Train and test are divided by a hash of what a puzzle is, whatever its seed, so that none of one split is ever drawn for
the other, and a stream of training puzzles may go on for ever.
"""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from kogia.tasks.countdown import TEST_SHARE
from kogia.tasks.format import RewardOptions
from kogia.tasks.task import Problem, Response, Status, Verdict, check_split
from kogia.text.tokenizer import END_THINK

FRUITLESS = 1000
"""Draws in a row that give nothing new, after which there seem to be no more puzzles."""


@dataclass(frozen=True, kw_only=True)
class Puzzle(RewardOptions):
    """Options of every puzzle; `problems` is the same for the same options, whatever the machine."""

    name: ClassVar[str]
    levels: ClassVar[range]
    level: int = 3
    """How large a puzzle is; each kind says what of."""
    train_count: int = 4000
    test_count: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level not in self.levels:
            raise ValueError(f"level={self.level}: {self.name} has levels {self.levels[0]} to {self.levels[-1]}")
        for option in ("train_count", "test_count"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option}={getattr(self, option)}: must be at least 1")

    @abstractmethod
    def draw(self, rng: random.Random) -> Problem:
        """Any puzzle of this level. Its id says what it is."""

    @abstractmethod
    def work(self, problem: Problem) -> tuple[str, str]:
        """(the steps that lead to the answer, the answer)."""

    @abstractmethod
    def judge(self, problem: Problem, answer: str) -> tuple[Status, str]:
        """Whether an answer is "ok", "wrong" or "parse_fail", and why."""

    def problems(self, split: str) -> Sequence[Problem]:
        """The puzzles of "train" or "test", none twice. Raises ValueError when there are not as many as asked for."""
        check_split(split)
        return _problems(self, split)

    def draw_from(self, split: str, rng: random.Random) -> Problem:
        """A puzzle of one split."""
        while True:
            problem = self.draw(rng)
            if is_test(problem.id) == (split == "test"):
                return problem

    def trace(self, problem: Problem) -> str:
        """What a model is to write behind "<think>\\n"."""
        steps, answer = self.work(problem)
        return f"{steps}\n{END_THINK}\n{answer}"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        """Judges the answer by rule; how it was found does not matter."""
        parsed, answer = self.read(response)
        early = self.early_verdict(response, parsed.closed, answer)
        if early is not None:
            return early
        status, detail = self.judge(problem, answer)
        return self.verdict(response, status, answer, detail)


def is_test(id: str) -> bool:
    """Whether the puzzle of this id is held out: one in five is."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "big") % TEST_SHARE == 0


@cache
def _problems(task: Puzzle, split: str) -> tuple[Problem, ...]:
    rng = random.Random(f"{task.name} {task.level} {task.seed} {split}")
    count = task.train_count if split == "train" else task.test_count
    found: dict[str, Problem] = {}
    fruitless = 0
    while fruitless < FRUITLESS:
        if len(found) == count:
            return tuple(found.values())
        problem = task.draw_from(split, rng)
        fruitless = fruitless + 1 if problem.id in found else 0
        found.setdefault(problem.id, problem)
    raise ValueError(
        f"{split}_count={count}: found only {len(found)} different {split} puzzles of {task.name} with "
        f"level={task.level}; ask for fewer or raise the level"
    )
