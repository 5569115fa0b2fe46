"""Decoding and training on the CPU beside an earlier commit of this repository, in one run.

    python benchmarks/seams.py [--base 711fa00] [--rounds 7] [--out benchmarks/results/seams.json]
    python benchmarks/seams.py --demo 0 [--scale 0.2] [--out benchmarks/results/seams_demo.json]

Both sides run the demonstration's model on one thread, in processes of their own that alternate; the earlier commit
comes from a temporary worktree. A round is one process of each side, and its ratio is that of the two. Time is the
process's own CPU time, so that another program on the machine costs both sides what it costs. The value is the median
of the rounds, low and high are the smallest and largest. `seams-pretrain-ratio` is what a user waits for: time on the
wall with the machine's threads, which wait as each commit's command line has them wait; it needs an idle machine.

With --demo SEED... whole demonstrations are measured instead, both commits' at the same time, each on a core of its own
with one thread: `seams-demo-ratio` is the earlier commit's CPU seconds over ours, of all processes of each, with the
seconds on the wall of every stage beside it. Random weights differ between the two, so learning does, and with it the
length of the sampled answers; the final score of both is beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
LIMIT = 1.0
WORK = {
    "seams-decode-ratio": ("decode", 64, 0),
    "seams-decode-b1-ratio": ("decode", 1, 0),
    "seams-decode-b16-ratio": ("decode", 16, 0),
    "seams-decode-b400-ratio": ("decode", 400, 0),
    "seams-decode-draft-ratio": ("decode", 1, 1),
    "seams-train-ratio": ("train", 30, 0),
    "seams-pretrain-ratio": ("pretrain", 60, 0),
}
"""Id -> what is done, sequences or steps, drafts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="711fa00", help="the commit to compare with, or its checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="default: seams.json or seams_demo.json")
    parser.add_argument("--demo", type=int, nargs="+", metavar="SEED", help="measure whole demonstrations instead")
    parser.add_argument("--scale", type=float, default=1.0, help="of the demonstrations: 0.2 is a fifth of the steps")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(*json.loads(args.child))))
        return
    from result import row, write_result

    rows = []
    with worktree(args.base) as base:
        words = ["git", "rev-parse", "--short=7", "HEAD"]
        commit = subprocess.run(words, cwd=base, check=True, capture_output=True, text=True).stdout.strip()
        if args.demo is not None:
            for seed in args.demo:
                rows.append(demo_row(base, seed, args.scale))
                print(rows[-1], file=sys.stderr)
                write_result(args.out or RESULTS / "seams_demo.json", f"demonstration, beside {commit}", rows)
            return
        for id, work in WORK.items():
            pairs = [(child(ROOT, work), child(base, work)) for _ in range(args.rounds + 1)][1:]  # the first warms up
            ratios = [ours / theirs for ours, theirs in pairs]
            unit = "tokens_per_second" if work[0] == "pretrain" else "tokens_per_cpu_second"
            speeds = {
                unit: round(median(p[0] for p in pairs), 1),
                f"base_{unit}": round(median(p[1] for p in pairs), 1),
            }
            rows.append(row(id, median(ratios), "ratio", low=min(ratios), high=max(ratios), limit=LIMIT, **speeds))
            print(rows[-1], file=sys.stderr)
            write_result(
                args.out or RESULTS / "seams.json", f"seams, beside {commit}", rows
            )  # after each: what is measured is not lost


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of `commit` beside this one, for as long as the block runs; a directory is one already."""
    if Path(commit).is_dir():
        yield Path(commit).resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(place), commit], cwd=ROOT, check=True)
        try:
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(place)], cwd=ROOT, check=True)


def child(checkout: Path, work: tuple[str, int, int]) -> float:
    """Tokens per second, measured by a process that imports kogia from `checkout`."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"PYTHONPATH": str(checkout)}
    if work[0] != "pretrain":
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(work)]
    done = subprocess.run(command, env=env, cwd=checkout, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def demo_row(base: Path, seed: int, scale: float) -> dict[str, Any]:
    """Both demonstrations side by side."""
    from result import row

    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        places = ((base, cores[0], "base"), (ROOT, cores[-1], "ours"))
        started = [start_demo(checkout, Path(scratch) / name, seed, scale, core) for checkout, core, name in places]
        (theirs, base_stages, base_score), (ours, stages, score) = (finish_demo(*each) for each in started)
    seconds = {"cpu_seconds": round(ours, 1), "base_cpu_seconds": round(theirs, 1)}
    found = {"stages": stages, "base_stages": base_stages, "greedy": score, "base_greedy": base_score}
    id = f"seams-demo-ratio-seed{seed}" if scale == 1 else f"seams-demo-ratio-scale{scale:g}-seed{seed}"
    return row(id, theirs / ours, "ratio", limit=LIMIT, **seconds, **found)


def start_demo(checkout: Path, out: Path, seed: int, scale: float, core: int) -> tuple[subprocess.Popen[bytes], Path]:
    """`kogia demo` from `checkout` on one core."""
    run = "import sys; from kogia.cli import main; sys.exit(main())"
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), env.get("PYTHONPATH")]))}
    demo = ["demo", "--out", str(out), "--seed", str(seed), "--scale", str(scale), "--threads", "1", "--quiet"]
    command = ["taskset", "-c", str(core), sys.executable, "-c", run, *demo]
    return subprocess.Popen(command, env=env, cwd=out.parent, stdout=subprocess.DEVNULL), out


