"""Calls of tools, as models write them, read while they come.

    DeepSeek-V3, R1   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{...}\\n```<｜tool▁call▁end｜>...
    DeepSeek-V3.1     ...<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>
    Qwen, Hermes      <tool_call>\\n{"name": NAME, "arguments": {...}}\\n</tool_call>, any number of times
    Llama 3           {"name": NAME, "parameters": {...}} as the whole answer, `;` between several

A reader takes text in pieces and gives content and calls: the same ones however the text is cut. What looks like a call
and is none stays content, as it is.
"""  # noqa: E501

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kogia.text.thoughts import held_back

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
HERMES_BEGIN, HERMES_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MOST_HEAD = 400
"""Characters of a call within which its name stands and its arguments begin."""
_JSON_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FENCED_HEAD = re.compile(r"([^\n`]+)\n```(?:json)?\n")
_FENCE_END = re.compile(r"\s*`{0,3}\s*\Z")


@dataclass(slots=True)
class CallPiece:
    """What comes of one call."""

    index: int
    """Of the call, among those of its answer."""
    name: str | None
    """Set in the first piece."""
    arguments: str
    """More of its JSON text."""
    place: int
    """Characters of the content that has come with it, before it."""


@dataclass(slots=True)
class Read:
    """What has come: text that is no call, and pieces of calls."""

    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def __add__(self, more: "Read") -> "Read":
        behind = [replace(call, place=len(self.content) + call.place) for call in more.calls]
        return Read(self.content + more.content, self.calls + behind)


