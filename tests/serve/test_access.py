"""Keys: who gets in, and who shares prefixes with whom."""

import hashlib

import httpx2 as httpx
import pytest
from serve.asks import HELLO, post, refusal
from serve.server import serving
from serve.sockets import CHAT, connect, head, is_closed

from kogia.serve.access import Keys

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


@pytest.fixture(scope="module")
def locked(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# whose\nalice: {ALICE}\n\nbob: sha256:{hashlib.sha256(BOB.encode()).hexdigest()}\n")
    file.chmod(0o600)
    with serving(model, api_key_file=str(file), engine={"block_size": 4}) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_work_takes_a_key_and_health_does_not(locked):
    for path in ("/health", "/ready"):
        assert httpx.get(locked.url + path).status_code == 200
    wrong = (
        {},
        bearer("wrong"),
        {"authorization": "Bearer"},
        {"authorization": ALICE},
        {"x-api-key": ALICE[:-1]},
        bearer("é" * 20),
    )
    for headers in wrong:
        headers = {name: value.encode() for name, value in headers.items()}
        response = httpx.get(locked.url + "/v1/models", headers=headers)
        assert refusal(response, 401)["code"] == "invalid_api_key"
        refusal(post(locked, "/v1/chat/completions", {"messages": HELLO}, headers=headers), 401)
        refusal(httpx.get(locked.url + "/metrics", headers=headers), 401)
    for headers in (bearer(ALICE), bearer(BOB), {"x-api-key": ALICE}, {"authorization": f"bearer {BOB}"}):
        assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 200


def test_keys_do_not_share_prefixes(locked):
    def cached(key: str, **more: str) -> int:
        body = {"messages": [{"role": "user", "content": "one and the same"}], "max_tokens": 1, **more}
        answer = post(locked, "/v1/chat/completions", body, headers=bearer(key)).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(ALICE) == 0 and cached(ALICE) > 0
    assert cached(BOB) == 0 and cached(BOB) > 0
    assert cached(ALICE, cache_salt="mine") == 0 and cached(ALICE, cache_salt="mine") > 0
    digest = hashlib.sha256(ALICE.encode()).hexdigest()
    assert cached(BOB, cache_salt=digest) == 0  # a salt that somebody guesses is not the other's


def test_one_caller_cannot_stop_the_thoughts_of_another(locked):
    body = {"messages": HELLO, "stream": True, "max_tokens": 200, "ignore_eos": True}
    url = locked.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=bearer(ALICE)) as stream:
        id_ = next(line for line in stream.iter_lines() if line)[13:].partition('"')[0]
        refusal(httpx.post(f"{url}/{id_}/stop_thinking", headers=bearer(BOB)), 404)


@pytest.mark.parametrize(
    "text, says", [("short", "16"), ("a b c", "no key"), ("", "holds no key"), ("# x\n", "no key")]
)
def test_a_file_of_keys_that_will_not_do_is_refused(tmp_path, text, says):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=says):
        Keys.read(file)


def test_keys_that_others_can_read_are_warned_of_and_none_is_kept_in_the_clear(tmp_path, capfd):
    file = tmp_path / "keys"
    file.write_text(ALICE + "\n")
    file.chmod(0o644)
    keys = Keys.read(file)
    assert "chmod 600" in capfd.readouterr().err
    assert ALICE not in repr(keys) and keys.find(ALICE) is keys.callers[0] and keys.find(BOB) is None


def test_the_openapi_document_takes_a_key(locked):
    refusal(httpx.get(locked.url + "/openapi.json"), 401)
    assert httpx.get(locked.url + "/openapi.json", headers=bearer(ALICE)).json()["paths"]


def test_no_body_is_read_of_those_who_have_no_key(locked):
    for size in ("Content-Length: 8000000", "Transfer-Encoding: chunked"):
        for path in (CHAT, "/nothing"):
            with connect(locked) as client:
                client.sendall(head(path, "POST", size))  # and nothing of it
                answer = client.recv(65536)
                assert b" 401 " in answer and b"connection: close" in answer.lower()
                assert is_closed(client)
