"""What pinning the threads of a decode step to cores gives, alone and beside a program that keeps one core busy.

    python benchmarks/cores.py [--rounds 5] [--out benchmarks/results/cores.json]

The model of benchmarks/engine_cpu.py in bfloat16, batch 1, tokens per second by the wall clock, each measurement in a
process of its own. `free`: the kernel of the system places the threads. `kept`: all threads stay on the cores given
(--cores), and may change places among them. `bound`: OpenMP binds each thread to a core of its own
(OMP_PROC_BIND=true). The busy program multiplies numbers on whatever core it is given; with two threads it competes
with them for two cores, with one thread kept to core 1 it is free to take core 0.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from kogia.cores import keep_to_cores

HERE = Path(__file__).parent
PLACES: dict[str, tuple[list[str], dict[str, str]]] = {
    "free": ([], {}),
    "kept": (["--cores", "{cores}"], {}),
    "bound": (["--cores", "{cores}"], {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}),
}
CORES = {1: "1", 2: "0-1"}
TOKENS = 96
BUSY = "x = 1\nwhile True: x = x * 3 % 1000003"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results/cores.json")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(speed(args.child, args.cores)))
    from result import row, write_result  # with torch, which a child loads once its cores are settled

    found: dict[tuple[int, str, bool], list[float]] = {}
    for _ in range(args.rounds):
        for busy in (False, True):
            for threads in CORES:
                for place in PLACES:
                    with busy_program(busy):
                        found.setdefault((threads, place, busy), []).append(child(threads, place))
    rows = [
        row(
            f"{threads}-{place}{'-busy' if busy else ''}", median(speeds), "tokens/s", low=min(speeds), high=max(speeds)
        )
        for (threads, place, busy), speeds in found.items()
    ]
    print(json.dumps(rows, indent=1))
    write_result(args.out, "cores", rows)


def child(threads: int, place: str) -> float:
    flags, variables = PLACES[place]
    words = [sys.executable, __file__, "--child", str(threads), *(flag.format(cores=CORES[threads]) for flag in flags)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    return json.loads(subprocess.run(words, env=inherited | variables, check=True, stdout=subprocess.PIPE).stdout)


@contextmanager
def busy_program(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            yield
        finally:
            process.kill()


def speed(threads: int, cores: str | None) -> float:
    """Tokens per second of one sequence, behind a warm-up."""
    if cores is not None:
        keep_to_cores(cores)
    import torch
    from engine_cpu import SMALL

    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine
    from kogia.engine.request import SamplingParams
    from kogia.model.transformer import build_model

    torch.set_num_threads(threads)
    engine = Engine(build_model(SMALL, dtype=torch.bfloat16), None, EngineConfig(num_blocks=64, prefix_cache=False))
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    engine.generate([[5] * 8], params)
    started = time.perf_counter()
    engine.generate([[5] * 8], params)
    return TOKENS / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
