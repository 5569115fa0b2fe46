"""Clients that do what no library of HTTP does."""

import socket
from contextlib import closing

CHAT = "/v1/chat/completions"


def connect(server, *, receive_bytes: int | None = None) -> socket.socket:
    """A connection; with `receive_bytes` one that takes no more than about so many before they are read."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(60)
    client.connect((host, int(port)))
    return client


def head(path: str = CHAT, method: str = "POST", *more: str) -> bytes:
    """The head of a request, with further lines."""
    lines = (f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more)
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def raw(server, data: bytes) -> bytes:
    """What the server answers to these bytes, up to the end of a head, or until it hangs up."""
    with closing(connect(server)) as client:
        client.sendall(data)
        answer = b""
        while b"\r\n\r\n" not in answer and (part := client.recv(65536)):
            answer += part
        return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else 0


def is_closed(client: socket.socket) -> bool:
    """Wait for the server to hang up, through whatever it has still sent."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True
