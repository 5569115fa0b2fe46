"""Prompts of the command line, with the columns that stood beside them. Torch-free."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kogia.data.config import SourceConfig, file_kind
from kogia.data.rows import conversation
from kogia.data.sources import read_rows, read_text
from kogia.inference.config import GenerateConfig
from kogia.text.chat import Message
from kogia.text.tokenizer import sound

ASKED = ("prompt", "messages")
"""Columns that hold what is asked; the first that is filled is taken."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the row that it came in."""

    asked: str | tuple[Message, ...]
    """A text, or a conversation that ends with a user message."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the row, what is asked included."""

    @classmethod
    def of(cls, text: str) -> "Question":
        return cls(text, {"prompt": text})

    @property
    def title(self) -> str:
        """The text, or the last message."""
        return self.asked if isinstance(self.asked, str) else self.asked[-1].content

    def messages(self, system: str | None) -> Sequence[Message]:
        """The conversation, with `system` in front where it has no system message of its own."""
        turns = (Message("user", self.asked),) if isinstance(self.asked, str) else self.asked
        return turns if system is None or turns[0].role == "system" else (Message("system", system), *turns)


def read_prompts(config: GenerateConfig) -> list[Question]:
    """Prompts of the flags, then of the file; of stdin when neither is given."""
    questions = [Question.of(text) for text in config.prompt]
    if config.file is not None:
        questions += _read_file(config.file)
    elif not questions:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT, --file FILE, or lines on stdin")
        questions = _read_lines(_read_stdin(), "stdin")
    if not questions:
        raise ValueError(f"{config.file or 'stdin'} holds no prompt: write one per line")
    return questions


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"stdin: is no UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def _read_file(spec: str) -> list[Question]:
    if file_kind(spec) in ("", ".txt"):
        return _read_lines(read_text(spec), spec)
    return [question_of(row, where) for where, row in read_rows(SourceConfig(spec))]


def _read_lines(text: str, name: str) -> list[Question]:
    """One prompt per line; rows where the first line is a JSON object that asks something."""
    lines = list(_lines(text, name))
    if not lines or not _asks(lines[0][1]):
        return [Question.of(line) for _, line in lines]
    return [question_of(_json(line, where), where) for where, line in lines]


def _lines(text: str, name: str) -> Iterator[tuple[str, str]]:
    # Only newlines separate: a prompt, or the text inside a JSON line, may hold U+2028 and its like. Some editors and
    # shells begin with a byte order mark.
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            yield f"{name}, line {number}", line


def _asks(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(name in row for name in ASKED)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}), as the first line is; every line must hold one row") from None


def question_of(row: Any, where: str) -> Question:
    """What a row of a file asks. Raises ValueError that begins with `where`."""
    if isinstance(row, str):
        return Question.of(row)
    try:
        return Question(_asked(row), row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _asked(row: Any) -> str | tuple[Message, ...]:
    """What a row asks: a text that is not empty, or messages whose last is the user's."""
    filled = [name for name in ASKED if isinstance(row, dict) and row.get(name)]
    if not filled:
        found = f"keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f"{found}: must be a JSON object with a 'prompt', text or messages, or with 'messages'")
    value = row[filled[0]]
    if isinstance(value, str) and filled[0] == "prompt":
        return sound(value, "prompt")
    turns = tuple(conversation(value, filled[0]))
    if turns[-1].role != "user":
        raise ValueError(f"{filled[0]} ends with a message of the {turns[-1].role}: the last must be the user's")
    return turns
