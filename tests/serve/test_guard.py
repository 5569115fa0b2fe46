"""What is refused before any route, and that nothing of it touches the engine."""

import contextlib
import json
import time
from contextlib import closing

import httpx2 as httpx
import pytest
from serve.asks import HELLO, post, refusal
from serve.sockets import CHAT, connect, raw

from kogia.serve.config import ServeConfig
from kogia.serve.guard import MOST_BODY_BYTES, MOST_HEADER_BYTES

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "content, says",
    [
        (b"{", "EOF"),
        (b"[" * 100_000, "recursion limit"),
        (b'{"a":' * 100_000, "recursion limit"),
        (b'{"model": "\xff\xfe"}', "unicode"),
        (b'{"temperature": NaN}', "no JSON"),
        (b'{"temperature": -Infinity}', "no JSON"),
        (b'{"model": "\\ud800"}', "hex escape"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"", "missing"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused_with_the_reason(server, content, says):
    error = refusal(httpx.post(server.url + CHAT, content=content, headers=JSON))
    assert says in error["message"]


def test_a_body_of_another_type_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = httpx.post(
            server.url + CHAT, content=json.dumps({"messages": HELLO}), headers={"content-type": kind}
        )
        assert kind.split(";")[0] in refusal(response, 415)["message"]


@pytest.mark.parametrize("headers", [{}, JSON, {"content-type": "text/plain"}])
def test_a_request_without_a_body_is_answered_whatever_type_it_names(server, headers):
    response = httpx.post(server.url + CHAT, headers=headers, timeout=60)
    assert "the body is missing" in refusal(response)["message"]


def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so(server):
    content = b" " * (MOST_BODY_BYTES + 1)
    refusal(httpx.post(server.url + CHAT, content=content, headers=JSON), 413)
    parts = (content[start : start + 2**20] for start in range(0, len(content), 2**20))
    with contextlib.suppress(httpx.WriteError):  # where the server has hung up on the rest
        refusal(httpx.post(server.url + CHAT, content=parts, headers=JSON), 413)
    assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": [{}] * 500_000}, "prompt.0"),
        ({"prompt": [[1] * 500_000 + ["x"]]}, "prompt.0.500000"),
        ({"prompt": "a", "logit_bias": {str(i): "x" for i in range(300_000)}}, "logit_bias"),
        ({"prompt": "a", "stop": ["x"] * 100_000}, "stop"),
    ],
)
def test_a_body_with_very_many_wrong_values_costs_no_more_than_one(server, body, param):
    started = time.process_time()  # the server is a thread of this process
    assert refusal(post(server, "/v1/completions", body))["param"] == param
    assert time.process_time() - started < 5  # each error compared with all others took hours


@pytest.mark.parametrize("head", [b"", b"Host: a b\r\n", b"Host: x\r\nHost: y\r\n", b"Host: evil.example\r\n"])
def test_hosts_that_are_not_this_machine_are_refused(server, head):
    answer = raw(server, b"GET /v1/models HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"403")
    assert b"tiny" not in answer


def test_pages_of_other_origins_are_refused_and_the_own_one_is_not(server):
    for origin in ("http://evil.example", "null", server.url.replace("http:", "https:") + "0", ""):
        refusal(httpx.get(server.url + "/v1/models", headers={"origin": origin}), 403)
    assert httpx.get(server.url + "/v1/models", headers={"origin": server.url}).status_code == 200


def test_headers_and_addresses_that_are_too_long_are_refused(server):
    for size, end in ((MOST_HEADER_BYTES, b"\r\n\r\n"), (200_000, b"")):  # the second one is never whole
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size + end
        assert raw(server, head).split(b" ")[1] in (b"400", b"431")
    refusal(httpx.get(server.url + "/" + "x" * 3000), 414)


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/v1/models/../../etc/passwd", "/%2e%2e/", "//", "/v1/nothing"])
def test_path_tricks_find_nothing(server, path):
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] == b"404", answer


@pytest.mark.parametrize("name", ["api_key", "a=1&api%5Fkey", "Authorization"])
def test_a_key_in_the_address_is_refused(server, name):
    error = refusal(httpx.get(f"{server.url}/v1/models?{name}=secret"))
    assert "logs" in error["message"] and "secret" not in error["message"]


def test_other_methods_and_upgrades_are_refused(server):
    refusal(httpx.get(server.url + CHAT), 405)
    refusal(httpx.put(server.url + "/health"), 405)
    upgrade = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    assert raw(server, upgrade).split(b" ")[1] == b"200"  # an offer that is not taken up


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/health", "/ready", "/metrics", "/v1/models", "/none", CHAT])
def test_head_is_get_without_the_body(server, path):
    told, got = httpx.head(server.url + path), httpx.get(server.url + path)
    assert (told.status_code, told.content) == (got.status_code, b"")
    for name in ("content-type", "allow", "etag"):
        assert told.headers.get(name) == got.headers.get(name), name


def test_a_head_that_does_not_arrive_ends_the_connection(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.connection.HEAD_SECONDS", 0.2)
    started = time.monotonic()
    with closing(connect(server)) as slow:
        slow.sendall(b"GET /health HT")
        assert slow.recv(100) == b""
    assert time.monotonic() - started < 15  # 20 s are allowed


def test_a_body_that_does_not_arrive_is_answered_408(server, monkeypatch):
    monkeypatch.setattr("kogia.serve.guard.BODY_SECONDS", 0.2)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    assert raw(server, head.encode() + b'{"mess').split(b" ")[1] == b"408"


def test_faults_of_the_server_are_opaque_and_have_an_id(server, monkeypatch, capfd):
    def fail(*_: object) -> None:
        raise RuntimeError("secret at 0xdeadbeef")

    monkeypatch.setattr("kogia.serve.openai_models._model", fail)
    response = httpx.get(server.url + "/v1/models")
    error = refusal(response, 500)
    assert "0xdeadbeef" not in response.text and error["code"] == response.headers["x-request-id"]
    told = capfd.readouterr().err
    assert error["code"] in told and "0xdeadbeef" in told


def test_other_addresses_than_this_machines_take_keys():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match="--api-key-file"):
            ServeConfig(path="x", host=host)
        ServeConfig(path="x", host=host, api_key_file="keys")
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        ServeConfig(path="x", host=host)


@pytest.mark.parametrize("end", ["\n", "\r", "\x1b[2J", "\x85", "\u2028", "\u2029"])
def test_a_client_cannot_write_lines_of_the_log(server, monkeypatch, end):
    said: list[str] = []
    monkeypatch.setattr("kogia.log.info", said.append)
    name = f"mood{end}SIGTERM: no new requests {ord(end[0])}"
    assert post(server, CHAT, {"messages": HELLO, "max_tokens": 1, name: 1}).status_code == 200
    (line,) = said
    assert line.isprintable() and len(line.splitlines()) == 1 and "SIGTERM" in line
