"""Host time of a decode step: planning, packing, launching and settling, with a device that costs nothing.

    python benchmarks/host_time.py [--batches 1 64 256] [--rounds 5] [--profile] [--gpu LAYERS]
                                   [--peer EARLIER.json] [--out benchmarks/results/host_time.json]

The graphs of the steps are replaced by ones that do nothing, so that what is left is the host's; the microseconds of
launching a graph itself are not in it. Beside each figure stands that of a host whose caches are cold: in place of the
model's part 64 MiB are read, as weights would be on a CPU, which takes no part in the time. Every row decodes one token
a step, drawn at temperature 1; in the rows "heard" each has a listener who gets its tokens. --peer names an earlier
result, whose figures stand beside. Figures are medians of rounds, with the least and the greatest, and so are the
phases, which are timed in rounds of their own; with --profile, what takes the time.

With --gpu nothing is replaced: the model is that of engine_gpu.py with so many layers, and what the host waits for the
device is a phase of its own, "wait", which is not in the figure.
"""

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from result import row, write_result

ROOT = Path(__file__).parent.parent
COLD_BYTES = 64 << 20


class Idle:
    """Stands for a recorded step. It may stream through the caches, which is taken off the time."""

    weights = np.zeros(0)
    seconds = 0.0

    def replay(self) -> None:
        if len(Idle.weights):
            started = time.perf_counter()
            Idle.weights.sum()
            Idle.seconds += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--gpu", type=int, metavar="LAYERS")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    peer = {} if args.peer is None else {row["id"]: row["value"] for row in json.loads(args.peer.read_text())["rows"]}

    def say(name: str, engine: Any, batch: int) -> None:
        found = measured(name, engine, batch, args.rounds, args.steps)
        rows.append(found | ({"peer": peer[name]} if name in peer else {}))
        print(rows[-1], flush=True)

    for batch in args.batches:
        engine = idle_engine(batch) if args.gpu is None else gpu_engine(batch, args.gpu)
        step_seconds(engine, 30)
        say(f"host-b{batch}", engine, batch)
        if args.profile:
            profile(engine, args.steps)
        if args.gpu is None:
            Idle.weights = np.zeros(COLD_BYTES // 4, dtype=np.float32)
            say(f"host-b{batch}-cold", engine, batch)
            Idle.weights = np.zeros(0)
            engine = idle_engine(batch, stream=True)
            step_seconds(engine, 30)
            say(f"host-b{batch}-heard", engine, batch)
    if args.out:
        write_result(args.out, "host_time", rows)


def measured(id: str, engine: Any, batch: int, rounds: int, steps: int) -> dict[str, Any]:
    """Microseconds of a step; the extra fields are those of its phases and of a row of the batch."""
    phases = [phase_seconds(engine, steps) for _ in range(rounds)]
    shares = {name: round(1e6 * median(each[name] for each in phases), 1) for name in phases[0]}
    waits = shares["wait"] if engine.model.device.type == "cuda" else 0.0
    found = [1e6 * median(step_seconds(engine, steps)) - waits for _ in range(rounds)]
    return row(
        id, median(found), "us", low=min(found), high=max(found), per_row=round(median(found) / batch, 2), phases=shares
    )


def step_seconds(engine: Any, steps: int) -> list[float]:
    """Of each step, without what stands for the model's part."""
    found = []
    for _ in range(steps):
        Idle.seconds, started = 0.0, time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - started - Idle.seconds)
    return found


def phase_seconds(engine: Any, steps: int) -> dict[str, float]:
    """Medians of the steps: what the parts of `Engine.step` take, and the rest of it."""
    from kogia.engine.runner import Flight

    found: dict[str, list[float]] = defaultdict(list)
    places = ((engine.scheduler, "plan"), (engine.runner, "launch"), (Flight, "wait"), (engine.scheduler, "settle"))
    inside = ((type(engine.runner.graphs), "run"), (type(engine.runner.graphs), "draw"))
    before = [getattr(owner, name) for owner, name in (*places, *inside)]
    for (owner, name), work in zip((*places, *inside), before, strict=True):
        setattr(owner, name, _timed(work, found[name]))
    found["step"] = step_seconds(engine, steps)
    for (owner, name), work in zip((*places, *inside), before, strict=True):
        setattr(owner, name, work)
    medians = {name: median(seconds) for name, seconds in found.items()}
    return medians | {"rest": medians["step"] - sum(medians[name] for _, name in places)}


def _timed(work: Callable[..., Any], found: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        idle, started = Idle.seconds, time.perf_counter()
        result = work(*args, **kwargs)
        found.append(time.perf_counter() - started - (Idle.seconds - idle))
        return result

    return timed


def profile(engine: Any, steps: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def idle_engine(batch: int, *, stream: bool = False) -> Any:
    """An engine with `batch` sequences under way, whose steps take the path of recorded ones without a model."""
    from kogia.engine import engine as engine_module
    from kogia.engine import graphs
    from kogia.engine.config import EngineConfig
    from kogia.engine.request import SamplingParams
    from kogia.model.config import MLAConfig, ModelConfig
    from kogia.model.transformer import build_model

    mla = MLAConfig(num_heads=1, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    config = ModelConfig(
        vocab_size=64, dim=16, num_layers=1, ffn_dim=16, attention=mla, moe=None, max_position=4096, init_std=0.2
    )

    def run_once(_: Any, work: Callable[[], Any]) -> Idle:
        work()
        return Idle()

    recorder: Any = graphs.Recorder
    recorder.capture = run_once
    graphs.recorded_sizes = lambda most, *_: list(range(1, most + 1))
    engine_module.why_not = lambda *_: None
    settings = EngineConfig(block_size=64, num_blocks=10000, max_sequences=256, max_batch_tokens=32768, overlap=True)
    engine = engine_module.Engine(build_model(config, dtype=torch.bfloat16), None, settings)
    params = SamplingParams(temperature=1.0, max_tokens=3990, ignore_eos=True, seed=1)
    for index in range(batch):
        engine.add([5 + index % 40] * 100, params, stream=stream)
    return engine


def gpu_engine(batch: int, layers: int) -> Any:
    from engine_gpu import build_engine, params_of, prompts_of, v2_lite

    engine = build_engine(v2_lite(layers))
    for prompt in prompts_of(batch, 512):
        engine.add(prompt, params_of(3000, 1.0))
    return engine


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
