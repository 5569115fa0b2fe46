"""The engine on two GPUs of one host beside the same on one: `decode-2gpu-ratio`.

    python benchmarks/engine_gpu_tp.py [--out benchmarks/results/engine_gpu_tp.json]

The model of engine_gpu.py: DeepSeek-V2-Lite's shape, random bf16 weights of standard deviation 0.02. Decode: 128 tokens
behind prompts of 512, less the time of 1, medians of three; all engines with recorded graphs, one after the other on
the same machine. `tensor` splits each expert's width, `expert` the experts by number. Beside it what the sums of a
layer take by themselves, and how far log-probabilities of greedy tokens are from one GPU's.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
SHARED = ("tensor", "expert")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 1, 16, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--ways", nargs="*", default=SHARED, choices=SHARED)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--profile", type=int, metavar="BATCH", help="kernels of one decode step on the first of two")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sums", nargs=2, metavar=("RANK", "PLACE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sums is not None:
        return time_sums(int(args.sums[0]), args.gpus, args.sums[1], lambda row: print(json.dumps(row), flush=True))
    from engine_gpu import build_engine, copy_rate, decode, prefill, profile, v2_lite
    from result import row, write_result

    rows: list[dict[str, Any]] = []

    def say(id: str, value: float, unit: str, **extra: Any) -> None:
        rows.append(row(id, value, unit, **extra))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            write_result(args.out, "engine on two GPUs", rows)

    def measure(name: str, engine: Any) -> dict[int, float]:
        speeds = {}
        for batch in args.batches:
            values = [decode(engine, batch)[0] for _ in range(args.rounds)]
            speeds[batch] = median(values)
            say(f"decode-{name}-b{batch}", speeds[batch], "tokens/s", low=min(values), high=max(values))
        values = [prefill(engine, 32, 512) for _ in range(args.rounds)]
        say(f"prefill-{name}", median(values), "tokens/s", low=min(values), high=max(values))
        return speeds

    for id, value in sums_apart(args.gpus):
        say(id, value, "us")
    say("copy-tbps", copy_rate(), "TB/s")
    model = v2_lite(args.layers)
    config = model.config
    engine = build_engine(model)
    one, want = measure("1gpu", engine), greedy(engine)
    del engine, model
    gc.collect()
    torch.cuda.empty_cache()
    for way in args.ways:
        engine = open_engine(config, args.gpus, way == "expert")
        speeds = measure(f"{args.gpus}gpu-{way}", engine)
        for batch, speed in speeds.items():
            say(f"decode-{args.gpus}gpu-ratio-{way}-b{batch}", speed / one[batch], "ratio")
        share, gap = beside(greedy(engine), want)
        say(f"same-tokens-{way}", share, "share", gap=round(gap, 4))
        if args.profile is not None:
            profile(engine, args.profile)
        engine.close()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    ratios = {r["id"]: r["value"] for r in rows}
    best = max(args.ways, key=lambda way: ratios.get(f"decode-{args.gpus}gpu-ratio-{way}-b64", 0.0))
    if f"decode-{args.gpus}gpu-ratio-{best}-b64" in ratios:
        say(f"decode-{args.gpus}gpu-ratio", ratios[f"decode-{args.gpus}gpu-ratio-{best}-b64"], "ratio", way=best)


def open_engine(config: Any, gpus: int, whole_experts: bool) -> Any:
    from kogia.engine.config import EngineConfig
    from kogia.inference.parallel import DrawnModel, open_parallel

    engine = EngineConfig(
        block_size=64, num_blocks=5000, max_sequences=256, max_batch_tokens=16384, prefix_cache=False
    )  # as engine_gpu's
    return open_parallel(DrawnModel(config, torch.bfloat16), engine, gpus, device="cuda", whole_experts=whole_experts)


def greedy(engine: Any) -> list[Any]:
    from dataclasses import replace

    from engine_gpu import params_of, prompts_of

    prompts = [prompt[: 40 + 37 * i] for i, prompt in enumerate(prompts_of(9, 512))]
    return [c[0] for c in engine.generate(prompts, replace(params_of(24), logprobs=True))]


def beside(found: list[Any], want: list[Any]) -> tuple[float, float]:
    """(share of equal tokens before the first that differs, mean gap of their log-probabilities in nats)."""
    gaps, total = [], 0
    for a, b in zip(found, want, strict=True):
        total += len(b.token_ids)
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), len(b.token_ids))
        gaps += [abs(x - y) for x, y in zip(a.logprobs[:same], b.logprobs[:same])]
    return len(gaps) / total, sum(gaps) / max(1, len(gaps))


def sums_apart(gpus: int) -> list[tuple[str, float]]:
    """Microseconds of a sum in a recorded graph, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "ranks")
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--gpus", str(gpus), "--sums", str(rank), place],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(gpus)
        ]
        printed, _ = ranks[0].communicate()
        for rank in ranks:
            rank.wait()
    return [tuple(json.loads(line)) for line in printed.splitlines() if line.startswith("[")]


def time_sums(rank: int, size: int, place: str, say: Callable[[Any], None]) -> None:
    from kogia.distributed.group import join

    group = join(rank, size, place, "cuda")
    for kib in (4, 64, 256, 1024):
        x = torch.ones(kib << 9, dtype=torch.bfloat16, device=group.device)
        found = group.total(x.clone())
        assert bool((found == size).all()), f"{kib} KiB: {found}"
        say((f"sum-nccl-{kib}k", graph_time(group, x)))


def graph_time(group: Any, x: torch.Tensor, repeats: int = 50) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            group.total(x)
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times) / repeats * 1000


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
