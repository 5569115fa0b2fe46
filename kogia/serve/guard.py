"""What is looked at before any route: where a request comes from, how large it is and how long it takes to arrive.

One ASGI middleware, outermost. It also turns what no route has caught into an opaque 500 with an id, and gives every
answer an `x-request-id`.
"""

import asyncio
import os
import re
import traceback
from collections.abc import Mapping
from itertools import chain
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kogia import log
from kogia.serve.access import authenticate_by_path
from kogia.serve.config import is_loopback
from kogia.serve.errors import ApiError, internal, response_to, shown
from kogia.serve.exchange import Exchange, current
from kogia.serve.memory import LARGE_BYTES, give_back
from kogia.serve.state import ENDS, ServerState

MOST_BODY_BYTES = 8 << 20
MOST_HEADER_BYTES = 16 << 10
MOST_HELD_BYTES = 128 << 20
"""Of the large bodies of all requests under way: their values and prompts take many times as much."""
BODY_SECONDS = 60.0
"""For a whole body to arrive."""
MOST_URL_BYTES = 2048
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_KEY_NAMES = ("key=", "x-api-key=", "authorization=", "api_key=", "api-key=", "apikey=", "token=", "access_token=")
SECURITY_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(f"req_{os.urandom(16).hex()}", scope["method"], self._state.clock())
        current.set(exchange)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # its answer, of which the server below sends no more than the head
        # of two headers of a name the first one; a dict, as Starlette's goes through all of them at each look
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        for listener in self._state.on_begin:
            listener(exchange, headers)
        transfer = _Transfer(exchange, scope, headers, receive, send)
        try:
            self._check(scope, headers)
            if transfer.has_body:  # nothing is read of those who have no key
                authenticate_by_path(scope["path"], headers, self._state.keys, self._state.admin_keys)
            await transfer.read_body()
            exchange.size = transfer.size
            self._hold(transfer)
            await self._app(scope, transfer.receive, transfer.send)
        except ApiError as error:
            await transfer.refuse(error)
        except asyncio.CancelledError:
            if not self._state.is_ending:
                raise
            await transfer.refuse(ApiError(ENDS, 503))
        except Exception:  # noqa: BLE001 - whatever it is, the client learns its id alone
            log.warn(f"request {exchange.id} failed:\n{traceback.format_exc()}")
            await transfer.refuse(internal(exchange.id))
        finally:
            exchange.route = getattr(scope.get("route"), "path", None)
            self._state.note_exchange(exchange)
            self._held -= transfer.held
            if transfer.size > LARGE_BYTES:
                asyncio.get_running_loop().run_in_executor(None, give_back)

    def _hold(self, transfer: "_Transfer") -> None:
        """Take a large body in hand until its request ends, or raise 503 where there are too many."""
        if transfer.size > LARGE_BYTES:
            if self._held + transfer.size > MOST_HELD_BYTES:
                raise ApiError("too many large requests at once; try again later", 503, headers={"Retry-After": "5"})
            transfer.held = transfer.size
            self._held += transfer.held

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError("content-length and transfer-encoding contradict each other: send one of them", 400)
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise ApiError(f"content-encoding = {shown(coding)}: must be identity; send the body as it is", 415)
        if sum(map(len, chain.from_iterable(scope["headers"]))) > MOST_HEADER_BYTES:
            raise ApiError(f"the headers must have at most {MOST_HEADER_BYTES:,} bytes", 431)
        host, num_hosts = headers.get("host", ""), [name for name, _ in scope["headers"]].count(b"host")
        if num_hosts != 1 or not _HOST.fullmatch(host):
            raise ApiError("the Host header must be there once, as name or name:port", 400)
        if not self._state.keys.callers and not self._is_own(host):
            raise ApiError(f"Host {host}: without keys this server answers to its own machine's names only", 403)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError("pages of other origins may not ask this server", 403)
        query = scope["query_string"].decode("latin-1").lower()
        if len(scope["raw_path"]) + len(query) > MOST_URL_BYTES:
            raise ApiError(f"the address must have at most {MOST_URL_BYTES} bytes", 414)
        if query and any(unquote(part).startswith(_KEY_NAMES) for part in query.split("&")):
            raise ApiError("keys in addresses end up in logs: send it as `Authorization: Bearer KEY`", 400)

    def _is_own(self, host: str) -> bool:
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return is_loopback(name) or name == self._state.config.host


class _Transfer:
    """One request on its way in and its answer on the way out."""

    def __init__(
        self, exchange: Exchange, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send
    ) -> None:
        self._exchange = exchange
        self._scope, self._headers, self._receive, self._send = scope, headers, receive, send
        self._body: bytes | None = None
        self._is_read = False
        self.size = 0
        """Of the body, as far as it has come."""
        self.held = 0
        """What of it counts as held."""
        self._has_begun = False
        scope.setdefault("state", {})["request_id"] = exchange.id

    @property
    def has_body(self) -> bool:
        return "transfer-encoding" in self._headers or self._headers.get("content-length", "0") != "0"

    async def read_body(self) -> None:
        """Raises 413 for one that is too large, 408 for one that does not arrive."""
        length = self._headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BODY_BYTES:
            raise _too_large()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                self._body = await self._read()
        except TimeoutError:
            raise ApiError(f"the body did not arrive within {BODY_SECONDS:.0f} s", 408) from None
        self._is_read = True

    async def _read(self) -> bytes:
        parts, more = [], True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ApiError("the client left before its request was whole", 400)
            parts.append(message.get("body", b""))
            self.size, more = self.size + len(parts[-1]), message.get("more_body", False)
            if self.size > MOST_BODY_BYTES:
                raise _too_large()
        return b"".join(parts)

    async def receive(self) -> Message:
        """The whole body, and then whatever the connection says: that the client has left."""
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun, self._exchange.status = True, message["status"]
            own = {b"x-request-id": self._exchange.id.encode(), **SECURITY_HEADERS}
            if self._exchange.notes:
                own[b"x-kogia-notes"] = "; ".join(self._exchange.notes.values()).encode("latin-1")
            given = message.get("headers", [])
            names = {name for name, _ in given}
            message["headers"] = [*given, *(header for header in own.items() if header[0] not in names)]
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """Answer with the error, if nothing was answered yet; else all that can be done is to end."""
        if not self._has_begun:
            # a body is not read behind its refusal: the connection must not be used again
            error.headers |= {"connection": "close"} if self.has_body and not self._is_read else {}
            await response_to(error, self._scope["path"])(self._scope, self.receive, self.send)


def _too_large() -> ApiError:
    return ApiError(f"the body must have at most {MOST_BODY_BYTES:,} bytes, and say how many", 413)
