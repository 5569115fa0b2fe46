"""What HTTP costs: tokens per second of streams at 16 clients, beside those of the bare engine with as many sequences.

    python benchmarks/server.py [--clients 16] [--tokens 400] [--rounds 15] [--out benchmarks/results/server.json]

The demonstration's model with random weights, on a CPU. Server and clients are two processes, the bare engine
is a third, which waits while the others run; rounds take turns, so that both see the same machine. A round takes a
third of a second, of which a machine that others share takes or gives a tenth now and then: few rounds say little.
Each client opens a connection, streams one chat completion over the loopback and reads every chunk; tokens per second
count from the first request to the last token, so that the beginning of 16 requests at once is among them. Time to
the first chunk is of the same requests. The clients are plain sockets that one thread reads, since they share the
cores with what is measured. Starting is from the start of the process to the first 200 of `/ready`, its files in the
page cache.
"""

import argparse
import json
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

from result import row, write_result

VOCAB, BAR, STARTS = 526, 10.0, 5
QUESTION = "numbers 4 6 15 target 17"
BODY = {"ignore_eos": True, "stream": True, "temperature": 1.0}
TEXT = re.compile(rb'"(?:reasoning_)?content": ?"[^"]')
"""In a chunk that brings some, of an answer or its thought."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server.json"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(args.engine, args.clients, args.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = save_model_in(Path(folder))
        rows = measure(model, args.clients, args.tokens, args.rounds)
        seconds = [startup_seconds(model) for _ in range(STARTS + 1)][1:]
        rows.append(row("server-startup-seconds", median(seconds), "s", low=min(seconds), high=max(seconds), limit=4.0,
                        rounds=STARTS, page_cache="warm"))  # fmt: skip
    write_result(args.out, "server", rows)
    print(json.dumps(rows, indent=1))


def save_model_in(folder: Path) -> Path:
    from kogia.checkpoint.hf import save_model
    from kogia.model.presets import preset
    from kogia.model.transformer import build_model
    from kogia.text.tokenizer import train_bpe

    tokenizer = train_bpe([Path(__file__).read_text(), QUESTION * 20], VOCAB)
    return save_model(build_model(preset("kogia-demo"), seed=0), folder / "model", tokenizer)


def measure(model: Path, clients: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rounds of the engine and of the server by turns; the first one warms up."""
    flags = ["--clients", str(clients), "--tokens", str(tokens), "--engine", str(model)]
    engine = subprocess.Popen(
        [sys.executable, __file__, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    words = ["serve", str(model), "--port", "0", "--device", "cpu", "--draft-tokens", "0"]
    server = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    assert engine.stdin and engine.stdout and server.stderr
    try:
        port = int(server.stderr.readline().split()[0].rpartition(":")[2])
        bare, served, firsts = [], [], []
        for number in range(rounds + 1):
            engine.stdin.write("go\n")
            engine.stdin.flush()
            bare.append(float(engine.stdout.readline()))
            rate, waits = ask_all(port, [QUESTION] * clients, tokens, number)
            served.append(rate)
            firsts += waits if number else []
    finally:
        for process in (engine, server):
            process.kill()
            process.wait()
    shares = [100 * (1 - with_http / without) for without, with_http in zip(bare[1:], served[1:])]
    own = {"clients": clients, "tokens": tokens, "rounds": rounds}
    return [
        row(
            "server-overhead-percent", median(shares), "%", low=min(shares), high=max(shares), limit=BAR,
            engine_tokens_per_second=round(median(bare[1:]), 1), server_tokens_per_second=round(median(served[1:]), 1),
            **own,
        ),
        row("server-first-chunk-ms-p99", 1000 * quantiles(firsts, n=100)[98], "ms", low=1000 * min(firsts),
            high=1000 * max(firsts), median=round(1000 * median(firsts), 2), **own),
    ]  # fmt: skip


def run_engine(model: str, clients: int, tokens: int) -> None:
    """Tokens per second of the engine alone, a line for every line that comes in."""
    from kogia.engine.request import SamplingParams
    from kogia.engine.threads import generation_threads
    from kogia.inference.llm import LLM
    from kogia.model.costs import num_params
    from kogia.text.chat import Message, render_prompt

    llm = LLM(model, device="cpu")
    prompt = render_prompt([Message("user", QUESTION)], llm.tokenizer).token_ids
    with generation_threads(None, num_params(llm.model.config)):
        for number, _ in enumerate(sys.stdin):
            each = [SamplingParams(max_tokens=tokens, ignore_eos=True, top_p=0.95, seed=number * 100 + i)
                    for i in range(clients)]  # fmt: skip
            started = time.perf_counter()
            llm.engine.generate([prompt] * clients, each)
            print(clients * tokens / (time.perf_counter() - started), flush=True)


def ask_all(port: int, questions: Sequence[str], tokens: int, number: int) -> tuple[float, list[float]]:
    """(tokens per second of all streams, seconds to the first chunk with text of each) of a client per question. One
    thread reads all sockets and looks at no more than it must: what is measured is the server."""
    started, selector, clients = time.perf_counter(), selectors.DefaultSelector(), len(questions)
    firsts, ends = [0.0] * clients, [b""] * clients
    for client, question in enumerate(questions):
        connection = socket.create_connection(("127.0.0.1", port))
        own = {"messages": [{"role": "user", "content": question}], "seed": number * 100 + client}
        connection.sendall(request({**BODY, **own, "max_tokens": tokens}))
        selector.register(connection, selectors.EVENT_READ, client)
    while selector.get_map():
        for key, _ in selector.select():
            connection, client = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            part = connection.recv(1 << 16)
            if not part:
                selector.unregister(connection)
                connection.close()
            elif not firsts[client] and TEXT.search(part):
                firsts[client] = time.perf_counter() - started
            ends[client] = (ends[client] + part)[-100:]
    assert all(b"[DONE]" in end for end in ends), ends
    return clients * tokens / (time.perf_counter() - started), firsts


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


def startup_seconds(model: Path) -> float:
    """From the start of the process, Python's own and PyTorch's import included, until `/ready` says 200."""
    port = free_port()
    started = time.perf_counter()
    words = ["serve", str(model), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            assert server.poll() is None, "the server has ended"
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def is_ready(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/ready") as answer:
            return answer.status == 200
    except OSError:  # refused, or 503
        return False


if __name__ == "__main__":
    main()
