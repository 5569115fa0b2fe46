"""Server-sent events: a stream of chunks, with comments where it is silent, that ends when the client leaves."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
WRITE = "kogia.write"
"""Extension of a scope: a `Write`."""
Write = Callable[[bytes], bool]
"""Sends part of an answer whose head is sent and whose length nobody knows, or leaves it to `send`: False. A call to
`send` passes through all that lies between a route and its connection, which takes longer than to make a chunk."""


def encode(value: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event, whose data is JSON in one line; what is no finite number is null."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return b"%sdata: %s\n\n" % (head, to_json(value, inf_nan_mode="null"))


HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # of proxies that would collect the chunks
)


class EventStream(Response):
    """Sends what a generator of events yields. The generator is closed in any case: it frees what it holds."""

    def __init__(self, events: AsyncGenerator[bytes, None], keep_alive_seconds: float) -> None:
        super().__init__()
        self._events, self._seconds = events, keep_alive_seconds
        self._sent, self._has_ended = time.monotonic(), False
        self._commenting: asyncio.Future[None] | None = None
        """Where `Write` does not take the comment."""

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.raw_headers = list(HEADERS)  # no length, which nobody knows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await until_gone(receive, self._pump(scope, send))
        if not self._has_ended:  # to a client that has left this says nothing
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, scope: Scope, send: Send) -> None:
        """Head and end go out with the first chunk and the last, in one call of the system each."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        write: Write = scope.get("extensions", {}).get(WRITE, _leave)
        self._comment_later(self._seconds, write, send)
        try:
            async for chunk in self._events:
                self._sent = time.monotonic()
                if not write(chunk):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            self._timer.cancel()
            if self._commenting is not None:
                self._commenting.cancel()
        self._has_ended = True
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _comment_later(self, seconds: float, write: Write, send: Send) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._comment, write, send)

    def _comment(self, write: Write, send: Send) -> None:
        """Send a comment if nothing has been sent for so long. By a timer: most streams end before a task had a use."""
        wait = self._sent + self._seconds - time.monotonic()
        if wait <= 0:
            self._sent, wait = time.monotonic(), self._seconds
            if not write(KEEP_ALIVE) and (self._commenting is None or self._commenting.done()):
                message = {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
                self._commenting = asyncio.ensure_future(send(message))
        self._comment_later(wait, write, send)


def _leave(_: bytes) -> bool:
    return False


async def until_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T | None:
    """What `work` brings; None, and it is cancelled, if the client leaves before.

    Nobody watches for that before the work first waits: what waits for nothing costs no more than a call.
    """
    own, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert own is not None, "it is awaited in a task"
    watching: asyncio.Task[None] | None = None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        own.cancel()

    def begin() -> None:
        nonlocal watching
        watching = loop.create_task(watch())

    beginning = loop.call_soon(begin)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and own.cancelling() == 1:
            return None
        raise
    finally:
        beginning.cancel()
        if has_left:
            own.uncancel()
        elif watching is not None:
            watching.cancel()