class CallReader(ABC):
    """Takes the text of one answer, behind its thought."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._pending = ""
        self._is_behind_call = False
        self._blank = ""
        """Blanks behind a call: content only if more of it follows."""
        self._read = Read()

    def push(self, text: str) -> Read:
        self._pending += text
        self._read = Read()
        while self._advance():
            pass
        return self._read

    def finish(self) -> Read:
        """What was held back, now that no more comes."""
        self._read = Read()
        self._end()
        self._pending = ""
        return self._read

    @abstractmethod
    def _advance(self) -> bool:
        """Take what can be told of the pending text; False when that takes more of it."""

    @abstractmethod
    def _end(self) -> None:
        """Take the pending text as what it is."""

    def _take(self, length: int) -> str:
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken

    def _say(self, text: str) -> None:
        """Content."""
        if self._is_behind_call:
            self._blank += text
            self._is_behind_call = not self._blank.strip()
            text, self._blank = ("", self._blank) if self._is_behind_call else (self._blank, "")
        self._read.content += text

    def _call(self, name: str, arguments: str = "") -> None:
        self._read.calls.append(CallPiece(self.num_calls, name, arguments, len(self._read.content)))
        self.num_calls += 1
        self._is_behind_call, self._blank = True, ""

    def _more(self, arguments: str) -> None:
        if arguments:
            self._read.calls.append(CallPiece(self.num_calls - 1, None, arguments, len(self._read.content)))

    def _say_up_to(self, marks: tuple[str, ...]) -> str | None:
        """Content up to the first of the marks, which is taken; None while there is none: what may begin one waits."""
        found = [(place, mark) for mark in marks if (place := self._pending.find(mark)) >= 0]
        if not found:
            self._say(self._take(len(self._pending) - held_back(self._pending, marks)))
            return None
        place, mark = min(found)
        self._say(self._take(place))
        self._take(len(mark))
        return mark


class DeepSeekReader(CallReader):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._text
        self._mark = ""
        self._is_fenced = False

    def _advance(self) -> bool:
        return self._state()

    def _text(self) -> bool:
        mark = self._say_up_to((CALLS_BEGIN, CALL_BEGIN, CALLS_END))
        if mark == CALL_BEGIN:
            self._state = self._head
        return mark is not None

    def _head(self) -> bool:
        """Between the beginning of a call and its arguments."""
        kind, sep, rest = self._pending.partition(CALL_SEP)
        if not sep or len(kind) > MOST_HEAD:
            return self._give_up() if len(self._pending) > MOST_HEAD else False
        if kind.strip() != "function":  # V3.1: the name itself
            return self._begin(kind.strip(), len(kind) + len(sep), fenced=False)
        match = _FENCED_HEAD.match(rest[:MOST_HEAD])
        if match is not None:
            return self._begin(match[1].strip(), len(kind) + len(sep) + match.end(), fenced=True)
        return self._give_up() if len(rest) > MOST_HEAD else False

    def _begin(self, name: str, length: int, *, fenced: bool) -> bool:
        self._take(length)
        self._call(name)
        self._state, self._is_fenced = self._arguments, fenced
        return True

    def _give_up(self) -> bool:
        self._say(CALL_BEGIN)
        self._state = self._text
        return True

    def _arguments(self) -> bool:
        place = self._pending.find(CALL_END)
        whole = place >= 0
        text = self._pending[: place if whole else len(self._pending) - held_back(self._pending, (CALL_END,))]
        ready = text[: _end_of(text)] if self._is_fenced else text
        self._more(ready)
        self._take(place + len(CALL_END) if whole else len(ready))
        if whole:
            self._state = self._text
        return whole

    def _end(self) -> None:
        if self._state == self._arguments:
            self._more(self._pending[: _end_of(self._pending)] if self._is_fenced else self._pending)
        else:
            self._say((CALL_BEGIN if self._state == self._head else "") + self._pending)


def _end_of(fenced: str) -> int:
    """Where what may be the closing fence begins."""
    match = _FENCE_END.search(fenced)
    assert match is not None
    return match.start()


class JsonReader(CallReader):
    """Calls that are JSON objects with a name and arguments, of which one has come so far."""

    def __init__(self) -> None:
        super().__init__()
        self._value = JsonScanner()

    def _json_head(self) -> bool | None:
        """Begin a call; False where the pending text begins with none, None while that is not known."""
        match = _JSON_HEAD.match(self._pending[:MOST_HEAD])
        if match is None:
            return False if len(self._pending) >= MOST_HEAD else None
        try:
            name = json.loads(match[1])
        except ValueError:
            return False
        self._take(match.end())
        self._call(name)
        self._value = JsonScanner()
        return True

    def _json_arguments(self) -> bool:
        """Take more of the arguments; True at their end."""
        end = self._value.scan(self._pending)
        self._more(self._take(len(self._pending) if end is None else end))
        return end is not None


class HermesReader(JsonReader):
    def __init__(self) -> None:
        super().__init__()
        self._state = self._text

    def _advance(self) -> bool:
        return self._state()

    def _text(self) -> bool:
        begun = self._say_up_to((HERMES_BEGIN,)) is not None
        if begun:
            self._state = self._head
        return begun

    def _head(self) -> bool:
        if self._json_head():
            self._state = self._arguments
            return True
        text, end, _ = self._pending.partition(HERMES_END)
        if not end:
            return False
        self._take(len(text) + len(end))
        call = _whole_call(text)
        if call is None:
            self._say(HERMES_BEGIN + text + HERMES_END)
        else:
            self._call(*call)
        self._state = self._text
        return True

    def _arguments(self) -> bool:
        if self._json_arguments():
            self._state = self._tail
            return True
        return False

    def _tail(self) -> bool:
        """What stands behind the arguments is closing marks."""
        place = self._pending.find(HERMES_END)
        if place < 0:
            self._take(len(self._pending) - held_back(self._pending, (HERMES_END,)))
            return False
        self._take(place + len(HERMES_END))
        self._state = self._text
        return True

    def _end(self) -> None:
        if self._state == self._head:
            call = _whole_call(self._pending)
            if call is None:
                self._say(HERMES_BEGIN + self._pending)
            else:
                self._call(*call)
        elif self._state == self._text:
            self._say(self._pending)


class LlamaReader(JsonReader):
    """Only what the answer begins with can be a call."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._start

    def _advance(self) -> bool:
        return self._state()

    def _start(self) -> bool:
        text = self._pending.lstrip(" \n;" if self.num_calls else " \n")
        if PYTHON_TAG.startswith(text) and len(text) < len(PYTHON_TAG):
            return False
        if text.startswith(PYTHON_TAG):
            self._take(len(self._pending) - len(text) + len(PYTHON_TAG))
            return True
        if not text.startswith("{"):
            self._state = self._text
            return True
        if self.num_calls:
            self._take(len(self._pending) - len(text))
        self._state = self._head
        return True

    def _head(self) -> bool:
        begun = self._json_head()
        if begun is not None:
            self._state = self._arguments if begun else self._text
        return begun is not None

    def _arguments(self) -> bool:
        if self._json_arguments():
            self._state = self._tail
            return True
        return False

    def _tail(self) -> bool:
        """The brace that closes the call."""
        text = self._pending.lstrip()
        if not text:
            return False
        self._take(len(self._pending) - len(text) + text.startswith("}"))
        self._state = self._start
        return True

    def _text(self) -> bool:
        self._say(self._take(len(self._pending)))
        return False

    def _end(self) -> None:
        call = _whole_call(self._pending) if self._state == self._head else None
        if call is not None:
            self._call(*call)
        elif self._state != self._tail:
            self._say(self._pending)


class JsonScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_text = self._is_escaped = False

    def scan(self, text: str) -> int | None:
        """Where the object ends in this piece; None if it goes on."""
        for place, char in enumerate(text):
            if self._is_text:
                self._is_text = self._is_escaped or char != '"'
                self._is_escaped = not self._is_escaped and char == "\\"
            elif char == '"':
                self._is_text = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None


def _whole_call(text: str) -> tuple[str, str] | None:
    """(name, arguments) of a call that is all there, in whatever order."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


@dataclass(frozen=True)
class ToolFormat:
    """How one family of models writes calls."""

    name: str
    reader: type[CallReader]
    before: str
    """The text that begins all calls of an answer."""
    between: str
    after: str
    call: tuple[str, str]
    """What stands before and behind the arguments of one; NAME is its name, as JSON without quotes."""
    most_calls: int | None = None
    arguments_as_text: bool = False
    """Its chat templates want the arguments of earlier calls as text, not as objects."""

    def write(self, name: str, arguments: str) -> str:
        """One call, as the model would."""
        begin, end = (part.replace("NAME", json.dumps(name, ensure_ascii=False)[1:-1]) for part in self.call)
        return begin + arguments + end


DEEPSEEK = ToolFormat(
    "DeepSeek",
    DeepSeekReader,
    CALLS_BEGIN,
    "\n",
    CALLS_END,
    (f"{CALL_BEGIN}function{CALL_SEP}NAME\n```json\n", f"\n```{CALL_END}"),
    arguments_as_text=True,
)
DEEPSEEK_V31 = ToolFormat(
    "DeepSeek-V3.1",
    DeepSeekReader,
    CALLS_BEGIN,
    "",
    CALLS_END,
    (f"{CALL_BEGIN}NAME{CALL_SEP}", CALL_END),
    arguments_as_text=True,
)
HERMES = ToolFormat(
    "Hermes",
    HermesReader,
    "",
    "\n",
    "",
    (f'{HERMES_BEGIN}\n{{"name": "NAME", "arguments": ', f"}}\n{HERMES_END}"),
)
LLAMA = ToolFormat("Llama 3", LlamaReader, "", "; ", "", ('{"name": "NAME", "parameters": ', "}"), most_calls=1)


def tool_format(template: str | None) -> ToolFormat | None:
    """That of a model with this chat template, or without one; None for templates that know no tools."""
    if template is None:
        return DEEPSEEK
    if CALLS_BEGIN in template:
        return DEEPSEEK if "```json" in template else DEEPSEEK_V31
    if HERMES_BEGIN in template:
        return HERMES
    return LLAMA if re.search(r"\btools\b", template) and re.search(r"python_tag|\"parameters\"", template) else None


def describe_tools(tools: Sequence[dict[str, Any]], form: ToolFormat) -> str:
    """What a model is told of tools where its template does not do it, after DeepSeek's own words."""
    each = [f"- `{tool['function']['name']}`:\n```json\n{json.dumps(tool, ensure_ascii=False)}\n```" for tool in tools]
    example = form.before + form.write("FUNCTION_NAME", '{"ARGUMENT": "VALUE"}') + form.after
    how = "To call one, answer in this form and wait for its result:"
    return "\n\n".join(["## Tools", "You have the following functions:", *each, how, example])
