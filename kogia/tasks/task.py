"""What a task is: problems to pose and a pure function that judges a response. Torch-free.

A task is any class with the members of `Task`; it is named by a built-in name or by "module:Class", so a new reward is
one file in the user's own repository.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from kogia.config import resolve
from kogia.text.chat import Message

Status = Literal["ok", "wrong", "give_up", "parse_fail", "truncated", "timeout", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNJUDGED: tuple[Status, ...] = ("timeout", "error")
"""Statuses of responses that no check came to an end on: they are not right, and their reward is no measurement."""

BUILTIN = {
    "countdown": "kogia.tasks.countdown:Countdown",
    "arithmetic": "kogia.tasks.arithmetic:Arithmetic",
    "knights": "kogia.tasks.knights:Knights",
    "strings": "kogia.tasks.strings:Strings",
    "mazes": "kogia.tasks.mazes:Mazes",
    "gsm8k": "kogia.tasks.gsm8k:Gsm8k",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One question. `data` is what `verify` needs, as JSON values (lists, no tuples; string keys)."""

    id: str
    messages: tuple[Message, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """One completion: its text after "<think>\\n" without the end token. `truncated`: the token limit ended it."""

    text: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one response. `parts` are the unweighted components (accuracy, format, ...) for the logs.

    The reward counts only where `is_judged`: a response that breaks its check must not earn what lies above "wrong".
    """

    reward: float
    correct: bool
    status: Status
    parts: Mapping[str, float]
    extracted: str | None
    """The answer that was judged, None when none was found."""
    detail: str = ""

    @property
    def is_judged(self) -> bool:
        return self.status not in UNJUDGED


@runtime_checkable
class Task(Protocol):
    """`verify` must be pure: it runs in worker processes, in any order, possibly twice.

    A worker has an empty environment and the current directory last on its import path: what `verify` needs from
    outside is an option of the task. What loading the task imports does not count towards a worker's limit on memory.
    """

    @property
    def name(self) -> str: ...

    def problems(self, split: str) -> Sequence[Problem]: ...

    def verify(self, problem: Problem, response: Response) -> Verdict: ...


def load_task(spec: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a built-in name or "module:Class", constructed with `options`. Raises ValueError for a bad one."""
    cls = resolve(_full_spec(spec))
    if not callable(cls):
        raise ValueError(f"task {spec!r}: is a {type(cls).__name__}, must be a class; name the class itself")
    options = dict(options or {})
    _check_options(spec, cls, options)
    task: Any = cls(**options)
    missing = [member for member in ("name", "problems", "verify") if not hasattr(task, member)]
    if missing:
        raise ValueError(f"task {spec!r}: lacks {', '.join(missing)}; a task has name, problems(split) and verify(...)")
    return task


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is train or test."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: must be 'train' or 'test'")


def _full_spec(spec: str) -> str:
    if ":" in spec:
        return spec
    if spec not in BUILTIN:
        close = difflib.get_close_matches(spec, BUILTIN, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"task {spec!r}: not one of {', '.join(BUILTIN)}, and not of the form 'module:Class'{hint}")
    return BUILTIN[spec]


def _check_options(spec: str, cls: Any, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name, value in options.items():
        if name not in parameters:
            close = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known options: {', '.join(parameters) or 'none'}"
            raise ValueError(f"task {spec!r}: unknown option {name!r}; {hint}")
        _check_type(spec, name, value, parameters[name].annotation)
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [name for name in required if name not in options]
    if missing:
        raise ValueError(f"task {spec!r}: option {missing[0]!r} is required; give it in the options of the task")


def _check_type(spec: str, name: str, value: Any, annotation: Any) -> None:
    """Checks the plain annotations a TOML value can get wrong; anything richer is the task's own business."""
    allowed = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(annotation)
    if allowed is None:
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and annotation is not bool):
        raise ValueError(f"task {spec!r}: option {name}={value!r} must be of type {annotation.__name__}")
