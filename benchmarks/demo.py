"""The demonstration on several seeds, with the control arms that tell learning from noise.

    python benchmarks/demo.py [--seeds 0 1 2] [--runs runs/bench-demo] [--out benchmarks/results/demo.json]

Each seed runs `kogia demo` in a process of its own. For the seeds in --control-seeds, from the same cold start:
  random reward   the same GRPO with the rewards of each group shuffled among its samples: must not improve
  SFT continued   more cold-start fine-tuning on as many tokens as GRPO sampled
and on the final model, greedy decoding with and without multi-token-prediction drafts: equal output, acceptance, speed.
Interrupted, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from result import row, write_result

from kogia.checkpoint.hf import load_model, resolve_model_dir
from kogia.config import save_toml
from kogia.demo.config import RECIPES, DemoConfig
from kogia.demo.run import eval_config, recipe
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.eval.summary import compare, read_samples
from kogia.log import read_metrics
from kogia.rl.config import RLConfig
from kogia.tasks.task import load_task
from kogia.text.chat import render_prompt
from kogia.text.tokenizer import Tokenizer
from kogia.train.config import SupervisedConfig

SPEED_PROMPTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-demo"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo.json"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        out = args.runs / f"seed{seed}"
        command("demo", "--out", str(out), "--seed", str(seed), "--threads", str(args.threads), "--quiet")
        rows += demo_rows(out, seed)
        if seed in args.control_seeds:
            rows += control_rows(out, seed, args.threads)
        rows += speed_rows(out, seed, args.threads)
        write_result(args.out, "demo", [*headline(rows), *rows])
    print(json.dumps(rows, indent=1))


def headline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures a reader looks for first: the mean over seeds, with the smallest and largest as low and high."""
    found = []
    for id in ("seconds", "peak-gib", "mtp-acceptance", "mtp-speedup", "random-reward-points", "sft-continued-points"):
        each = [r for r in rows if r["id"].startswith(f"demo-{id}-seed")]
        if each:
            values = [r["value"] for r in each]
            mean = sum(values) / len(values)
            limit = {"limit": each[0]["limit"]} if "limit" in each[0] else {}
            found.append(row(f"demo-{id}", mean, each[0]["unit"], low=min(values), high=max(values), **limit))
    return found


def command(*arguments: str) -> None:
    """Run a kogia command; stops the benchmark if it fails."""
    subprocess.run(
        [sys.executable, "-c", "import sys; from kogia.cli import main; sys.exit(main())", *arguments], check=True
    )


def demo_rows(out: Path, seed: int) -> list[dict[str, Any]]:
    """Lifts, times and memory of one finished demonstration."""
    summary = json.loads((out / "summary.json").read_text())
    stages = {stage["name"]: stage for stage in summary["stages"]}
    cold, grpo = stages["cold_start"], stages["grpo"]
    lift = compare(samples(out / "cold_start"), samples(out / "grpo"))
    rows = [
        points(f"demo-lift-points-seed{seed}", lift["pass@1"], overlap=overlap(cold["pass@1"], grpo["pass@1"])),
        points(f"demo-greedy-lift-points-seed{seed}", lift["greedy"]),
        row(f"demo-seconds-seed{seed}", summary["seconds"], "s", limit=540),
        row(f"demo-peak-gib-seed{seed}", summary["peak_memory_bytes"] / 2**30, "GiB", limit=3),
    ]
    for name, stage in stages.items():
        for score in ("pass@1", "pass@8", "greedy"):
            mean, low, high = (100 * x for x in stage[score])
            rows.append(row(f"demo-{name}-{score}-seed{seed}", mean, "%", low=low, high=high))
        shares = [s for s in ("truncated", "false_claim", "give_up", "claims_verified") if stage[s] is not None]
        rows += [row(f"demo-{name}-{share}-seed{seed}", 100 * stage[share], "%") for share in shares]
        rows.append(row(f"demo-{name}-think-tokens-seed{seed}", stage["think_tokens"], "tokens"))
    gap = compare(samples(out / "rejection_sft"), samples(out / "student"))["pass@1"]
    return [*rows, points(f"demo-student-minus-teacher-points-seed{seed}", gap)]


