"""What `kogia pretrain --dry-run` predicts of a step, beside steps of the run itself: time and peak memory.

    python benchmarks/dry_run.py [--device cpu] [--rounds 3] [--steps 8] [--shapes NAME ...] [--out RESULT.json]

Every prediction and every run is a process of its own, and they take turns. A prediction is that of the dry run, from
steps of shallow models. A run is whole optimiser steps on random tokens, as in the prediction; its figure is the median
of `--steps` steps behind three that are not counted. A shape's figure is the median ratio of the rounds, with the least
and the largest. Memory is what PyTorch allocates at the peak, on a GPU alone; beside it stands what is counted without
a device. On a CPU one thread is at work, and its CPU seconds stand for those of the clock, which other work on the
machine adds to. Within 15% is wanted, of every shape.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
WARM_UP = 3
LIMIT = 0.15
SHAPES = {
    "cuda": ("1.2b-a0.24b", "dense-0.5b", "nano-base"),
    "cpu": ("small-mixtures", "small-dense", "small-half"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", choices=[name for names in SHAPES.values() for name in names])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/dry_run.json, or dry_run_cpu.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        what, name, device, steps = json.loads(args.child)
        if device == "cpu":
            time.perf_counter = time.process_time
        print(json.dumps((predicted if what == "predict" else measured)(name, device, steps)))
        return
    from result import write_result

    out = args.out or ROOT / "benchmarks/results" / ("dry_run.json" if args.device == "cuda" else "dry_run_cpu.json")
    rows: list[dict[str, Any]] = []
    for name in args.shapes or SHAPES[args.device]:
        turns = [
            {what: child([what, name, args.device, args.steps]) for what in ("predict", "run")}
            for _ in range(args.rounds)
        ]
        rows += figures(name, [turn["predict"] for turn in turns], [turn["run"] for turn in turns])
        print("\n".join(json.dumps(each) for each in rows if name in each["id"]), flush=True)
        write_result(out, "dry runs", [*rows, *worst(rows)])
    for each in worst(rows):
        print(json.dumps(each), flush=True)


def child(work: list[Any]) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def figures(name: str, predicted: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of the predicted over the measured."""
    from result import row

    steps = [median(each["seconds"]) for each in measured]
    ratios = [each["seconds"] / step for each, step in zip(predicted, steps, strict=True)]
    time_row = row(
        f"dry-run-{name}-time", median(ratios), "ratio", low=min(ratios), high=max(ratios),
        predicted_s=[round(each["seconds"], 4) for each in predicted], measured_s=[round(step, 4) for step in steps],
        tokens=measured[0]["tokens"], took_s=round(median(each["took_s"] for each in predicted), 1),
        trial_tokens=[each["trial_tokens"] for each in predicted],
    )  # fmt: skip
    if predicted[0]["memory"] is None:
        return [time_row]
    gib = {f"{key}_gib": round(median(each[key] for each in predicted) / 2**30, 2) for key in ("memory", "counted")}
    gib["measured_gib"] = round(median(each["memory"] for each in measured) / 2**30, 2)
    ratios = [each["memory"] / run["memory"] for each, run in zip(predicted, measured, strict=True)]
    return [
        time_row,
        row(f"dry-run-{name}-memory", median(ratios), "ratio", low=min(ratios), high=max(ratios), **gib),
    ]


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from result import row

    found = []
    for what in ("time", "memory"):
        errors = [abs(each["value"] - 1) for each in rows if each["id"].endswith(f"-{what}")]
        if errors:
            found.append(row(f"dry-run-{what}-error", max(errors), "largest share", limit=LIMIT))
    return found


