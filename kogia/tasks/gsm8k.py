"""GSM8K: grade-school word problems, read from files the user has (nothing is downloaded)."""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from kogia.tasks.answers import answers_match, extract_answer
from kogia.tasks.format import RewardOptions
from kogia.tasks.task import Problem, Response, Verdict, check_split
from kogia.text.chat import Message

_THOUSANDS = re.compile(r"-?\$?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")

GET_DATA = (
    "download train.jsonl and test.jsonl from https://github.com/openai/grade-school-math "
    "(grade_school_math/data) and give their folder as the option path"
)


@dataclass(frozen=True, kw_only=True)
class Gsm8k(RewardOptions):
    """`path`: a folder with [gsm8k_]train.jsonl[.gz] and [gsm8k_]test.jsonl[.gz], or one such file.

    Each line has "question" and "answer": the final number alone or the original solution that ends in "#### number".
    A single file serves the split its lines name in "split", and both when they name none.
    """

    name: ClassVar[str] = "gsm8k"
    path: str = ""
    instruction: str = "Put the final number in \\boxed{}."
    reward_wrong: float = 0.0
    reward_truncated: float = 0.0
    reward_parse_fail: float = 0.0

    def __post_init__(self) -> None:
        if not self.path or not Path(self.path).exists():
            raise ValueError(f"gsm8k: path={self.path!r} does not exist; {GET_DATA}")

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of "train" or "test", in file order."""
        check_split(split)
        return _problems(_find_file(Path(self.path), split), split, self.instruction)

    def verify(self, problem: Problem, response: Response) -> Verdict:
        """Judges what `kogia.tasks.answers` takes for the answer in the text after the thought."""
        parsed, answer = self.read(response)
        early = self.early_verdict(response, parsed.closed, answer)
        if early is not None:
            return early
        extracted = extract_answer(answer)
        if extracted is None:
            return self.verdict(response, "parse_fail", None, "no boxed answer and no number")
        status = "ok" if answers_match(problem.data["answer"], extracted) else "wrong"
        return self.verdict(response, status, extracted)


def gold_answer(answer: str) -> str:
    """The final answer of the data set's "answer" field, without thousands marks; other commas divide a list."""
    final = answer.rpartition("####")[2].strip()
    return final.replace(",", "") if _THOUSANDS.fullmatch(final) else final


def _find_file(path: Path, split: str) -> Path:
    if path.is_file():
        return path
    names = [f"{prefix}{split}.jsonl{suffix}" for prefix in ("gsm8k_", "") for suffix in (".gz", "")]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise ValueError(f"gsm8k: {path} holds none of {', '.join(names)}; {GET_DATA}")


@cache
def _problems(path: Path, split: str, instruction: str) -> tuple[Problem, ...]:
    problems = []
    for number, row in _rows(path):
        if row.get("split", split) != split:
            continue
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"{path}:{number}: needs the texts 'question' and 'answer'; {GET_DATA}")
        question, answer = question.strip(), gold_answer(answer)
        prompt = f"{question}\n{instruction}" if instruction else question
        problems.append(Problem(f"gsm8k/{split}/{number - 1}", (Message("user", prompt),), {"answer": answer}))
    if not problems:
        raise ValueError(f"gsm8k: {path} holds no {split} problems; {GET_DATA}")
    return tuple(problems)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                yield number, row
    except (ValueError, OSError, EOFError) as error:  # truncated or foreign files
        raise ValueError(f"{path}: after line {number}: {error}; the file must be JSON lines, {GET_DATA}") from error
