"""`kogia bench --url` on servers of a few lines that answer, lie, refuse, hang and break off."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kogia.cli import main
from kogia.inference.config import BenchConfig
from kogia.inference.load.connections import Address, Chunks
from kogia.inference.load.outcome import Outcome, figures, lines_of
from kogia.inference.load.plan import WORDS, Sizes, draw
from kogia.inference.load.run import _authorization

MODELS = json.dumps({"data": [{"id": "tiny"}]}).encode()


def sse(*events: object, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + (["data: [DONE]\n\n"] if done else [])
    return "".join(lines).encode()


def piece(text: str, reason: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


def usage(body: dict, num_output: int = 3) -> dict:
    """Two tokens a word, and five of a template."""
    words = body["messages"][0]["content"].split()
    return {"choices": [], "usage": {"prompt_tokens": 5 + 2 * len(words), "completion_tokens": num_output}}


def answer(body: dict) -> bytes:
    return plain(sse(piece("a"), piece("b"), piece("c", "length"), usage(body)))


def plain(content: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


class Peer:
    """A server that says what a function of the request's body makes."""

    def __init__(self, says: Callable[[dict], bytes], wait: float = 0.0) -> None:
        self._says, self._wait = says, wait
        self.bodies: list[dict] = []
        self.heads: list[str] = []
        self.running = self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                size = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                if head.startswith("GET"):
                    writer.write(plain(MODELS))
                    continue
                body = json.loads(await reader.readexactly(size))
                self.bodies.append(body)
                self.running += 1
                self.most = max(self.most, self.running)
                await asyncio.sleep(self._wait)
                self.running -= 1
                writer.write(said := self._says(body))
                if b"Content-Length" not in said:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def peer(says: Callable[[dict], bytes], wait: float = 0.0) -> Iterator[tuple[Peer, str]]:
    own, ready = Peer(says, wait), threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)

    end = asyncio.Event()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        async with await asyncio.start_server(own.serve, sock=listener):
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    ready.wait()
    try:
        yield own, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        loops[0].call_soon_threadsafe(end.set)
        thread.join()


def bench(url: str, *words: object) -> int:
    return main(["bench", "--url", url, *map(str, words)])


def test_the_table_has_the_rows_of_vllms_and_the_file_its_names(tmp_path, capsys):
    out = tmp_path / "load.json"
    with peer(answer) as (server, url):
        words = ["--requests", 6, "--clients", 2, "--prompt-tokens", 25, "--max-tokens", 3, "--goodput", "ttft:60000"]
        assert bench(url, *words, "--out", out) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition(":")[0] for line in lines if ":" in line]
    assert names[:3] == ["Successful requests", "Failed requests", "Maximum request concurrency"]
    assert {"Mean TTFT (ms)", "Median TPOT (ms)", "P90 ITL (ms)", "P99 E2EL (ms)"} <= set(names)
    assert max(map(len, lines)) == 50
    found = json.loads(out.read_text())
    assert (found["completed"], found["failed"], found["total_input_tokens"], found["total_output_tokens"]) == (
        6,
        0,
        150,
        18,
    )
    assert found["request_goodput"] == found["request_throughput"] and found["model"] == "tiny"
    assert found["max_concurrent_requests"] <= 2 and server.most <= 2
    assert 0 < found["median_ttft_ms"] <= found["median_e2el_ms"]
    assert len(server.heads) < 9 + 3, "and connections are used again"


def test_a_closed_loop_keeps_its_clients_busy_and_no_more():
    with peer(answer, wait=0.05) as (server, url):
        assert bench(url, "--requests", 9, "--clients", 3) == 0
    assert server.most == 3


def test_all_at_once_is_all_at_once():
    with peer(answer, wait=0.3) as (server, url):
        assert bench(url, "--requests", 40) == 0
    assert server.most == 40


