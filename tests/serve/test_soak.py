"""Many clients at once, hostile and clumsy ones among them, and few cache blocks: nothing leaks, nothing breaks."""

import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
from serve.asks import HELLO, post, until
from serve.server import serving

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def ask(server, number: int) -> int:
    """One request of some kind; its status, 0 for one that was left."""
    rng = random.Random(number)
    body = {"messages": HELLO, "max_tokens": rng.randint(1, 24), "seed": number, "ignore_eos": True}
    match number % 10:
        case 0 | 1:
            return leave(server, body)
        case 2:
            return httpx.post(server.url + CHAT, content=rng.randbytes(200), headers=JSON).status_code
        case 3:
            content = b"x" * (9 << 20) if number % 40 == 3 else b'{"a":' * 5000
            return httpx.post(server.url + CHAT, content=content, headers=JSON).status_code
        case 4:
            return post(server, CHAT, {**body, "n": rng.choice([0, 10**9, -1, "x", 9])}).status_code
        case 5:
            half_open(server)
            return 0
        case 6:
            return post(server, "/v1/messages", {"messages": HELLO, "max_tokens": 5}).status_code
        case 7:
            return post(server, "/v1/responses", {"input": "hello", "max_output_tokens": 5, "stream": True}).status_code
        case _:
            return post(server, CHAT, {**body, "n": rng.randint(1, 8), "stream": number % 2 == 0}).status_code


def leave(server, body: dict) -> int:
    """Read the first chunks of a stream, and hang up."""
    body = {**body, "stream": True, "max_tokens": 400}
    with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as response:
        for count, _ in enumerate(response.iter_lines()):
            if count > 3:
                break
    return 0


def half_open(server) -> None:
    """Send part of a request, and close the writing side; the server hangs up."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(60)
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)


def test_nothing_leaks_and_no_request_fails_by_the_servers_fault(model):
    with serving(model, engine={"num_blocks": 40, "max_sequences": 8}) as server:
        pool = server.engine.scheduler.pool
        free = pool.num_free
        with ThreadPoolExecutor(12) as clients:
            statuses = list(clients.map(lambda number: ask(server, number), range(120)))
        assert until(lambda: not server.state.running and server.engine.num_unfinished == 0)
        assert pool.num_free == free
        assert set(statuses) == {0, 200, 400, 413}
        assert [statuses[number] for number in range(120) if number % 10 in (6, 7, 8, 9)] == [200] * 48
        assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200


def test_idle_connections_do_not_stand_in_the_way(server):
    host, _, port = server.url.removeprefix("http://").partition(":")
    idle = [socket.create_connection((host, int(port))) for _ in range(200)]
    try:
        assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200
    finally:
        for connection in idle:
            connection.close()
