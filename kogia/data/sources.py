"""Documents from files and generators, one at a time, before any tokenisation.

A source yields `Document`s: a plain text, or a chat prompt with the completion to learn. A completion is the text that
follows the rendered prompt, which ends in "<think>\\n"; a reply given as a message becomes one by `completion_text`.
"""

import gzip
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from kogia.config import resolve
from kogia.data.config import SourceConfig, is_file_spec
from kogia.text.chat import Message


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text (`prompt` empty) or a completion of a chat prompt."""

    text: str
    prompt: tuple[Message, ...] = ()


def read_source(source: SourceConfig) -> Iterator[Document]:
    """The documents of one source in a fixed order, at most `source.num`.

    Raises ValueError naming file, line and rule for a row that is no document.
    """
    documents = _read_file(source) if is_file_spec(source.spec) else _read_generator(source)
    for index, document in enumerate(documents):
        if source.num is not None and index >= source.num:
            return
        yield document


def completion_text(reply: Message) -> str:
    """What a model would have emitted for `reply` after "<think>\\n": its reasoning, the closing tag, its answer."""
    if reply.reasoning is None and "</think>" in reply.content:
        return reply.content.removeprefix("<think>").removeprefix("\n")
    reasoning = (reply.reasoning or "").strip("\n")
    return f"{reasoning}\n</think>\n\n{reply.content}" if reasoning else f"</think>\n\n{reply.content}"


def document_from_row(row: Any, where: str, text_key: str = "text") -> Document:
    """A document from one jsonl row or one generated item; `where` opens the error message."""
    if isinstance(row, str):
        return Document(row)
    if isinstance(row, tuple) and len(row) == 2 and hasattr(row[0], "messages"):
        return Document(row[1], tuple(row[0].messages))
    if isinstance(row, Mapping):
        if "messages" in row:
            return _from_messages(row, where)
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return Document(row["completion"], (Message("user", row["prompt"]),))
        if isinstance(row.get(text_key), str):
            return Document(row[text_key])
    found = f"keys {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
    raise ValueError(
        f'{where}: {found} is no document; a row needs {{"{text_key}"}}, {{"prompt", "completion"}} or '
        '{"messages"[, "completion"]} (text_key names another column)'
    )


def _from_messages(row: Mapping[str, Any], where: str) -> Document:
    try:
        messages = [Message(m["role"], m["content"], m.get("reasoning")) for m in row["messages"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{where}: every message needs "role" and "content" ({error!r})') from error
    if "completion" in row:
        return Document(row["completion"], tuple(messages))
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise ValueError(f'{where}: without "completion" the last of several messages must be the assistant\'s reply')
    return Document(completion_text(messages[-1]), tuple(messages[:-1]))


def _read_file(source: SourceConfig) -> Iterator[Document]:
    path = Path(source.spec).expanduser()
    if not path.is_file():
        raise ValueError(f"data source {source.spec!r}: no such file (looked in {path.absolute().parent})")
    with _open_text(path) as file:
        if path.name.removesuffix(".gz").endswith(".txt"):
            text = file.read()
            pieces = text.split(source.separator) if source.separator else [text]
            yield from (Document(piece) for piece in pieces if piece.strip())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{source.spec}, line {number}"
                yield document_from_row(_parse_json(line, where), where, source.text_key)


def _open_text(path: Path) -> TextIOWrapper:
    file = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")  # noqa: SIM115
    assert isinstance(file, TextIOWrapper)
    return file


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); a .jsonl file holds one JSON object per line") from error


def _read_generator(source: SourceConfig) -> Iterator[Document]:
    if ":" not in source.spec:
        raise ValueError(
            f"data source {source.spec!r}: neither a file (.txt, .jsonl, each also .gz) nor a generator "
            "`module:function`"
        )
    function = resolve(source.spec)
    arguments = _generator_arguments(function, source)
    for index, item in enumerate(function(**arguments)):
        yield document_from_row(item, f"{source.spec}, item {index}")


def _generator_arguments(function: Callable[..., Any], source: SourceConfig) -> dict[str, Any]:
    """The options, and `num` and `seed` where the function takes them. ValueError with its signature if they misfit."""
    signature = inspect.signature(function)
    own = {"seed": source.seed} | ({} if source.num is None else {"num": source.num})
    arguments = {name: value for name, value in own.items() if name in signature.parameters} | source.options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"data source {source.spec!r}: cannot call it with {sorted(arguments)} ({error}); it is "
            f"{source.spec.rpartition(':')[2]}{signature}"
        ) from error
    return arguments
