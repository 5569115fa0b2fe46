"""The evaluation that another one is compared with, held against it before anything is sampled. Torch-free."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kogia.eval.config import EvalConfig
from kogia.eval.summary import GREEDY, read_samples, read_summary
from kogia.tasks.task import Problem

FILTERS = ("temperature", "top_k", "top_p", "min_p")
"""Settings that sampled answers depend on and greedy ones do not."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """What NAME.json and NAME.jsonl of an evaluation hold."""

    path: Path
    summary: dict[str, Any]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, named: str) -> "Earlier":
        """`path` is NAME.json, or NAME.jsonl beside it; `named` is what the user wrote."""
        name = path.name.removesuffix(".jsonl").removesuffix(".json")
        path, samples = path.with_name(f"{name}.json"), path.with_name(f"{name}.jsonl")
        for file in (path, samples):
            if not file.is_file():
                raise ValueError(f"compare = {named!r}: {file} is missing; name the NAME.json of an evaluation")
        return cls(path, read_summary(path), read_samples(samples))

    @property
    def checkpoint(self) -> str:
        """What it measured; empty where it does not say."""
        return str(self.summary.get("checkpoint") or "")

    def check(self, config: EvalConfig, problems: Sequence[Problem]) -> None:
        """Raise ValueError unless answers to `problems`, drawn as `config` says, can be compared with these."""
        if differing := list(self._differing(config)):
            before = ", ".join(f"{name} = {old!r}" for name, old, _ in differing)
            now = ", ".join(f"{name} = {new!r}" for name, _, new in differing)
            raise ValueError(
                f"compare = {str(self.path)!r}: it was made with {before}, this one would be with {now}; a difference "
                "would not be the models'; take equal settings"
            )
        self._check_questions(problems)

    def _differing(self, config: EvalConfig) -> Iterator[tuple[str, Any, Any]]:
        """(name, here, there) of the settings that both kinds of answers, or the ones compared, depend on."""
        sampled, greedy = self._kinds()
        if not (sampled and config.num_samples) and not (greedy and config.greedy):
            raise ValueError(
                f"compare = {str(self.path)!r}: one evaluation holds sampled answers only, the other greedy ones only: "
                f"nothing to compare; set {'greedy' if greedy else 'num_samples'}"
            )
        sampling = self.summary.get("sampling")
        here = {"split": self.summary.get("split"), **(sampling if isinstance(sampling, dict) else {})}
        for name in ("split", "max_tokens", "thinking", *(FILTERS if sampled and config.num_samples else ())):
            if here.get(name) != getattr(config, name):
                yield name, here.get(name), getattr(config, name)

    def _kinds(self) -> tuple[bool, bool]:
        """Whether it has sampled answers, and greedy ones."""
        return any(r["sample"] != GREEDY for r in self.samples), any(r["sample"] == GREEDY for r in self.samples)

    def _check_questions(self, problems: Sequence[Problem]) -> None:
        prompts = {row["problem_id"]: row["prompt"] for row in self.samples}
        shared = [problem for problem in problems if problem.id in prompts]
        if not shared:
            raise ValueError(
                f"compare = {str(self.path)!r}: shares no question with this evaluation; take the same task, "
                "question_seed and task options"
            )
        for problem in shared:
            if prompts[problem.id] != prompt_text(problem):
                raise ValueError(
                    f"compare = {str(self.path)!r}: question {problem.id!r} reads differently in the two evaluations: "
                    "use the same task options"
                )


def prompt_text(problem: Problem) -> str:
    """A question as the rows of an evaluation hold it."""
    return "\n".join(message.content for message in problem.messages)