def config_of(name: str, device: str) -> Any:
    from kogia.config import load_toml
    from kogia.data.config import DataConfig
    from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
    from kogia.train.config import OptimConfig, SupervisedConfig

    optim = OptimConfig(lr=1e-4)
    if name == "nano-base":
        recipe = load_toml(ROOT / "reproductions/kogia-nano/base.toml", SupervisedConfig)
        return replace(recipe, device=device)
    if name == "1.2b-a0.24b":
        attention = MLAConfig(
            num_heads=8, q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        )
        moe = MoEConfig(num_experts=64, num_shared_experts=1, topk=6, expert_dim=512, num_dense_layers=1)
        model = ModelConfig(32000, 1024, 12, 4096, attention=attention, moe=moe)
        data = DataConfig(batch_tokens=16 * 4096, max_seqlen=4096)
        return SupervisedConfig("", model=model, data=data, optim=optim, dtype="bfloat16", steps=1000, device=device)
    if name == "dense-0.5b":
        attention = GQAConfig(num_heads=20, num_kv_heads=4, head_dim=64)
        model = ModelConfig(32000, 1280, 24, 3456, attention=attention, moe=None, tie_embeddings=True)
        run = SupervisedConfig("", model=model, optim=optim, dtype="bfloat16", steps=1000, device=device)
        return replace(run, data=DataConfig(batch_tokens=16 * 2048, max_seqlen=2048), micro_batches=2)
    moe = MoEConfig(num_experts=16, topk=4, expert_dim=64)
    shape = ModelConfig(vocab_size=1024, dim=128, num_layers=6, ffn_dim=384, moe=moe)
    small = SupervisedConfig("", optim=optim, steps=1000, device=device, threads=1)
    small = replace(small, data=DataConfig(batch_tokens=2048, max_seqlen=256))
    if name == "small-mixtures":
        return replace(small, model=replace(shape, num_mtp_layers=1))
    if name == "small-dense":
        dense = replace(shape, num_layers=8, attention=GQAConfig(num_heads=4, num_kv_heads=2), moe=None)
        return replace(small, model=dense, micro_batches=2)
    muon = OptimConfig(lr=1e-3, kind="muon", moments="bfloat16")
    return replace(small, model=replace(shape, num_layers=4), dtype="bfloat16", optim=muon, recompute="layer")


def predicted(name: str, device_name: str, steps: int) -> dict[str, Any]:
    import torch

    from kogia.model.costs import train_memory
    from kogia.train.precision import memory_settings
    from kogia.train.supervised import forecast_step

    config, device = config_of(name, device_name), torch.device(device_name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    found = forecast_step(config, config.model, device)
    counted = train_memory(config.model, config.data.batch_tokens, **memory_settings(config, config.optim)).total
    return {
        "seconds": found.seconds,
        "memory": found.memory,
        "counted": counted,
        "trial_tokens": found.tokens,
        "took_s": time.perf_counter() - began,
    }


def measured(name: str, device_name: str, steps: int) -> dict[str, Any]:
    import torch

    from kogia.model.transformer import build_model
    from kogia.ops.cpu import pages
    from kogia.ops.machine import finish, peak_memory
    from kogia.train.forecast import random_batch
    from kogia.train.optim import build_optimizer
    from kogia.train.precision import multiply_in
    from kogia.train.step import TrainState, train_step
    from kogia.train.supervised import loss_for_step

    config, device = config_of(name, device_name), torch.device(device_name)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pages.keep_freed()
    before = peak_memory(device)
    model = build_model(config.model, device=device, dtype=getattr(torch, config.dtype))
    optimizer = build_optimizer(model, config.optim)
    multiply_in(config, model)
    state = TrainState(model, optimizer, config.optim, WARM_UP + steps)
    rows = [config.data.longest] * (config.data.batch_tokens // config.data.longest)
    seconds = []
    for i in range(WARM_UP + steps):
        batches = [random_batch(config.model.vocab_size, rows, device) for _ in range(config.micro_batches)]
        if i == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        finish(device)
        began = time.perf_counter()
        train_step(state, batches, loss_for_step(config, state, batches))
        finish(device)
        seconds.append(time.perf_counter() - began)
    tokens = config.micro_batches * config.data.batch_tokens
    return {"seconds": seconds[WARM_UP:], "memory": peak_memory(device) - before, "tokens": tokens}


if __name__ == "__main__":
    main()
