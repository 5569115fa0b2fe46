"""How tests ask a server, and what every answer to what will not do must be."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx

HELLO = [{"role": "user", "content": "hello"}]


def post(server: Any, path: str, body: Any, **kwargs: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **kwargs)


def events(server: Any, path: str, body: dict[str, Any], **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The data of a stream, as it comes; the end mark is checked and left out."""
    with httpx.stream("POST", server.url + path, json=body, timeout=60, **kwargs) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data: "))


def until(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Wait for what comes about in another thread or process; False where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response that must be one, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def letters(server: Any) -> dict[str, Any]:
    """Keeps a random model to tokens of letters, so that what it writes is never empty, an end or a tag."""
    return {"allowed_token_ids": server.tokenizer.encode("theanswer")}
