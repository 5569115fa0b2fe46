"""Connections whose clients do not do their part: they end, and what they held is free."""

import asyncio
import json
import resource
import socket
import time
from contextlib import closing

import httpx2 as httpx
import pytest
from serve.asks import HELLO, post, refusal, until
from serve.sockets import CHAT, connect, head, is_closed, raw, status

from kogia.serve.connection import MOST_UNSENT, CountingTransport, Outbox, most_connections

JSON = {"content-type": "application/json"}


def narrow(server) -> socket.socket:
    """A client whose connection holds next to nothing on its way, so that it is soon felt to take nothing."""
    client = connect(server, receive_bytes=4096)
    other_end(server, client).setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return client


def other_end(server, client: socket.socket):
    """The server's socket of a connection."""
    own = client.getsockname()
    assert until(lambda: any(each.client == own for each in connections(server)))
    (theirs,) = [each for each in connections(server) if each.client == own]
    return theirs.transport.get_extra_info("socket")


def test_a_chunk_does_not_wait_until_its_client_has_confirmed_the_one_before(server):
    with connect(server) as client:
        assert other_end(server, client).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def connections(server) -> list:
    return list(server.process.server_state.connections)


def whole(body: dict, *more: str) -> bytes:
    data = json.dumps(body).encode()
    return head(CHAT, "POST", f"Content-Length: {len(data)}", *more) + data


