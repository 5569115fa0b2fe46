"""Requests over HTTP/1.1, with little work for what streams in: a client that measures must not be what is measured.

What a load needs of the protocol (RFC 9112) is small, and no HTTP library comes with what kogia requires.
"""

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MOST_HEAD_BYTES = 1 << 16
READ_BYTES = 1 << 18
Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Address:
    """Where a server is."""

    host: str
    port: int
    is_secure: bool
    path: str
    """What stands before the routes of the API, such as `/v1`; without a slash at its end."""

    @classmethod
    def of(cls, url: str) -> "Address":
        """Raises ValueError for what is no address of a server."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url = {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url = {url!r}: write the address of a server, as http://127.0.0.1:8000")
        if parts.username or parts.password:
            raise ValueError("url: holds a name or password; give keys by --api-key-file or --api-key-env")
        is_secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        return cls(parts.hostname, port or (443 if is_secure else 80), is_secure, path)

    @property
    def name(self) -> str:
        """As a Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


class Chunks:
    """Takes the framing off a body that comes in HTTP/1.1's chunks, however it is cut."""

    def __init__(self) -> None:
        self._pending = b""
        self.has_ended = False

    def push(self, data: bytes) -> bytes:
        """The content that is complete now. Raises ValueError for what are no chunks."""
        pending, content, start = self._pending + data, [], 0
        while (line := pending.find(b"\r\n", start)) >= 0:
            size = _size(pending[start:line])
            if size == 0:  # further headers may follow, up to an empty line
                self.has_ended = pending.find(b"\r\n\r\n", line) >= 0
                break
            end = line + 2 + size
            if len(pending) < end + 2:
                break
            content.append(pending[line + 2 : end])
            start = end + 2
        self._pending = pending[start:]
        return b"".join(content)


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if re.fullmatch(rb"[0-9a-fA-F]{1,8}", digits) is None:
        raise ValueError(f"the server does not speak HTTP: a chunk of {line[:20]!r} bytes")
    return int(digits, 16)


class Response:
    """An answer whose head has come."""

    def __init__(self, pair: Pair, head: bytes) -> None:
        """Raises ValueError for what is no head of an answer."""
        self._reader, self.pair = pair[0], pair
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
            raise ValueError(f"the server does not speak HTTP: {first[:80]!r}")
        self.status = int(words[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.may_be_reused = False
        """Whether the connection takes a further request, known when the body has ended."""

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises ConnectionError where it ends too early."""
        keeps_open = self.headers.get("connection", "").lower() != "close"
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            chunks = Chunks()
            while not chunks.has_ended:
                yield chunks.push(await self._some())
        elif "content-length" in self.headers:
            left = int(self.headers["content-length"])
            while left > 0:
                data = await self._some()
                left -= len(data)
                yield data
        else:
            keeps_open = False
            while data := await self._reader.read(READ_BYTES):
                yield data
        self.may_be_reused = keeps_open

    async def _some(self) -> bytes:
        if not (data := await self._reader.read(READ_BYTES)):
            raise ConnectionError("the server closed the connection in the middle of an answer")
        return data

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])


class Connections:
    """Connections to one server, used again where it keeps them open."""

    def __init__(self, address: Address, headers: Mapping[str, str]) -> None:
        self.address = address
        own = {"Host": address.name, "User-Agent": "kogia bench", "Accept": "*/*", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
        self._ssl = ssl.create_default_context() if address.is_secure else None
        self._idle: list[Pair] = []

    async def ask(self, method: str, path: str, body: bytes = b"") -> Response:
        """Send a request, and wait for the head of its answer. Raises OSError where nobody answers, ValueError for what
        is no HTTP. The answer is to be given back by `release`."""
        kind = "Content-Type: application/json\r\n" if body else ""
        head = f"{method} {self.address.path}{path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(body)}\r\n\r\n"
        data = head.encode("latin-1") + body
        while self._idle:
            pair = self._idle.pop()
            try:
                return await self._exchange(pair, data)
            except ConnectionError:  # the server has closed it meanwhile
                pair[1].close()
        address = self.address
        pair = await asyncio.open_connection(address.host, address.port, ssl=self._ssl, limit=MOST_HEAD_BYTES)
        return await self._exchange(pair, data)

    async def _exchange(self, pair: Pair, data: bytes) -> Response:
        reader, writer = pair
        try:
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            return Response(pair, head[:-4])
        except asyncio.IncompleteReadError as error:
            writer.close()
            raise ConnectionError("the server closed the connection without an answer") from error
        except asyncio.LimitOverrunError:
            writer.close()
            raise ValueError(f"the server does not speak HTTP: no end of a head in {MOST_HEAD_BYTES} bytes") from None
        except BaseException:
            writer.close()
            raise

    def release(self, response: Response) -> None:
        """Keep the connection of an answer for the next request, or close it."""
        if response.may_be_reused:
            self._idle.append(response.pair)
        else:
            response.pair[1].close()

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def error_text(body: bytes) -> str:
    """What a refusal says, of the shapes that servers give it."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return str(found)[:300]
