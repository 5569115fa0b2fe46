"""One row of a data file as a document: the layouts that data sets come in, every value checked.

docs/data-formats.md shows each layout with the tokens that are learned from it. A layout counts as present where all of
its columns are filled, so that a merged data set, with nulls in the columns of the other layouts, is read row by row.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from kogia.text.chat import ROLES as SPOKEN
from kogia.text.chat import TOOL, Message, canonical_reply
from kogia.text.tokenizer import END_THINK, sound

LAYOUTS = (("messages",), ("prompt", "completion"), ("conversations",), ("instruction", "output"))
"""Columns that a row must have filled; the first layout that it has is taken, the text column after all of them."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names under which a reply's thought stands beside it."""
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
"""Other names of the three roles: ShareGPT's and OpenAI's."""


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text (`prompt` empty), or a reply to a chat prompt as `canonical_reply` gives it."""

    text: str
    prompt: tuple[Message, ...] = ()
    learned: tuple[int, ...] = ()
    """Replies inside `prompt` that are learned as well, by index."""
    where: str = field(default="", compare=False)
    """Source and place, for messages about it."""

    def examples(self) -> Iterator[tuple[tuple[Message, ...], str]]:
        """(prompt, reply) of every reply to learn, in order. Earlier replies have lost their thoughts, as in a chat."""
        spoken = tuple(_without_thought(message) for message in self.prompt)
        for index in self.learned:
            yield spoken[:index], _reply(self.prompt[index])
        yield spoken, self.text


Turn = tuple[Message, bool]
"""A message, and whether it is learned if it is a reply."""


def document_from_row(row: Any, where: str, text_key: str = "text") -> Document:
    """A document from one row of a file or one generated item. ValueError that begins with `where` if it is none."""
    try:
        return replace(_document(row, text_key), where=where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _document(row: Any, text_key: str) -> Document:
    if isinstance(row, str):
        return Document(_text(row, "the text"))
    if isinstance(row, tuple) and len(row) == 2 and hasattr(row[0], "messages"):
        asked = [replace(message, content=_text(message.content, "a message")) for message in row[0].messages]
        return _chat([*((message, False) for message in asked), *_reply_turns(row[1], {})])
    if not isinstance(row, Mapping):
        raise _no_document(f"a {type(row).__name__}", text_key)
    columns = {key: value for key, value in row.items() if not _is_null(value)}
    layout = _layout(columns, text_key)
    if layout == (text_key,):
        return Document(_text(columns[text_key], text_key))
    turns = _TURNS[layout[0]](columns)
    if "system" in columns and turns[0][0].role != "system":
        turns = [(Message("system", _text(columns["system"], "system")), False), *turns]
    return _chat(turns)


def _layout(columns: Mapping[str, Any], text_key: str) -> tuple[str, ...]:
    """The first layout whose columns all hold something, else the first whose columns are all there."""
    layouts = (*LAYOUTS, ("text",)) if text_key == "text" else ((text_key,), *LAYOUTS)
    filled = {key for key, value in columns.items() if value not in ("", [])}
    for present in (filled, columns.keys()):
        for layout in layouts:
            if present >= set(layout):
                return layout
    raise _no_document(f"keys {sorted(map(str, columns))}", text_key)


def _no_document(found: str, text_key: str) -> ValueError:
    return ValueError(
        f'{found} is no document; a row needs {{"{text_key}"}}, {{"prompt", "completion"}}, {{"messages"}} or another '
        "layout of docs/data-formats.md, filled (text_key names another column)"
    )


def _message_turns(columns: Mapping[str, Any]) -> list[Turn]:
    """All replies of "messages" are learned; where they end with a question, only the "completion" beside them."""
    turns = _turns(columns["messages"], "messages", learned=True)
    if turns[-1][0].role == "assistant" or "completion" not in columns:
        return turns
    return [*((message, False) for message, _ in turns), *_reply_turns(columns["completion"], columns)]


def _prompt_turns(columns: Mapping[str, Any]) -> list[Turn]:
    prompt = columns["prompt"]
    asked = [(_user(prompt, "prompt"), False)] if isinstance(prompt, str) else _turns(prompt, "prompt", learned=False)
    return [*asked, *_reply_turns(columns["completion"], columns)]


def _sharegpt_turns(columns: Mapping[str, Any]) -> list[Turn]:
    return _turns(columns["conversations"], "conversations", learned=True)


def _alpaca_turns(columns: Mapping[str, Any]) -> list[Turn]:
    """Instruction and input are one question, a blank line between; "history" holds earlier pairs."""
    turns: list[Turn] = []
    for pair in _list(columns.get("history", []), "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"history holds {pair!r:.60}: must hold [question, answer] pairs")
        turns += [(_user(pair[0], "history"), False), (Message("assistant", _text(pair[1], "history")), True)]
    parts = [_text(columns[name], name) for name in ("instruction", "input") if columns.get(name)]
    return [*turns, (Message("user", "\n\n".join(parts)), False), *_reply_turns(columns["output"], columns)]


_TURNS = {
    "messages": _message_turns,
    "prompt": _prompt_turns,
    "conversations": _sharegpt_turns,
    "instruction": _alpaca_turns,
}


def _reply_turns(reply: Any, columns: Mapping[str, Any]) -> list[Turn]:
    """A completion: text, with its thought in a column beside it or not, or messages."""
    if isinstance(reply, list):
        return _turns(reply, "completion", learned=True)
    return [(Message("assistant", _text(reply, "the completion"), _thought(columns)), True)]


def _turns(messages: Any, name: str, learned: bool) -> list[Turn]:
    found = [_turn(message, f"{name}[{i}]", learned) for i, message in enumerate(_list(messages, name))]
    if not found:
        raise ValueError(f"{name} is empty: it must hold at least one message")
    return found


def conversation(messages: Any, name: str) -> list[Message]:
    """The messages of a list of them or of objects as in data files. ValueError that names what is neither."""
    return [
        message if isinstance(message, Message) else _turn(message, f"{name}[{i}]", learned=False)[0]
        for i, message in enumerate(_list(messages, name))
    ]


def _turn(message: Any, name: str, learned: bool) -> Turn:
    """One {"role", "content"} or {"from", "value"}; "weight": 0 keeps a reply from being learned, as for OpenAI."""
    if not isinstance(message, Mapping):
        raise ValueError(f'{name} is {message!r:.60}: every message needs "role" and "content"')
    values = {key: value for key, value in message.items() if not _is_null(value)}
    if values.get("tool_calls"):
        raise ValueError(f"{name} calls tools, which no format here can write; leave the row out")
    role, content = values.get("role", values.get("from")), values.get("content", values.get("value"))
    if role is None or content is None:
        raise ValueError(f'{name} has only {sorted(map(str, values))} filled: every message needs "role" and "content"')
    role = _text(role, f"{name}.role")
    if role == TOOL:
        raise ValueError(f"{name}: role={role!r}: must be one of {', '.join(SPOKEN)}; leave the row out")
    spoken = Message(ROLES.get(role, role), _content(content, f"{name}.content"), _thought(values))
    return spoken, learned and values.get("weight", 1) != 0


def _content(content: Any, name: str) -> str:
    """Text, or a list of {"type": "text", "text"} parts."""
    if not isinstance(content, list):
        return _text(content, name)
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return "".join(_text(text, f"{name}, a part") for text in texts)


def _thought(values: Mapping[str, Any]) -> str | None:
    return next((_text(values[name], name) for name in THOUGHTS if values.get(name)), None)


def _chat(turns: Sequence[Turn]) -> Document:
    """The conversation up to its last reply to learn. A reply counts where it answers a user."""
    messages = [message for message, _ in turns]
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        raise ValueError(
            f'ends with a message of the {roles[-1]}: without "completion" the last must be the assistant\'s reply'
        )
    answers = [i for i, pair in enumerate(pairwise(roles), start=1) if pair == ("user", "assistant")]
    if ("assistant", "assistant") in pairwise(roles):
        raise ValueError("two messages of the assistant in a row; join them, or put the user's between them")
    learned = [i for i in answers if turns[i][1]]
    if not learned:
        raise ValueError(f"roles {', '.join(roles)}: no reply to learn; one that counts must follow a user message")
    *earlier, last = learned
    return Document(_reply(messages[last]), tuple(messages[:last]), tuple(earlier))


def _reply(message: Message) -> str:
    return canonical_reply(message.content, message.reasoning)


def _without_thought(message: Message) -> Message:
    if message.role != "assistant":
        return message
    _, closing, answer = canonical_reply(message.content).partition(END_THINK)
    return Message("assistant", answer.removeprefix("\n\n") if closing else "")


def _user(value: Any, name: str) -> Message:
    return Message("user", _text(value, name))


def _is_null(value: Any) -> bool:
    """Null, or what pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r:.60} ({type(value).__name__}): must be a list")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.60} ({type(value).__name__}): must be text")
    return sound(value, name)
