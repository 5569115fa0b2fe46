"""What HTTP costs: tokens per second of streams at 16 clients, beside those of the bare engine with as many sequences.

    python benchmarks/server.py [--clients 16] [--tokens 300] [--requests 6] [--rounds 9]

Two models, on a CPU: the demonstration's with random weights, whose step takes less than a millisecond, so that HTTP
shows, and kogia-nano, which `kogia serve` takes where no path is given, for a third of the rounds. Server and clients
are two processes, the bare engine is a third, which waits while the others run; rounds take turns, so that both see the
same machine. In a round each
client streams chat completions over one connection, one after the other, of half to one and a half times --tokens, so
that they begin and end at different times, and reads every chunk; the engine gets the same requests, and runs as many
at once. Tokens per second count from the first request to the last token. `server-burst-overhead-percent` is the same
of one request a client, all of one length, that begin at once and are over in a third of a second: what lies before
their first tokens is a large part of that. Time to the first chunk is of these.

The clients are plain sockets that one thread reads, since they share the cores with what is measured. Starting is from
the start of the process to the first 200 of `/ready`, its files in the page cache.
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
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

from result import row, write_result

VOCAB, BAR, STARTS = 526, 10.0, 5
NANO = Path(__file__).parents[1] / "checkpoints" / "kogia-nano"
QUESTION = "numbers 4 6 15 target 17"
BODY = {"ignore_eos": True, "stream": True, "temperature": 1.0}
TEXT = re.compile(rb'"(?:reasoning_)?content": ?"[^"]')
"""In a chunk that brings some, of an answer or its thought."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--requests", type=int, default=6, help="of each client in a round, one after the other")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server.json"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        run_engine(args.engine, args.clients)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = save_model_in(Path(folder))
        rows = measure(model, "server", args.clients, args.tokens, args.requests, args.rounds)
        rows += measure(NANO, "server-nano", args.clients, args.tokens, args.requests, max(args.rounds // 3, 2))
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


Lengths = list[list[int]]
"""Tokens of each request of each client."""


def lengths_of(clients: int, tokens: int, requests: int) -> Lengths:
    """Half to one and a half times `tokens`, in another order for each client; `tokens` for one request."""
    if requests == 1:
        return [[tokens]] * clients
    return [
        [tokens // 2 + tokens * ((7 * client + 11 * number) % 16) // 15 for number in range(requests)]
        for client in range(clients)
    ]


def measure(model: Path, prefix: str, clients: int, tokens: int, requests: int, rounds: int) -> list[dict[str, Any]]:
    """Rounds of the engine and of the server by turns; the first ones warm up. Ids of rows begin with `prefix`."""
    flags = ["--clients", str(clients), "--engine", str(model)]
    engine = subprocess.Popen(
        [sys.executable, __file__, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    words = ["serve", str(model), "--port", "0", "--device", "cpu", "--draft-tokens", "0"]
    server = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    rows, own = [], {"clients": clients, "tokens": tokens, "rounds": rounds}
    try:
        port = int(server.stderr.readline().split()[0].rpartition(":")[2])
        for name, number_each in (("overhead-percent", requests), ("burst-overhead-percent", 1)):
            lengths, bare, served, firsts = lengths_of(clients, tokens, number_each), [], [], []
            for number in range(rounds + 1):
                bare.append(ask_engine(engine, lengths, number))
                rate, waits = ask_all(port, lengths, number)
                served.append(rate)
                firsts += waits if number else []
            shares = [100 * (1 - with_http / without) for without, with_http in zip(bare[1:], served[1:])]
            rows.append(row(
                f"{prefix}-{name}", median(shares), "%", low=min(shares), high=max(shares), limit=BAR,
                requests=number_each, engine_tokens_per_second=round(median(bare[1:]), 1),
                server_tokens_per_second=round(median(served[1:]), 1), **own,
            ))  # fmt: skip
    finally:
        for process in (engine, server):
            process.kill()
            process.wait()
    rows.append(row(f"{prefix}-first-chunk-ms-p99", 1000 * quantiles(firsts, n=100)[98], "ms", low=1000 * min(firsts),
                    high=1000 * max(firsts), median=round(1000 * median(firsts), 2), **own))  # fmt: skip
    return rows


def ask_engine(engine: subprocess.Popen[str], lengths: Lengths, number: int) -> float:
    assert engine.stdin and engine.stdout
    engine.stdin.write(json.dumps({"lengths": lengths, "number": number}) + "\n")
    engine.stdin.flush()
    return float(engine.stdout.readline())


def run_engine(model: str, clients: int) -> None:
    """Tokens per second of the engine alone, a line for every line that comes in; as many sequences at once."""
    from kogia.engine.request import SamplingParams
    from kogia.engine.threads import generation_threads
    from kogia.inference.llm import LLM
    from kogia.model.costs import num_params
    from kogia.text.chat import Message, render_prompt

    llm = LLM(model, device="cpu", max_sequences=clients)
    prompt = render_prompt([Message("user", QUESTION)], llm.tokenizer).token_ids
    with generation_threads(None, num_params(llm.model.config)):
        for line in sys.stdin:
            work = json.loads(line)
            each = [
                SamplingParams(max_tokens=tokens, ignore_eos=True, top_p=0.95, seed=seed_of(work["number"], client, i))
                for i, turn in enumerate(zip(*work["lengths"], strict=True)) for client, tokens in enumerate(turn)
            ]  # fmt: skip
            started = time.perf_counter()
            llm.engine.generate([prompt] * len(each), each)
            print(sum(map(sum, work["lengths"])) / (time.perf_counter() - started), flush=True)


def seed_of(number: int, client: int, request: int) -> int:
    return (number * 100 + client) * 100 + request


def ask_all(port: int, lengths: Lengths, number: int) -> tuple[float, list[float]]:
    """(tokens per second of all streams, seconds to the first chunk with text of each client's first) of a client for
    each list of lengths. One thread reads all sockets and looks at no more than it must: what is measured is the
    server."""
    started, selector, clients = time.perf_counter(), selectors.DefaultSelector(), len(lengths)
    firsts, ends, answered = [0.0] * clients, [b""] * clients, [0] * clients

    def ask(connection: socket.socket, client: int) -> None:
        i = answered[client]
        own = {"seed": seed_of(number, client, i), "max_tokens": lengths[client][i]}
        connection.sendall(request({**BODY, "messages": [{"role": "user", "content": QUESTION}], **own}))

    for client in range(clients):
        connection = socket.create_connection(("127.0.0.1", port))
        ask(connection, client)
        selector.register(connection, selectors.EVENT_READ, client)
    while selector.get_map():
        for key, _ in selector.select():
            connection, client = key.fileobj, key.data
            assert isinstance(connection, socket.socket)
            part = connection.recv(1 << 16)
            assert part, "the server has closed a connection"
            if not firsts[client] and TEXT.search(part):
                firsts[client] = time.perf_counter() - started
            ends[client] = (ends[client] + part)[-100:]
            if not ends[client].endswith(b"0\r\n\r\n"):
                continue
            assert b"[DONE]" in ends[client], ends[client]
            ends[client], answered[client] = b"", answered[client] + 1
            if answered[client] < len(lengths[client]):
                ask(connection, client)
            else:
                selector.unregister(connection)
                connection.close()
    return sum(map(sum, lengths)) / (time.perf_counter() - started), firsts


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
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
