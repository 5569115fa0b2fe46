"""A task a random model sometimes solves: verdicts follow from a checksum of the text. Pool workers import it too."""

from dataclasses import replace
from zlib import crc32

from kogia.tasks.task import Problem, Response, Verdict
from kogia.text.chat import Message


class Checksum:
    """About half of the completions that stop by themselves are right."""

    name = "checksum"

    def __init__(self, count: int = 12, prefix: str = "say") -> None:
        self.count, self.prefix = count, prefix

    def problems(self, split: str) -> list[Problem]:
        return [
            Problem(f"{split}/{i}", (Message("user", f"{self.prefix} {i}"),), {"number": i}) for i in range(self.count)
        ]

    def verify(self, problem: Problem, response: Response) -> Verdict:
        if response.truncated:
            return Verdict(-0.3, False, "truncated", {"accuracy": 0.0}, None)
        correct = crc32(response.text.encode()) % 2 == problem.data["number"] % 2
        extracted = str(crc32(response.text.encode()) % 5)
        return Verdict(float(correct), correct, "ok" if correct else "wrong", {"accuracy": float(correct)}, extracted)


class Repeats:
    """Breaks the rule that ids differ."""

    name = "repeats"

    def problems(self, split: str) -> list[Problem]:
        return [Problem("same", (Message("user", "x"),))] * 2

    def verify(self, problem: Problem, response: Response) -> Verdict:
        raise AssertionError("never asked")


class Empty(Repeats):
    name = "empty"

    def problems(self, split: str) -> list[Problem]:
        return []


class Brief(Checksum):
    """Rewards short answers: what a model that can only move its end token learns within a few steps."""

    name = "brief"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        correct = response.num_tokens <= 3
        return Verdict(float(correct), correct, "ok" if correct else "wrong", {"accuracy": float(correct)}, None)


class Wordy(Checksum):
    """Every fourth prompt is longer than any tiny model's context."""

    name = "wordy"

    def problems(self, split: str) -> list[Problem]:
        long = (Message("user", "say " * 1000),)
        return [replace(p, messages=long) if i % 4 == 3 else p for i, p in enumerate(super().problems(split))]


class Hopeless(Checksum):
    """Never solved."""

    name = "hopeless"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        return Verdict(-0.3, False, "wrong", {"accuracy": 0.0}, None)


class Fragile(Checksum):
    """Its check breaks on what a model can choose to write: every third number of tokens."""

    name = "fragile"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        if response.num_tokens % 3 == 0:
            raise RecursionError("the check broke")
        return super().verify(problem, response)


class Broken(Checksum):
    """A verifier with a mistake in it."""

    name = "broken"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        raise KeyError("no_such_key")


class Surrogate(Checksum):
    """Finds what no file can hold."""

    name = "surrogate"

    def verify(self, problem: Problem, response: Response) -> Verdict:
        return Verdict(1.0, True, "ok", {"accuracy": 1.0, "\udc80": 0.0}, "\ud800", "x\udfff")
