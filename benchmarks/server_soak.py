"""Does anything stay behind? 15,000 requests, hostile and clumsy ones among them, on a server with few cache blocks.

    python benchmarks/server_soak.py [--requests 15000] [--clients 12] [--out benchmarks/results/server_soak.json]

The demonstration's model with random weights on a CPU, and room for 40 blocks of 16 tokens, less than the clients ask
for at once. Of 20 requests four leave in the middle of a stream, one is junk (bytes, broken or nested JSON, wrong
values, half a request on a connection that is then half closed), one is oversized (a length beyond the limit, a chunked
body beyond it, a prompt beyond the context), and 14 are work of all APIs: streams and whole answers, several answers,
tools, formats, log-probabilities. What is counted:

* `server-soak-leaked-blocks`: blocks that are held when nothing runs any more, by the server's own metrics;
* `server-soak-5xx`: answers of 500 and above, but 503; and work that did not end with 200, 429 or 503;
* `server-soak-memory-percent`: how much the server's resident memory grows from the end of the warm-up, a third of all
  requests, to the end. In it what is bounded fills: steps of every size are recorded, the grammars compiled, the
  tokenizer's words kept, and malloc's heaps get their holes. Memory is read (VmRSS) after each thirtieth, when nothing
  runs; the figure is the mean of the last five readings over that of the first five behind the warm-up, `low` and
  `high` are extremes of single readings.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from result import row, write_result

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
READINGS = 30
WARM = READINGS // 3
BAR = 2.0
WORDS = ["--port", "0", "--device", "cpu", "--engine.num-blocks", "40", "--engine.max-sequences", "8"]
TOOL = {"name": "pick", "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=15_000)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server_soak.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(save_model_in(Path(folder)), args.requests, args.clients)
    write_result(args.out, "server_soak", rows)
    print(json.dumps(rows, indent=1))


def save_model_in(folder: Path) -> Path:
    from kogia.checkpoint.hf import save_model
    from kogia.model.presets import preset
    from kogia.model.transformer import build_model
    from kogia.text.tokenizer import train_bpe
    from kogia.text.tools import DEEPSEEK

    calls = DEEPSEEK.before + DEEPSEEK.write("pick", '{"n": 1}') + DEEPSEEK.after
    tokenizer = train_bpe([Path(__file__).read_text(), calls * 20], 526)
    return save_model(build_model(preset("kogia-demo"), seed=0), folder / "model", tokenizer)


def soak(model: Path, num_requests: int, clients: int) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "kogia.cli", "serve", str(model), *WORDS]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        port = int(server.stderr.readline().split()[0].rpartition(":")[2])
        threading.Thread(target=server.stderr.read, daemon=True).start()  # so that its log never waits for us
        started, readings, statuses = time.perf_counter(), [resident(server.pid)], Counter[tuple[str, int]]()
        for part in range(READINGS):
            numbers = range(part * num_requests // READINGS, (part + 1) * num_requests // READINGS)
            statuses += asyncio.run(ask_all(port, numbers, clients))
            asyncio.run(until_idle(port))
            readings.append(resident(server.pid))
            print(f"{numbers.stop:6,} requests, {readings[-1] / 2**20:7.2f} MiB, {dict(statuses)}", flush=True)
        seconds, leaked = time.perf_counter() - started, asyncio.run(blocks_held(port))
    finally:
        server.kill()
        server.wait()
    return rows(num_requests, clients, seconds, leaked, statuses, readings)


def rows(
    num_requests: int, clients: int, seconds: float, leaked: float, statuses: Counter[tuple[str, int]], read: list[int]
) -> list[dict[str, Any]]:
    own = {"requests": num_requests, "clients": clients, "seconds": round(seconds, 1)}
    failed = sum(count for (kind, status), count in statuses.items() if is_fault(kind, status))
    start, end = (sum(part) / 5 for part in (read[WARM : WARM + 5], read[-5:]))
    growth = [100 * (each / start - 1) for each in read[WARM:]]
    told = {f"{kind} {status}": count for (kind, status), count in sorted(statuses.items())}
    return [
        row("server-soak-leaked-blocks", leaked, "blocks", limit=0, **own),
        row("server-soak-5xx", failed, "answers", limit=0, statuses=told, **own),
        row("server-soak-memory-percent", 100 * (end / start - 1), "%", low=min(growth), high=max(growth), limit=BAR,
            mib=[round(each / 2**20, 2) for each in read], **own),
    ]  # fmt: skip


def is_fault(kind: str, status: int) -> bool:
    """500 or more, but 503; and work that came to no good end (0: no answer at all)."""
    return (status >= 500 and status != 503) or (kind == "work" and status not in (200, 429, 503))


def resident(pid: int) -> int:
    """Bytes of the process's memory that are in use."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