def test_a_client_that_takes_nothing_of_its_stream_is_left_and_its_blocks_are_free(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.connection.TAKE_SECONDS", 0.5)
    pool = server.engine.scheduler.pool
    free = pool.num_free
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    with narrow(server) as client:
        client.sendall(whole(body))
        assert until(lambda: server.state.running)
        assert until(lambda: not server.state.running)
        assert until(lambda: pool.num_free == free)
        assert is_closed(client)
    assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_a_client_that_takes_nothing_of_a_whole_answer_does_not_keep_its_connection(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.connection.TAKE_SECONDS", 0.5)
    body = {"messages": HELLO, "max_tokens": 10, "ignore_eos": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    with narrow(server) as client:
        client.sendall(whole(body, "Connection: close"))
        assert until(lambda: not any(each.client == client.getsockname() for each in connections(server)))


def test_a_slow_client_that_goes_on_taking_gets_all_of_its_stream(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.connection.TAKE_SECONDS", 1.2)
    body = {"messages": HELLO, "stream": True, "max_tokens": 20, "ignore_eos": True, "n": 4, "logprobs": True}
    with narrow(server) as client:
        client.sendall(whole({**body, "top_logprobs": 20}))
        answer, started = b"", time.monotonic()
        while not answer.endswith(b"0\r\n\r\n"):
            part = client.recv(65536)
            assert part, "the server hung up"
            answer += part
            time.sleep(0.1 if time.monotonic() - started < 2.5 else 0)
        assert b"data: [DONE]" in answer


def test_a_body_in_crumbs_ends_the_connection(server):
    with connect(server) as client:
        client.sendall(head(CHAT, "POST", "Transfer-Encoding: chunked"))
        try:
            for _ in range(100):
                client.sendall(b"1\r\n \r\n" * 1000)
        except ConnectionError:
            return
        assert is_closed(client)


def test_a_body_in_chunks_of_a_fair_size_is_read(server):
    data = json.dumps({"messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 1}).encode()
    chunks = (data[start : start + 30] for start in range(0, len(data), 30))
    assert httpx.post(server.url + CHAT, content=chunks, headers=JSON).status_code == 200


def test_pipelined_requests_are_answered_in_turn_and_a_flood_of_them_ends_the_connection(server):
    get = head("/health", "GET")
    with connect(server) as client:
        client.sendall(get * 3)
        answer = b""
        while answer.count(b"HTTP/1.1 200") < 3:
            answer += client.recv(65536)
    with connect(server) as client:
        client.sendall(whole({"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "stream": True}))
        client.recv(100)
        try:
            client.sendall(get * 20_000)
        except ConnectionError:
            return
        assert is_closed(client)


def test_where_there_are_too_many_connections_those_that_have_waited_longest_make_room(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.connection.most_connections", lambda: 20)
    idle = [connect(server) for _ in range(40)]
    try:
        assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
        assert is_closed(idle[0])
        assert until(lambda: len(connections(server)) <= 20)
    finally:
        for client in idle:
            client.close()


def test_half_heads_by_the_hundred_do_not_stand_in_the_way(server):
    clients = [connect(server) for _ in range(400)]
    try:
        for client in clients:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
    finally:
        for client in clients:
            client.close()


def test_a_thousand_streams_that_wait_do_not_stand_in_the_way_and_leave_nothing_behind(server):
    if most_connections() < 1200 or resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2400:
        pytest.skip("this process may not open both ends of a thousand connections")
    request = whole({"messages": HELLO, "max_tokens": 1000, "ignore_eos": True, "stream": True})
    clients = []
    try:
        for _ in range(1000):
            clients.append(connect(server))
            clients[-1].sendall(request)
        assert until(lambda: len(server.state.running) == 1000)
        urgent = post(server, CHAT, {"messages": HELLO, "max_tokens": 1, "priority": -1})
        assert urgent.status_code == 200
    finally:
        for client in clients:
            client.close()
    assert until(lambda: not server.state.running and server.engine.num_unfinished == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff" * 200 + b"\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: x\r\nX\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_with_4xx_or_a_closed_connection(server, data):
    with connect(server) as client:
        client.sendall(data)
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert status(answer) in (400, 413, 415)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] in (
        "invalid_request_error",
        "request_too_large",
    )
    assert status(raw(server, head("/health", "GET"))) == 200


def test_what_is_no_http_behind_a_request_does_not_get_into_its_answer(server):
    body = json.dumps({"messages": HELLO, "max_tokens": 50, "ignore_eos": True, "stream": True}).encode()
    for garbage in (b"\x00\xff\r\n\r\n", b"GET /health\r\n\r\n"):
        with connect(server) as client:
            client.sendall(head(CHAT, "POST", f"Content-Length: {len(body)}") + body + garbage)
            answer = b""
            while part := client.recv(65536):
                answer += part
        own, _, behind = answer.partition(b"0\r\n\r\nHTTP/1.1 ")
        assert status(answer) == 200 and b"[DONE]" in own and behind[:3] == b"400"


def test_a_half_closed_connection_ends_cleanly(server):
    for data in (b"", b"GET /hea", head(CHAT, "POST", "Content-Length: 50") + b"{", head("/health", "GET")):
        with connect(server) as client:
            client.sendall(data)
            client.shutdown(1)
            assert is_closed(client)
    assert until(lambda: not server.state.running)


@pytest.mark.parametrize(("version", "is_chunked"), [("1.0", False), ("1.1", True)])
def test_a_stream_is_in_chunks_for_those_who_know_them(server, version, is_chunked):
    request = whole({"messages": HELLO, "stream": True, "max_tokens": 20, "ignore_eos": True}, "Connection: close")
    answer = b""
    with connect(server) as client:
        client.sendall(request.replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))
        while part := client.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == 200 and (b"transfer-encoding: chunked" in head.lower()) == is_chunked
    text = b""
    while is_chunked:
        size, _, body = body.partition(b"\r\n")
        if size == b"0":
            assert body == b"\r\n"
            break
        length = int(size, 16)
        text, body = text + body[:length], body[length:].removeprefix(b"\r\n")
    events = (text or body).split(b"\n\n")
    assert events.pop() == b"" and events[-1] == b"data: [DONE]" and len(events) > 2
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events[:-1])


class Taken(asyncio.Transport):
    """Keeps what is written, each call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True


def test_what_is_written_in_one_go_is_sent_in_one_and_nothing_is_lost_at_the_end():
    async def go() -> Taken:
        taken, outbox = Taken(), Outbox()
        transport, other = CountingTransport(taken, outbox), CountingTransport(Taken(), outbox)
        for piece in (b"one ", b"two ", b"three "):
            transport.write(piece)
            other.write(piece)
        assert transport.num_waiting == 14 and transport.num_taken == 0 and not taken.writes
        await asyncio.sleep(0)
        assert taken.writes == [b"one two three "] and transport.num_taken == other.num_taken == 14
        transport.write(b"x" * MOST_UNSENT)
        transport.write(b"y")
        assert len(taken.writes) == 2, "what is large does not wait"
        transport.write(b"end")
        transport.close()
        transport.write(b"too late")
        await asyncio.sleep(0)
        return taken

    taken = asyncio.run(go())
    assert b"".join(taken.writes) == b"one two three " + b"x" * MOST_UNSENT + b"yend"


def test_a_body_with_two_lengths_is_refused_and_nothing_behind_it_is_read(server):
    both = head(CHAT, "POST", "content-length: 5", "transfer-encoding: chunked")
    with closing(connect(server)) as client:
        client.sendall(both + b"0\r\n\r\n" + head("/health", "GET"))
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert status(answer) == 400 and answer.count(b"HTTP/1.1 ") == 1 and b"contradict" in answer


@pytest.mark.parametrize("coding", ["gzip", "br, gzip"])
def test_a_body_in_a_coding_is_refused_by_its_header(server, coding):
    answer = httpx.post(server.url + CHAT, content=b"\x1f\x8b", headers={"content-encoding": coding})
    assert refusal(answer, 415)["message"].startswith(f"content-encoding = {coding!r}")
    assert httpx.post(server.url + CHAT, json={}, headers={"content-encoding": "identity"}).status_code == 400