def control_rows(out: Path, seed: int, threads: int) -> list[dict[str, Any]]:
    """GRPO on rewards without information, and fine-tuning continued for as many tokens as GRPO sampled."""
    demo = DemoConfig(out=str(out), seed=seed, threads=threads)
    rl = recipe(demo, "grpo", RLConfig)
    run_stage("rl", rl, out / "random_reward", {"random_reward": "permute", "signal_check": False})
    sampled = sum(m["completion_tokens"] for m in read_metrics(out / "grpo")) * rl.prompts_per_step * rl.group_size
    sft = recipe(demo, "cold_start", SupervisedConfig)
    steps = max(1, round(sampled / sft.data.batch_tokens))
    changes = {"init": str(out / "cold_start"), "steps": steps, "seed": sft.seed + 1}
    run_stage("sft", sft, out / "sft_continued", changes)
    rows = []
    suffix = f"-seed{seed}"
    for name, run in (("random-reward", "random_reward"), ("sft-continued", "sft_continued")):
        file = out / f"{run}.eval.toml"
        save_toml(eval_config(demo, out / run), file)
        command("eval", str(file))
        change = compare(samples(out / "cold_start"), samples(out / run))
        rows.append(points(f"demo-{name}-points{suffix}", change["pass@1"]))
        rows.append(points(f"demo-{name}-greedy-points{suffix}", change["greedy"]))
    return rows


def run_stage(name: str, config: Any, out: Path, changes: dict[str, Any]) -> None:
    """A stage with changed settings, resumed if it was begun."""
    file = out.with_name(out.name + ".toml")
    save_toml(replace(config, out=str(out), resume=out.exists(), **changes), file)
    command(name, str(file))


@torch.no_grad()
def speed_rows(out: Path, seed: int, threads: int) -> list[dict[str, Any]]:
    """Greedy decoding of the final model one prompt at a time, with and without a drafted token per step."""
    torch.set_num_threads(threads)
    directory = resolve_model_dir(out / "rejection_sft")
    tokenizer, model = Tokenizer.load(directory), load_model(directory)
    rl = recipe(DemoConfig(out=str(out), seed=seed), "grpo", RLConfig)
    problems = load_task(rl.tasks[0], rl.task_options.get(rl.tasks[0])).problems("test")[:SPEED_PROMPTS]
    prompts = [render_prompt(problem.messages, tokenizer).token_ids for problem in problems]
    params = SamplingParams(temperature=0.0, max_tokens=rl.max_tokens)
    tokens: dict[int, list[list[int]]] = {}
    rates: dict[int, list[float]] = {0: [], 1: []}
    acceptance = 0.0
    for repeat in range(3 + 1):  # the first is a warm-up
        for drafts in (0, 1):
            engine = Engine(model, tokenizer, EngineConfig(num_draft_tokens=drafts, num_blocks=256, prefix_cache=False))
            start = time.perf_counter()
            answers = [engine.generate([prompt], params)[0][0] for prompt in prompts]
            seconds = time.perf_counter() - start
            tokens[drafts] = [answer.token_ids for answer in answers]
            acceptance = engine.stats.acceptance
            if repeat:
                rates[drafts].append(sum(map(len, tokens[drafts])) / seconds)
    speedups = [with_draft / without for without, with_draft in zip(rates[0], rates[1], strict=True)]
    same = sum(a == b for a, b in zip(tokens[0], tokens[1], strict=True)) / len(prompts)
    middle = sorted(speedups)[len(speedups) // 2]
    return [
        row(f"demo-mtp-acceptance-seed{seed}", acceptance, "share"),
        row(f"demo-mtp-speedup-seed{seed}", middle, "x", low=min(speedups), high=max(speedups)),
        row(f"demo-mtp-identical-greedy-seed{seed}", same, "share", limit=1),
    ]


def samples(run: Path) -> list[dict[str, Any]]:
    return read_samples(run / "evals" / "heldout.jsonl")


def points(id: str, difference: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """A paired difference in percentage points."""
    mean, low, high = (100 * value for value in difference["difference"])
    return row(id, mean, "points", low=low, high=high, **extra)


def overlap(before: list[float], after: list[float]) -> bool:
    """Whether the two 95% intervals touch."""
    return before[2] >= after[1]


if __name__ == "__main__":
    assert RECIPES.is_dir()
    main()