async def ask_all(port: int, numbers: range, clients: int) -> Counter[tuple[str, int]]:
    """(kind, status) of all answers."""
    left, found = iter(numbers), Counter[tuple[str, int]]()

    async def client() -> None:
        for number in left:
            kind, ask = kind_of(number)
            found[kind, await asyncio.wait_for(ask(port, random.Random(number)), 900)] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


def kind_of(number: int) -> tuple[str, Any]:
    match number % 20:
        case 0 | 5 | 10 | 15:
            return "left", leave
        case 3:
            return "junk", junk
        case 7:
            return "oversized", oversized
        case _:
            return "work", work


async def leave(port: int, rng: random.Random) -> int:
    """Read the beginning of a stream, or nothing, and hang up, in one way or the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stream = rng.random() < 0.8
    body = {"messages": HELLO, "max_tokens": 400 if stream else 40, "ignore_eos": True, "stream": stream}
    writer.write(request(CHAT, body))
    if rng.random() < 0.8:
        await reader.read(rng.randrange(1, 4000)) if rng.random() < 0.9 else await asyncio.sleep(0.05)
    if rng.random() < 0.5:
        writer.transport.abort()
    writer.close()
    return 0


async def junk(port: int, rng: random.Random) -> int:
    match rng.randrange(6):
        case 0:
            return await status_of(port, rng.randbytes(300) + b"\r\n\r\n")
        case 1:
            return await status_of(port, head(CHAT, 200) + rng.randbytes(200))
        case 2:
            return await status_of(port, head(CHAT, 25_000) + b'{"a":' * 5000)
        case 3:
            value = rng.choice([0, -1, 10**9, "x", None, [], 1.5, 10**40])
            return await ask(port, CHAT, {"messages": HELLO, rng.choice(["n", "top_k", "seed", "stop"]): value})
        case 4:
            return await ask(port, f"/{rng.random()}/../../etc/passwd", {"messages": [{"role": "boss", "content": 1}]})
        case _:
            return await status_of(port, head(CHAT, 50) + b"{", half_close=True)


async def oversized(port: int, rng: random.Random) -> int:
    match rng.randrange(4):
        case 0:
            return await status_of(port, head(CHAT, 9 << 20) + b"x" * (9 << 20))
        case 1:
            chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
            return await status_of(port, head(CHAT, None) + chunk * 9 + b"0\r\n\r\n")
        case 2:
            return await ask(port, "/v1/completions", {"prompt": "hello " * rng.randrange(10_000, 500_000)})
        case _:
            return await ask(port, "/v1/completions", {"prompt": "x", "stop": ["x" * 1000] * 1000})


async def work(port: int, rng: random.Random) -> int:
    sampled = {"max_tokens": rng.randint(1, 24), "seed": rng.getrandbits(32)}
    chat = {"messages": HELLO, **sampled, "stream": rng.random() < 0.5}
    match rng.randrange(8):
        case 0 | 1:
            return await ask(port, CHAT, {**chat, "n": rng.randint(1, 8)})
        case 2:
            return await ask(port, "/v1/messages", {"messages": HELLO, "max_tokens": 20, "stream": chat["stream"]})
        case 3:
            return await ask(
                port, "/v1/responses", {"input": "hello", "max_output_tokens": 20, "stream": chat["stream"]}
            )
        case 4:
            tools = [{"type": "function", "function": TOOL}]
            return await ask(port, CHAT, {**chat, "tools": tools, "tool_choice": rng.choice(["auto", "none"])})
        case 5:
            size = rng.randint(1, 50)  # now and then another grammar
            schema = {"type": "string", "maxLength": size}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            return await ask(port, CHAT, {**chat, "response_format": form, "thinking": {"type": "disabled"}})
        case 6:
            prompts = ["hello " * rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
            return await ask(port, "/v1/completions", {"prompt": prompts, "logprobs": 5, "echo": True, **sampled})
        case _:
            return await ask(port, "/tokenize", {"prompt": rng.randbytes(500).decode("latin-1")})


def head(path: str, length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    words = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{size}\r\n"
    return f"{words}Connection: close\r\n\r\n".encode()


def request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return head(path, len(data)) + data


async def ask(port: int, path: str, body: dict[str, Any]) -> int:
    return await status_of(port, request(path, body))


async def status_of(port: int, data: bytes, half_close: bool = False) -> int:
    """The status of the answer, which is read to its end; 0 where there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(data)
        if half_close:
            writer.write_eof()
        while part := await reader.read(65536):
            answer = answer or part
    except ConnectionError:  # hung up on, while it was still sending
        pass
    finally:
        writer.close()
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


async def until_idle(port: int) -> None:
    while await metric(port, "vllm:num_requests_running") or await metric(port, "vllm:num_requests_waiting"):
        await asyncio.sleep(0.05)


async def blocks_held(port: int) -> float:
    return 40 * await metric(port, "vllm:kv_cache_usage_perc")


async def metric(port: int, name: str) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


if __name__ == "__main__":
    main()
