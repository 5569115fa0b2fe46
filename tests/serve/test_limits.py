"""Limits per key: who has used what is his hears 429, and when to come again."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve.asks import HELLO, events, post, refusal
from serve.server import serving

from kogia.serve.access import Keys
from kogia.serve.config import ServeConfig
from kogia.serve.limits import Bucket, Limiter

KEYS = {name: f"{name}-0123456789abcdef" for name in ("alice", "bob", "carol")}
LIMITS = """
[default]
requests_per_minute = 3
[bob]
tokens_per_minute = 60
[carol]
concurrent_requests = 1
"""


@pytest.fixture(scope="module")
def limited(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    (folder / "keys").write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    (folder / "keys").chmod(0o600)
    (folder / "limits.toml").write_text(LIMITS)
    files = {"api_key_file": str(folder / "keys"), "limits_file": str(folder / "limits.toml")}
    with serving(model, **files) as running:
        yield running


@pytest.fixture
def clock(limited, monkeypatch):
    """The server's time, which goes on only where a test says so."""
    now = [next(STARTS)]
    monkeypatch.setattr(limited.state, "clock", lambda: now[0])
    return now


STARTS = itertools.count(1e6, 1000)  # each test has all that a minute brings


def ask(server, name: str, path: str = "/v1/chat/completions", **more):
    body = {"messages": HELLO, "max_tokens": 4, "ignore_eos": True, **more}
    return post(server, path, body, headers={"authorization": f"Bearer {KEYS[name]}"})


def test_requests_beyond_a_minutes_worth_are_refused_until_time_has_passed(limited, clock):
    assert [ask(limited, "alice").status_code for _ in range(3)] == [200] * 3
    response = ask(limited, "alice")
    error = refusal(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert response.headers["retry-after"] == "20"
    assert ask(limited, "carol").status_code == 200
    clock[0] += 19.9
    refusal(ask(limited, "alice"), 429)
    clock[0] += 0.1
    assert ask(limited, "alice").status_code == 200
    assert ask(limited, "alice", path="/v1/messages").json()["error"]["type"] == "rate_limit_error"


def test_tokens_are_taken_when_they_come_and_whoever_overdraws_waits(limited, clock):
    used = ask(limited, "bob", max_tokens=100).json()["usage"]["total_tokens"]
    assert used > 60
    response = ask(limited, "bob")
    assert "tokens per minute" in refusal(response, 429)["message"]
    wait = int(response.headers["retry-after"])
    assert wait == -(-(used - 60) // 1)  # 60 a minute are one a second
    clock[0] += wait
    assert ask(limited, "bob").status_code == 200


def test_one_at_a_time_is_one_at_a_time_and_room_comes_back_however_a_request_ends(limited, clock):
    headers = {"authorization": f"Bearer {KEYS['carol']}"}
    body = {"messages": HELLO, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    stream = events(limited, "/v1/chat/completions", body, headers=headers)
    next(stream)
    assert "running" in refusal(ask(limited, "carol"), 429)["message"]
    stream.close()
    for _ in range(200):
        if (response := ask(limited, "carol")).status_code == 200:
            break
    assert response.status_code == 200
    refusal(ask(limited, "carol", max_tokens=10**6, logit_bias={"100000": 1}), 400)  # the engine refuses it
    assert ask(limited, "carol").status_code == 200


def test_more_prompts_than_a_key_may_ever_have_are_refused_at_once(limited, clock):
    def texts(name, count):
        body = {"messages": None, "prompt": ["a"] * count, "max_tokens": 1}
        return ask(limited, name, "/v1/completions", **body)

    for name, most, what in (("alice", 3, "a minute"), ("carol", 1, "at once")):
        error = refusal(texts(name, most + 1))
        assert error["param"] == "prompt" and f"has {most + 1} texts" in error["message"] and what in error["message"]
        assert texts(name, most).status_code == 200
    assert texts("bob", 20).status_code == 200


@given(
    st.integers(1, 100),
    st.lists(st.floats(0, 30), min_size=1, max_size=40),
)
def test_no_span_of_time_brings_more_than_its_share_and_a_minutes_worth(per_minute, tries):
    bucket, now, taken = Bucket(per_minute), 0.0, []
    for seconds in tries:
        now += seconds
        if bucket.wait(1, now) == 0:
            bucket.take(1, now)
            taken.append(now)
    for first, last in itertools.combinations(range(len(taken)), 2):
        most = per_minute + (taken[last] - taken[first]) * per_minute / 60
        assert last - first + 1 <= most + 1e-6


@pytest.mark.parametrize(
    "text, says",
    [
        ("[eve]\nrequests_per_minute = 1", "no key has this name"),
        ("[alice]\nrequests = 1", "must be a table of requests_per_minute"),
        ("alice = 3", "must be a table"),
        ("[alice]\ntokens_per_minute = 0", "tokens_per_minute = 0: must be"),
        ("[alice]\ntokens_per_minute = true", "True: must be"),
        ("[alice", "is no TOML"),
    ],
)
def test_a_file_of_limits_that_will_not_do_is_refused(tmp_path, text, says):
    file = tmp_path / "limits.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        Limiter.read(file, ["alice"])


def test_limits_take_keys():
    with pytest.raises(ValueError, match="api_key_file"):
        ServeConfig(path="x", limits_file="limits.toml")
    assert Keys().find(None) is not None
