"""An answer as the page is told of it while it is written: its text, what that is as HTML, and how fast it comes.

Events: "start" names the request; "message" brings new text, changed blocks and counts; "end" has what is known of the
whole; "error" says why there is no more.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any

from kogia.engine.request import Completion
from kogia.serve.errors import ApiError
from kogia.serve.generation import Piece, pieces, usage
from kogia.serve.page.render import Change, GrowingText
from kogia.serve.sse import encode
from kogia.serve.state import Running, ServerState

LEAST_PAUSE = 0.04
"""Seconds between two messages: more often than a page can be read it need not change."""


class Answer:
    """One answer of a running request."""

    def __init__(self, state: ServerState, running: Running, clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self._running, self._clock = state, running, clock
        self._thought, self._answer = GrowingText(), GrowingText()
        self._fresh = {"reasoning": "", "content": ""}
        """Text since the last message."""
        self._counts = Counts(clock)

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            yield encode(self._start(), "start")
            async with contextlib.aclosing(pieces(self._state, self._running)) as parts:
                sent = 0.0
                async for piece in parts:
                    self._note(piece)
                    if piece.completion is not None:
                        yield encode(await asyncio.to_thread(self._end, piece.completion), "end")
                    elif self._clock() - sent >= LEAST_PAUSE:
                        yield encode(await asyncio.to_thread(self._message))
                        sent = self._clock()
        except ApiError as error:
            yield encode(error.body, "error")
        finally:
            self._state.end(self._running)

    def _start(self) -> dict[str, Any]:
        running = self._running
        return {"id": running.id, "model": running.model.name, "prompt_tokens": len(running.prompt_ids)}

    def _note(self, piece: Piece) -> None:
        self._thought.push(piece.reasoning)
        self._answer.push(piece.content)
        self._fresh["reasoning"] += piece.reasoning
        self._fresh["content"] += piece.content
        self._counts.note(piece)

    def _message(self) -> dict[str, Any]:
        return self._with(self._thought.change(), self._answer.change())

    def _end(self, completion: Completion) -> dict[str, Any]:
        counted = usage([self._running], [completion])
        return {
            **self._with(self._thought.finish(), self._answer.finish()),
            "thought_tokens": counted["completion_tokens_details"]["reasoning_tokens"],
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
            "drafted": completion.num_drafted,
            "accepted": completion.num_accepted,
        }

    def _with(self, thought: Change | None, answer: Change | None) -> dict[str, Any]:
        blocks = {"thought": thought, "answer": answer}
        changes = {name: asdict(change) for name, change in blocks.items() if change is not None}
        fresh, self._fresh = self._fresh, {"reasoning": "", "content": ""}
        return {**fresh, **changes, **self._counts.words()}


class Counts:
    """Tokens and seconds of an answer and of its thought."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._first: float | None = None
        self._answers: float | None = None
        """When the first text behind the thought came."""
        self._tokens = self._first_tokens = self._thought_tokens = 0
        self._thinks = False

    def note(self, piece: Piece) -> None:
        self._tokens += len(piece.token_ids)
        if self._first is None and piece.token_ids:
            self._first, self._first_tokens = self._clock(), self._tokens
        self._thinks |= bool(piece.reasoning)
        if piece.content and self._answers is None:
            self._answers = self._clock()
        if self._thinks and self._answers is None:
            self._thought_tokens = self._tokens

    def words(self) -> dict[str, Any]:
        now = self._clock()
        written = now - (self._first or now)
        thought = (self._answers or now) - (self._first or now)
        return {
            "tokens": self._tokens,
            "thought_tokens": self._thought_tokens,
            "thought_seconds": round(thought, 3) if self._thinks else None,
            "seconds": round(now - self._began, 3),
            "rate": round((self._tokens - self._first_tokens) / written, 2) if written > 0 else None,
        }