def finish_demo(process: subprocess.Popen[bytes], out: Path) -> tuple[float, dict[str, float], float]:
    """CPU seconds of it and its children, seconds on the wall of its stages, and the final greedy score."""
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"a demonstration ended with status {status}; its files were in {out}")
    kept = json.loads((out / "stages.json").read_text(encoding="utf-8"))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    stages = {
        name: round(kept[name]["seconds"], 1) for name in kept if isinstance(kept[name], dict) and "done" in kept[name]
    }
    return used.ru_utime + used.ru_stime, stages, summary["stages"][-1]["greedy"][0]


def measure(kind: str, amount: int, drafts: int) -> float:
    """In the child. Uses only what both commits have."""
    import time

    import kogia  # noqa: F401

    if "GOMP_SPINCOUNT" not in os.environ:  # the earlier commit's command line said so before torch was loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if kind == "pretrain":
        return train(amount, time.perf_counter)
    torch.set_num_threads(1)
    return decode(amount, drafts) if kind == "decode" else train(amount, time.process_time)


def recipe(name: str) -> dict[str, Any]:
    import tomllib

    import kogia

    return tomllib.loads((Path(kogia.__file__).parent / "recipes/demo" / f"{name}.toml").read_text(encoding="utf-8"))


def decode(num_sequences: int, drafts: int, num_tokens: int = 64) -> float:
    """Tokens per CPU second of a whole `generate`, prompts of 20 tokens included."""
    import time

    from kogia.config import from_dict
    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine
    from kogia.engine.request import SamplingParams
    from kogia.model.config import ModelConfig
    from kogia.model.transformer import build_model

    model = build_model(from_dict(ModelConfig, recipe("pretrain")["model"], "model"))
    prompts = [[3 + (7 * i + j) % 500 for j in range(20)] for i in range(num_sequences)]
    params = SamplingParams(temperature=1.0, max_tokens=num_tokens, seed=1, ignore_eos=True)
    engine = Engine(model, None, EngineConfig(block_size=4, max_sequences=400, num_draft_tokens=drafts))
    engine.generate(prompts[:8], params)
    repeats = max(1, min(20, 200 // num_sequences))
    start = time.process_time()
    for _ in range(repeats):
        engine.generate(prompts, params)
    return repeats * num_sequences * num_tokens / (time.process_time() - start)


def train(num_steps: int, clock: Callable[[], float]) -> float:
    """Median over the steps of tokens per second of `clock` in the pretraining of the demonstration."""
    from kogia.config import from_dict
    from kogia.train import supervised
    from kogia.train.config import SupervisedConfig

    with tempfile.TemporaryDirectory() as out:
        data = recipe("pretrain") | {"out": f"{out}/run", "steps": num_steps, "quiet": True, "device": "cpu"}
        data["data"]["sources"][0]["num"] = 2000
        run = supervised.build_run(from_dict(SupervisedConfig, data, "pretrain"))
        step, seconds = supervised.train_step, []

        def timed(state: Any, batches: Any, loss: Any) -> dict[str, float]:
            start = clock()
            metrics = step(state, batches, loss)
            tokens = sum(batch.tokens.num_tokens for batch in batches)
            seconds.append(tokens / (clock() - start))
            return metrics

        supervised.train_step = timed
        supervised.train(run)
    return median(seconds[3:])


if __name__ == "__main__":
    main()
