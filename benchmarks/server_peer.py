"""How long 16 clients wait for their first chunk, beside llama.cpp's server with the same weights.

    python benchmarks/server_peer.py --llama-server PATH [--threads 1] [--clients 16] [--tokens 100] [--rounds 10]

The demonstration's model with random weights and a compressed query, which llama.cpp asks of its architecture, in
float32: kogia serves the checkpoint, llama.cpp the GGUF file that `kogia convert` makes of it, with a slot for each
client. Both servers are there all the time and are asked by turns, all clients at once and no two the same question; a
round that is thrown away warms both up. Clients are those of `server.py`. Tokens per second are of the same streams.
Servers, clients and everything else share the machine's cores; `--threads` are llama.cpp's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

from result import row, write_result
from server import QUESTION, VOCAB, ask_all, free_port

Measured = tuple[float, list[float]]
"""Tokens per second, and seconds to the first chunk of each client."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, required=True, help="llama.cpp's program")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp; try which number serves it best")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/server_peer.json"))
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        kogia(save_model_in(Path(folder))) as own,
        llama(args.llama_server, Path(folder) / "model.gguf", args.clients, args.threads) as peer,
    ):
        rounds = [[measure(port, args.clients, args.tokens, n) for port in (own, peer)] for n in range(args.rounds + 1)]
    more = {"clients": args.clients, "tokens": args.tokens, "rounds": args.rounds, "llama_threads": args.threads,
            "llama_cpp": version_of(args.llama_server)}  # fmt: skip
    rows = rows_of(rounds[1:], more)
    write_result(args.out, "server_peer", rows)
    print(json.dumps(rows, indent=1))


def save_model_in(folder: Path) -> Path:
    from kogia.checkpoint.convert import convert_to_gguf
    from kogia.checkpoint.hf import save_model
    from kogia.model.config import MLAConfig
    from kogia.model.presets import preset
    from kogia.model.transformer import build_model
    from kogia.text.tokenizer import train_bpe

    config = preset("kogia-demo")
    assert isinstance(config.attention, MLAConfig)
    config = replace(config, attention=replace(config.attention, q_lora_rank=config.dim))
    tokenizer = train_bpe([Path(__file__).read_text(), QUESTION * 20], VOCAB)
    model = save_model(build_model(config, seed=0), folder / "model", tokenizer)
    convert_to_gguf(model, folder / "model.gguf", kind="f32")
    return model


@contextmanager
def kogia(model: Path) -> Iterator[int]:
    words = ["serve", str(model), "--device", "cpu", "--draft-tokens", "0", "--port"]
    with running([sys.executable, "-m", "kogia.cli", *words], "/ready") as port:
        yield port


@contextmanager
def llama(program: Path, file: Path, clients: int, threads: int) -> Iterator[int]:
    counts = {"--parallel": clients, "--ctx-size": 512 * clients, "--threads": threads, "--threads-http": 4}
    words = ["--model", str(file), *(str(each) for pair in counts.items() for each in pair), "--port"]
    with running([str(program), *words], "/health") as port:
        yield port


@contextmanager
def running(words: list[str], path: str) -> Iterator[int]:
    """The port of a server, which is ready; the port is its last word."""
    port = free_port()
    server = subprocess.Popen([*words, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(f"http://127.0.0.1:{port}{path}"):
            assert server.poll() is None, f"{words[0]} has ended"
            time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def is_ready(url: str) -> bool:
    try:
        with urlopen(url) as answer:
            return answer.status == 200
    except OSError:  # refused, or 503
        return False


def measure(port: int, clients: int, tokens: int, number: int) -> Measured:
    questions = [f"numbers {4 + client} 6 {15 + number} target {17 + client + number}" for client in range(clients)]
    return ask_all(port, questions, tokens, number)


def rows_of(rounds: list[list[Measured]], more: dict[str, Any]) -> list[dict[str, Any]]:
    own, peer = ([one[at] for one in rounds] for at in (0, 1))
    firsts, peer_firsts = ([1000 * each for _, waits in side for each in waits] for side in (own, peer))
    last, peer_last = ([1000 * max(waits) for _, waits in side] for side in (own, peer))
    rate, peer_rate = ([rate for rate, _ in side] for side in (own, peer))
    return [
        row("server-ttft-ms-p99", p99(firsts), "ms", low=min(firsts), high=max(firsts), peer=round(p99(peer_firsts), 4),
            peer_low=round(min(peer_firsts), 4), peer_high=round(max(peer_firsts), 4), **more),
        row("server-ttft-ms-median", median(firsts), "ms", low=min(firsts), high=max(firsts),
            peer=round(median(peer_firsts), 4), **more),
        row("server-last-first-chunk-ms", median(last), "ms", low=min(last), high=max(last),
            peer=round(median(peer_last), 4), peer_low=round(min(peer_last), 4), peer_high=round(max(peer_last), 4),
            **more),
        row("server-tokens-per-second", median(rate), "1/s", low=min(rate), high=max(rate),
            peer=round(median(peer_rate), 4), peer_low=round(min(peer_rate), 4), peer_high=round(max(peer_rate), 4),
            **more),
    ]  # fmt: skip


def p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


def version_of(program: Path) -> str:
    told = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True)
    return next(line for line in (told.stderr + told.stdout).splitlines() if line.startswith("version"))


if __name__ == "__main__":
    main()