def test_what_waits_here_counts_from_when_it_was_due(tmp_path):
    out = tmp_path / "load.json"
    with peer(answer, wait=0.05) as (_, url):
        assert bench(url, "--requests", 10, "--clients", 1, "--rate", 1e6, "--out", out) == 0
    assert json.loads(out.read_text())["p99_ttft_ms"] > 400


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (lambda body: plain(b'{"error": {"message": "too long"}}', "400 Bad Request"), "400: too long"),
        (lambda body: plain(b"<html>", "502 Bad Gateway"), "502: <html>"),
        (lambda body: plain(sse({"error": {"message": "out of memory"}})), "out of memory"),
        (lambda body: plain(sse(piece("a"), done=False)), "broke off"),
        (lambda body: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata:", "in the middle of an answer"),
        (lambda body: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", "does not speak HTTP"),
        (lambda body: b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (lambda body: plain(b"data: {\n\n"), "Expecting"),
        (lambda body: b"", "closed the connection without an answer"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_counted_and_told(says, told, capsys):
    with peer(lambda body: says(body) if body["max_tokens"] == 7 else answer(body)) as (_, url):
        assert bench(url, "--requests", 3, "--max-tokens", 7) == 2
        said = capsys.readouterr().err
        assert "all of 3 requests failed" in said and told in said
    turns = iter([True, False, False])
    with peer(lambda body: says(body) if body["max_tokens"] == 7 and next(turns) else answer(body)) as (_, url):
        assert bench(url, "--requests", 3, "--max-tokens", 7) == 0
        said = capsys.readouterr().out
        assert "Failed requests:                         1" in said and told in said
    with peer(says) as (_, url):
        assert bench(url, "--requests", 3) == 2
        assert "the first request failed" in capsys.readouterr().err


def test_a_server_that_hangs_costs_the_timeout(capsys):
    with peer(answer, wait=1.0) as (_, url):
        assert bench(url, "--timeout", 0.2) == 2
    assert "took more than --timeout 0.2 seconds" in capsys.readouterr().err


def test_streams_that_end_with_the_connection_and_tell_no_usage_count_their_pieces(tmp_path, capsys):
    out = tmp_path / "load.json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    with peer(lambda body: head + sse(piece("a"), piece("b", "stop"), done=False)) as (_, url):
        assert bench(url, "--requests", 2, "--out", out) == 0
    assert json.loads(out.read_text())["total_output_tokens"] == 4
    assert "a word is taken for a token" in capsys.readouterr().err


def test_ctrl_c_tells_what_is_there(capsys):
    with peer(answer, wait=0.05) as (_, url):
        threading.Timer(0.6, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        assert bench(url, "--requests", 500, "--clients", 1) == 130
    shown = capsys.readouterr()
    assert "Successful requests" in shown.out and "of 500 requests have ended" in shown.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:9/v1"])
def test_nobody_there(url, capsys):
    assert bench(url) == 2
    assert "Connection refused; is the server running?" in capsys.readouterr().err


def test_prompts_of_a_file_are_sent_round_and_round(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "one", "max_tokens": 4}, {"messages": [{"role": "user", "content": "two"}]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with peer(answer) as (server, url):
        assert bench(url, "--prompts", file, "--requests", 3, "--clients", 1, "--extra", '{"top_p": 0.5}') == 0
        sent = [(body["messages"][0]["content"], body["max_tokens"], body["top_p"]) for body in server.bodies[2:]]
        assert sent == [("one", 4, 0.5), ("two", 64, 0.5), ("one", 4, 0.5)]
        file.write_text('{"prompt": "x", "max_tokens": 0}')
        assert bench(url, "--prompts", file) == 2
    assert "prompts.jsonl, line 1: max_tokens = 0" in capsys.readouterr().err


def test_a_key_comes_from_a_file_or_the_environment_and_is_no_value_of_the_report(tmp_path, monkeypatch, capsys):
    out, keys = tmp_path / "load.json", tmp_path / "keys"
    keys.write_text("# mine\nalice: sk-0123456789abcdef\n")
    monkeypatch.setenv("SOME_KEY", "sk-fedcba9876543210")
    for words, key in (
        (["--api-key-file", keys], "sk-0123456789abcdef"),
        (["--api-key-env", "SOME_KEY"], "sk-fedcba9876543210"),
    ):
        with peer(answer) as (server, url):
            assert bench(url, "--requests", 1, "--out", out, *words) == 0
        assert all(f"Authorization: Bearer {key}" in head for head in server.heads)
        assert key not in out.read_text() + capsys.readouterr().out
    out.write_text("sk 0123456789abcdef")
    for words, told in (
        (["--api-key-env", "NO_KEY"], "no such environment variable"),
        (["--api-key-file", out], "blanks"),
    ):
        assert bench("http://127.0.0.1:9", *words) == 2
        assert told in capsys.readouterr().err
    assert _authorization(BenchConfig(url="http://x")) == {}


def test_a_load_is_that_of_its_seed_with_lengths_prefixes_and_arrivals_as_asked():
    settings = {"url": "http://x", "requests": 400, "rate": 50.0, "vary": 0.5, "prefix_tokens": 25, "prefixes": 3}
    sizes = Sizes(per_word=2.0, around=5.0)
    asks = draw(BenchConfig(**settings), "m", sizes)
    assert asks == draw(BenchConfig(**settings), "m", sizes) != draw(BenchConfig(**settings, seed=1), "m", sizes)
    prompts = [ask.body["messages"][0]["content"].split() for ask in asks]
    lengths = [5 + 2 * len(words) for words in prompts]
    assert 63 <= min(lengths) < 80 and 175 < max(lengths) <= 193 and 120 < np.mean(lengths) < 136
    assert len({tuple(words[:10]) for words in prompts}) == 3 and len({tuple(words[:11]) for words in prompts}) > 100
    answers = [ask.body["max_tokens"] for ask in asks]
    assert min(answers) >= 32 and max(answers) <= 96
    gaps = np.diff([ask.due for ask in asks])
    assert asks[0].due == 0 and 0.017 < gaps.mean() < 0.023 and 0.8 < gaps.std() / gaps.mean() < 1.2, "Poisson"
    assert len(set(WORDS)) == len(WORDS)


def test_figures_are_those_of_the_outcomes():
    fast = Outcome(0.0, 1.0, [0.2, 0.6, 1.0], num_prompt=10, num_output=5)
    slow = Outcome(0.5, 3.5, [1.5, 3.5], num_prompt=20, num_output=11)
    lost = Outcome(0.0, 9.0, error="gone")
    found = figures([fast, slow, lost], 10.0, {"ttft": 500.0, "tpot": 210.0})
    assert found["request_goodput"] == 0.1 and found["request_throughput"] == 0.2 and found["errors"] == {"gone": 1}
    assert found["mean_ttft_ms"] == pytest.approx(600) and found["mean_tpot_ms"] == pytest.approx(200)
    assert found["median_itl_ms"] == pytest.approx(400) and found["mean_e2el_ms"] == pytest.approx(2000)
    assert found["p90_e2el_ms"] == pytest.approx(np.percentile([1000, 3000], 90))
    assert found["output_throughput"] == 1.6 and found["max_concurrent_requests"] == 3
    assert found["max_output_tokens_per_s"] == pytest.approx(5 / 3 + 11 / 2)
    assert figures([], 1.0, {})["mean_ttft_ms"] == 0 and "P99 TTFT (ms):" in lines_of(figures([], 1.0, {}), 0, None)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_chunks_are_the_same_however_they_are_cut(parts, data):
    whole = b"".join(b"%x;x=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nX: y\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    chunks, found = Chunks(), b""
    for start, end in zip([0, *cuts], [*cuts, len(whole)]):
        assert not chunks.has_ended or start == end
        found += chunks.push(whole[start:end])
    assert chunks.has_ended and found == b"".join(parts)


def test_addresses_are_read_with_and_without_what_clients_write_behind_them():
    assert Address.of("http://[::1]:80/v1/") == Address("::1", 80, False, "/v1")
    assert Address.of("https://api.example.com/openai").path == "/openai/v1"
    assert Address.of("https://api.example.com").name == "api.example.com"
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "http://x:99999", "http://me:pw@x", "http://x?key=1"):
        with pytest.raises(ValueError, match="url"):
            Address.of(url)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "and not both"),
        ({"path": "m", "url": "http://x"}, "and not both"),
        ({"path": "m", "clients": 4}, r"clients = 4: is for a server"),
        ({"url": "http://x", "batches": (2,)}, r"batches = \(2,\): is for a model"),
        ({"url": "http://x", "goodput": ("ttfb:1",)}, "must be ttft, tpot, e2el with milliseconds"),
        ({"url": "http://x", "goodput": ("ttft",)}, "as ttft:500"),
        ({"url": "http://x", "vary": 1.0}, "below 1"),
        ({"url": "http://x", "vary": 0.5, "prefix_tokens": 100}, r"0\.\.64"),
        ({"url": "http://x", "extra": "[]"}, "must be a JSON object"),
        ({"url": "http://x", "extra": "{"}, "is no JSON"),
        ({"url": "http://x", "clients": 0}, "clients = 0"),
        ({"url": "http://x", "timeout": 0.0}, "above 0"),
        ({"url": "http://x", "api_key_file": "a", "api_key_env": "b"}, "in one way"),
    ],
)
def test_settings_that_will_not_do_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        BenchConfig(**fields)


def test_the_client_is_no_bottleneck_and_says_so_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr("kogia.inference.load.run.time.process_time", lambda: time.perf_counter() * 0.95)
    with peer(answer) as (_, url):
        assert bench(url, "--requests", 2) == 0
    assert "its own speed limits these figures" in capsys.readouterr().err
