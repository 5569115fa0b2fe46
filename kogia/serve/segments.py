"""An answer as a row of parts, each of one kind: a thought, text, a call. APIs whose answers are lists stream so."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from kogia.engine.request import Completion
from kogia.serve.generation import Piece

Kind = Literal["thought", "text", "call"]


@dataclass(slots=True)
class Segment:
    """One part, as far as it has come."""

    index: int
    kind: Kind
    name: str = ""
    """Of the function, in a call."""
    text: str = ""
    """A thought, a text, or the arguments of a call."""


@dataclass(slots=True)
class Step:
    """What happens next to the last segment; at the end of all, its completion alone."""

    does: Literal["begins", "grows", "ends", "all"]
    segment: Segment | None = None
    fresh: str = ""
    """What a segment has grown by."""
    completion: Completion | None = None


async def segments(parts: AsyncGenerator[Piece, None]) -> AsyncGenerator[Step, None]:
    """The steps in which the one answer of a request comes. Each segment begins, grows and ends before the next one."""
    last: Segment | None = None
    async with aclosing(parts):
        async for piece in parts:
            for kind, name, fresh in _pieces_of(piece):
                if last is None or last.kind != kind or name is not None:
                    if last is not None:
                        yield Step("ends", last)
                    last = Segment(0 if last is None else last.index + 1, kind, name or "")
                    yield Step("begins", last)
                if fresh:
                    last.text += fresh
                    yield Step("grows", last, fresh)
            if piece.completion is not None:
                if last is not None:
                    yield Step("ends", last)
                yield Step("all", completion=piece.completion)


def _pieces_of(piece: Piece) -> list[tuple[Kind, str | None, str]]:
    """(kind, name where a call begins, text) of what a piece brings, in order."""
    parts: list[tuple[Kind, str | None, str]] = []
    if piece.reasoning:
        parts.append(("thought", None, piece.reasoning))
    start = 0
    for call in piece.calls:
        parts += [("text", None, piece.content[start : call.place]), ("call", call.name, call.arguments)]
        start = call.place
    parts.append(("text", None, piece.content[start:]))
    return [(kind, name, text) for kind, name, text in parts if text or name is not None]
