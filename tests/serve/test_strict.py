"""Routes that are called past FastAPI."""

import httpx2 as httpx
import pytest
from serve.asks import HELLO, post, refusal

pytest.importorskip("fastapi", reason="the server's libraries are not installed")

from kogia.serve.app import ROUTERS
from kogia.serve.strict import StrictRoute

GENERATE = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/anthropic/v1/messages"),
    *("/chat/completions", "/beta/chat/completions", "/completions", "/beta/completions", "/page/chat"),
)


def plain() -> list[str]:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, StrictRoute)]
    return [route.path for route in routes if route.is_plain]


def test_all_that_generates_is_called_past_fastapi():
    assert set(GENERATE) <= set(plain())


def test_at_their_addresses_nothing_else_is(server):
    for path in plain():
        assert httpx.get(server.url + path).status_code in (404, 405)
        assert httpx.post(server.url + path + "/").status_code == 404


def test_a_body_that_is_missing_is_said_to_be(server):
    for path in plain():
        answer = httpx.post(server.url + path, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "the body is missing"


def test_a_dict_is_answered_as_json(server):
    answer = post(server, "/tokenize", {"messages": HELLO})
    assert answer.headers["content-type"] == "application/json" and answer.json()["count"] > 0


def test_a_fault_is_opaque_and_a_wrong_value_is_named(server, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    wrong = refusal(post(server, "/v1/chat/completions", {"messages": HELLO, "n": "two"}))
    assert wrong["param"] == "n" and wrong["message"].startswith("n = 'two': must be a whole number")
    monkeypatch.setattr("kogia.serve.openai_chat.start_chat", fail)
    answer = post(server, "/v1/chat/completions", {"messages": HELLO})
    assert refusal(answer, 500)["code"] == answer.headers["x-request-id"] and "secret" not in answer.text
