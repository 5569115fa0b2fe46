"""HTTP/1.1 connections that do not wait for ever: for the head of a request, or for a client to take its answer.

What a client can make a connection hold is bounded, and so is how many there are.
"""

import asyncio
import resource
from functools import cache, partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from kogia.serve.errors import ApiError, response_to
from kogia.serve.sse import WRITE, Write

HEAD_SECONDS = 20.0
"""For the head of a request to arrive, once a connection is open."""
IDLE_SECONDS = 75
"""How long a connection without requests is kept."""
TAKE_SECONDS = 30.0
"""How long a client may take nothing of what was sent to it."""
MOST_CRUMBS = 64 << 10
"""Bytes of a request's body that are no content, above as many as are: a chunk takes as long as a kilobyte."""
MOST_UNSENT = 64 << 10
"""Bytes that wait for the end of a go of the event loop."""
MOST_CONNECTIONS = 4096
FRAMING = (b"content-length", b"transfer-encoding", b"connection")
"""Headers by which h11 tells where an answer ends, and whether another one may follow."""
FILES_LEFT = 128
"""Files that connections leave to the rest of the process."""


class Outbox:
    """Sends what was written in one go of the event loop behind it, for all connections of a server."""

    def __init__(self) -> None:
        self._waiting: list[CountingTransport] = []

    def add(self, transport: "CountingTransport") -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._send)
        self._waiting.append(transport)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for transport in waiting:
            transport.send()


class CountingTransport:
    """A transport that knows how much was written to it. What is written in one go of the event loop, as the end of a
    stream is piece by piece, is sent in one: each call of the system lets another thread have Python meanwhile."""

    def __init__(self, transport: asyncio.Transport, outbox: Outbox) -> None:
        self._transport, self._outbox = transport, outbox
        self._num_written = 0
        self._unsent = bytearray()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._num_written += len(data)
        if not self._unsent:
            self._outbox.add(self)
        self._unsent += data
        if len(self._unsent) > MOST_UNSENT:
            self.send()

    def close(self) -> None:
        self.send()
        self._transport.close()

    def send(self) -> None:
        data, self._unsent = self._unsent, bytearray()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def num_waiting(self) -> int:
        """Bytes that the system has not taken yet."""
        return len(self._unsent) + self._transport.get_write_buffer_size()

    @property
    def num_taken(self) -> int:
        return self._num_written - self.num_waiting


class Connection(h11.Connection):
    """Looks through the headers of an answer once: h11 does so three times where the answer is of unknown length."""

    def send(self, event: h11.Event) -> Any:
        if not isinstance(event, h11.Response):
            return super().send(event)
        framing, others = [], []
        for header in event.headers:
            (framing if header[0] in FRAMING else others).append(header)
        head = super().send(h11.Response(status_code=event.status_code, headers=framing, reason=event.reason))
        return head.removesuffix(b"\r\n") + b"".join(b"%b: %b\r\n" % header for header in others) + b"\r\n"


class Protocol(H11Protocol):
    _timer: asyncio.TimerHandle | None = None
    _since = 0.0
    """When it was opened, or sent its last answer."""
    _crumbs = 0
    """See `MOST_CRUMBS`; of the request under way."""
    _num_taken = 0
    """Bytes that the client had taken when `look` was called last."""
    _taken = 0.0
    """When it was last seen to have taken some, or all."""

    def __init__(self, *args: Any, outbox: Outbox, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outbox = outbox
        most = self.config.h11_max_incomplete_event_size
        assert most is not None, "Process sets it"
        self.conn = Connection(h11.SERVER, most)

    @property
    def is_idle(self) -> bool:
        """No request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._counting = CountingTransport(transport, self._outbox)
        super().connection_made(cast(asyncio.Transport, self._counting))
        self._since = self._taken = self.loop.time()
        self._watch()
        if len(self.connections) > most_connections():
            self._make_room()

    def data_received(self, data: bytes) -> None:
        cycle, size = self.cycle, 0 if self.cycle is None else len(self.cycle.body)
        super().data_received(data)
        if self.cycle is not cycle or cycle is None:
            self._crumbs = 0
        else:
            content = len(cycle.body) - size
            self._crumbs += len(data) - 2 * content
            if self._crumbs >= MOST_CRUMBS:
                self.transport.abort()
        self._watch()

    def handle_events(self) -> None:
        cycle = self.cycle
        super().handle_events()
        if self.cycle is not cycle and self.scope["method"] != "HEAD" and self.scope["http_version"] == "1.1":
            write: Write = partial(self._write, self.cycle)
            cast(dict[str, Any], self.cycle.scope).setdefault("extensions", {})[WRITE] = write

    def _write(self, cycle: RequestResponseCycle, data: bytes) -> bool:
        """See `sse.Write`: h11 knows that an answer of unknown length is in chunks, and nothing of each of them."""
        if not data or cycle.disconnected or self.flow.write_paused:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP, in the shape of all errors; nothing more where an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = response_to(ApiError("this is no request of HTTP/1.1 that can be read", 400), "")
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason="Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def look(self) -> None:
        """End the connection if the client has taken nothing for too long. To be called every second or so."""
        now, num_taken = self.loop.time(), self._counting.num_taken
        if num_taken > self._num_taken or not self._counting.num_waiting:
            self._num_taken, self._taken = num_taken, now
        if now - self._taken > TAKE_SECONDS:
            self.transport.abort()

    def _make_room(self) -> None:
        """End the tenth of the idle connections that has waited longest; this one, if all are at work."""
        open_ones = [
            each for each in self.connections if isinstance(each, Protocol) and not each.transport.is_closing()
        ]
        if len(open_ones) > most_connections():
            idle = sorted(
                (each for each in open_ones if each.is_idle and each is not self), key=lambda each: each._since
            )
            for each in idle[: max(1, len(idle) // 10)] or [self]:
                each.transport.abort()

    def _watch(self) -> None:
        """Time runs from the first byte, or the connection, to the end of the head."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@cache
def most_connections() -> int:
    """As many as there may be, where the process may open so many files; its own limit is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + FILES_LEFT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft - FILES_LEFT))
