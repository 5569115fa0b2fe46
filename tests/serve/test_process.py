"""The command itself: it listens at once, says when it is ready, and drains."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from serve.asks import HELLO, events, post, refusal, until
from serve.server import serving
from serve.sockets import CHAT, connect, head, status

from kogia import cli
from kogia.serve import models
from kogia.serve.state import Status


@pytest.fixture(scope="module")
def command(model):
    """(process, URL) of `kogia serve`."""
    words = ["serve", str(model), "--port", "0", "--device", "cpu", "--name", "small", "alias", "--drain-seconds", "30"]
    process = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        yield process, line
    finally:
        process.kill()
        process.wait()


def test_the_ready_line_says_url_model_memory_and_stages_and_sigterm_lets_streams_end(command):
    process, line = command
    match = re.match(r"(http://127\.0\.0\.1:\d+) serves small: weights .* MiB, cache .* MiB for [\d,]+ tokens", line)
    assert match and re.search(r"context 4,096; ready after [\d.]+ s: .*weights [\d.]+, engine [\d.]+", line), line

    class server:
        url = match[1]

    assert [each["id"] for each in httpx.get(f"{server.url}/v1/models").json()["data"]] == ["small", "alias"]
    body = {"model": "alias", "messages": HELLO, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    stream = events(server, "/v1/chat/completions", body)
    next(stream)
    process.send_signal(signal.SIGTERM)
    chunks, refused = [], False
    for chunk in stream:
        chunks.append(chunk)
        if not refused and httpx.get(f"{server.url}/ready").status_code == 503:
            refused = True
            late = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": HELLO})
            assert "draining" in refusal(late, 503)["message"] and late.headers["retry-after"]
    assert refused and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(60) == 0


def test_while_the_model_loads_the_server_lives_and_is_not_ready(model, monkeypatch):
    from serve import server as server_module

    wait, read = threading.Event(), models.read_models
    monkeypatch.setattr(models, "read_models", lambda config: (wait.wait(60), read(config))[1])
    started = threading.Event()

    def ask(port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(url + "/health").status_code == 200
        ready = httpx.get(url + "/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        assert [httpx.head(url + path).status_code for path in ("/health", "/ready")] == [200, 503]
        refusal(httpx.post(url + "/v1/chat/completions", json={"messages": HELLO}), 503)
        started.set()

    listen = server_module.listen

    def listen_and_ask(config):
        listener = listen(config)

        def work() -> None:
            try:
                ask(listener.getsockname()[1])
            finally:
                wait.set()

        threading.Thread(target=work).start()
        return listener

    monkeypatch.setattr(server_module, "listen", listen_and_ask)
    with serving(model) as running:
        assert running.state.status is Status.READY
    assert started.is_set()


def test_what_a_drain_cannot_wait_for_ends_with_the_reason(model):
    with serving(model, engine={"num_blocks": 64}) as running:
        running.state.config = type(running.state.config)(path="x", drain_seconds=0.1)
        slow = running.engine.step
        running.engine.step = lambda: (time.sleep(0.05), slow())[1]
        body = {"messages": HELLO, "stream": True, "max_tokens": 400, "ignore_eos": True}
        stream = events(running, "/v1/chat/completions", body)
        next(stream)
        running.process._loop.call_soon_threadsafe(running.process.stop)
        last = list(stream)[-1]
    assert "shutting down" in last["error"]["message"]
    assert not running.state.running and running.engine.num_unfinished == 0


def num_sequences(url: str) -> int:
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*?\} (\S+)", httpx.get(f"{url}/metrics").text, re.M)
    return sum(int(float(each)) for each in found)


def test_a_second_signal_gives_each_unfinished_answer_its_reason(model):
    words = ["serve", str(model), "--port", "0", "--device", "cpu", "--drain-seconds", "60"]
    process = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        url = re.match(r"http://127\.0\.0\.1:\d+", process.stderr.readline())[0]
        server = SimpleNamespace(url=url)
        body = {"messages": HELLO, "max_tokens": 4000, "ignore_eos": True}
        with ThreadPoolExecutor(4) as pool, closing(connect(server)) as half:
            half.sendall(head(CHAT, "POST", "content-length: 100") + b"{")
            whole = [pool.submit(post, server, CHAT, {**body, "n": 8}) for _ in range(3)]
            stream = events(server, CHAT, {**body, "stream": True})
            next(stream)
            last = pool.submit(lambda: list(stream)[-1])
            assert until(lambda: num_sequences(url) == 3 * 8 + 1)
            process.send_signal(signal.SIGTERM)
            assert until(lambda: httpx.get(f"{url}/ready").status_code == 503)
            process.send_signal(signal.SIGINT)
            for each in whole:
                assert "shutting down" in refusal(each.result(), 503)["message"]
            assert "shutting down" in last.result()["error"]["message"]
            half.settimeout(60)
            told = half.recv(65536)
            assert not told or status(told) == 503
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_an_address_in_use_and_a_model_that_is_not_there_are_errors_of_the_user(model, tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", str(model), "--port", port]) == 2
        assert "another --port" in capfd.readouterr().err
    assert cli.main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "nothing" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", str(model), "--host", "0.0.0.0"])
    assert "--api-key-file" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["fastapi", "nh3"])
def test_what_is_not_installed_is_named_with_the_way_to_it(model, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["serve", str(model), "--port", "0"]) == 2
    assert f"takes {name}, not installed here; pip install 'kogia[server]'" in capsys.readouterr().err
