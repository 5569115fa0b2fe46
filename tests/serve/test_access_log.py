"""The access log: one line a request, of what it took, and nothing of what was said."""

import json
import os
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from serve.asks import HELLO, events, post
from serve.server import serving

KEY = "alice-0123456789abcdef"
SECRET = {"role": "user", "content": "the-word-nobody-may-read"}


@pytest.fixture(scope="module")
def logged(model, tmp_path_factory):
    """(server, file)"""
    folder = tmp_path_factory.mktemp("log")
    (folder / "keys").write_text(f"alice: {KEY}\n")
    (folder / "keys").chmod(0o600)
    log = folder / "access.jsonl"
    with serving(model, api_key_file=str(folder / "keys"), access_log=str(log)) as running:
        yield running, log


def new_lines(file: Path, seen: int, count: int) -> list[dict]:
    for _ in range(6000):
        lines = file.read_text().splitlines()[seen:] if file.exists() else []
        if len(lines) >= count:
            break
        time.sleep(0.01)
    assert len(lines) == count, lines
    return [json.loads(line) for line in lines]


def size(file: Path) -> int:
    return len(file.read_text().splitlines())


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_who_asked_what_it_took_and_how_it_ended(logged, stream):
    server, file = logged
    seen, headers = size(file), {"authorization": f"Bearer {KEY}"}
    body = {"messages": [*HELLO, SECRET], "max_tokens": 5, "ignore_eos": True, "n": 2, "stream": stream}
    if stream:
        list(events(server, "/v1/chat/completions", body, headers=headers))
    else:
        response = post(server, "/v1/chat/completions", body, headers=headers)
    (line,) = new_lines(file, seen, 1)
    assert (line["key"], line["method"], line["route"]) == ("alice", "POST", "/v1/chat/completions")
    assert (line["status"], line["completion_tokens"], line["finish_reasons"]) == (200, 10, ["length"] * 2)
    assert line["model"] == "tiny" and line["prompt_tokens"] > 0 and line["answer"].startswith("chatcmpl-")
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"] < 60
    if not stream:
        used = response.json()["usage"]
        assert line["id"] == response.headers["x-request-id"] and line["prompt_tokens"] == used["prompt_tokens"]
        assert line["cached_tokens"] == used["prompt_tokens_details"]["cached_tokens"]


def test_refusals_have_a_line_and_neither_keys_nor_addresses_nor_words_are_in_the_log(logged):
    server, file = logged
    seen = size(file)
    post(server, "/v1/chat/completions", {"messages": [SECRET]}, headers={"authorization": "Bearer " + "x" * 30})
    httpx.get(server.url + "/the-word-nobody-may-read")
    post(server, "/v1/completions", {"prompt": 3}, headers={"x-api-key": KEY})
    httpx.get(server.url + "/health", headers={"host": "a b"})
    wrong, lost, bad, early = new_lines(file, seen, 4)
    assert (wrong["status"], wrong["key"]) == (401, None)
    assert (lost["status"], lost["route"]) == (404, None)
    assert (bad["status"], bad["route"], bad["key"]) == (400, "/v1/completions", "alice")
    assert (early["status"], early["route"]) == (400, None)
    text = file.read_text()
    assert "nobody-may-read" not in text and KEY not in text and "x" * 30 not in text


def test_who_leaves_has_a_line_too_and_a_renamed_file_is_made_anew(logged):
    server, file = logged
    os.rename(file, file.with_suffix(".1"))
    stream = events(
        server,
        "/v1/chat/completions",
        {"messages": HELLO, "stream": True, "max_tokens": 3000, "ignore_eos": True},
        headers={"x-api-key": KEY},
    )
    for _ in range(3):
        next(stream)
    stream.close()
    (line,) = new_lines(file, 0, 1)
    assert (line["status"], line["finish_reasons"]) == (200, ["abort"])
    assert 0 < line["completion_tokens"] < 3000


def test_who_leaves_before_there_is_an_answer_has_a_line_without_a_status(logged):
    server, file = logged
    seen = size(file)
    body = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "n": 8}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": KEY}, timeout=0.2)
    (line,) = new_lines(file, seen, 1)
    assert (line["status"], line["finish_reasons"]) == (None, ["abort"] * 8)


def test_a_log_that_cannot_be_written_is_refused_at_the_start(model, tmp_path):
    from kogia import cli

    assert cli.main(["serve", str(model), "--port", "0", "--access-log", str(tmp_path / "no" / "log")]) == 2
