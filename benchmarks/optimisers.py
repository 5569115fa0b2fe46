"""Muon beside AdamW: the loss per token of the demonstration's base model, on a CPU.

    python benchmarks/optimisers.py [--steps 300] [--batch-tokens 4096] [--seeds 5]
        [--out benchmarks/results/optimisers.json]

Both train the same model on the same tokens in the same order from the same weights, for every seed (which sets order
and weights). The peak rate of each is the best of a grid, chosen by seed 0, which is not among the seeds that are
measured; an end of the grid that wins is said. `muon-loss-gap` is the mean over seeds of the difference of validation
losses in nats, Muon's minus AdamW's, with the 95% interval of paired differences (Student's t). `muon-tokens-ratio` is
the share of the tokens after which Muon has AdamW's last loss, read off its validation losses, which are measured at
every tenth of the run, between which the line is straight. `muon-step-ratio` is CPU seconds per step of Muon over
AdamW's. Rates, seeds and single losses are beside them.
"""

import argparse
import sys
import tempfile
import time
import tomllib
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from result import row, write_result

from kogia.config import from_dict
from kogia.eval.intervals import t_quantile
from kogia.log import read_metrics
from kogia.train import supervised
from kogia.train.config import OptimConfig, SupervisedConfig

ROOT = Path(__file__).parent.parent
RATES = {"adamw": (4e-3, 8e-3, 1.6e-2), "muon": (8e-3, 1.6e-2, 3.2e-2)}
EVAL_TOKENS = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=5, help="measured ones, beside seed 0 that chooses the rates")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/optimisers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = prepared(Path(scratch), args.steps, args.batch_tokens)
        grid = {kind: {lr: train(config, kind, lr, 0) for lr in rates} for kind, rates in RATES.items()}
        best = {kind: min(tried, key=lambda lr, tried=tried: tried[lr]["losses"][-1]) for kind, tried in grid.items()}
        runs = {kind: [train(config, kind, best[kind], seed) for seed in range(1, args.seeds + 1)] for kind in RATES}
    write_result(args.out, "Muon beside AdamW", rows(grid, best, runs, config))
    print(f"written: {args.out}")


def prepared(scratch: Path, steps: int, batch_tokens: int) -> SupervisedConfig:
    """The demonstration's base model, with tokens and tokenizer that all runs share."""
    recipe = tomllib.loads((ROOT / "kogia/recipes/demo/pretrain.toml").read_text(encoding="utf-8"))
    config = from_dict(SupervisedConfig, recipe)
    data = replace(config.data, cache_dir=str(scratch / "cache"), batch_tokens=batch_tokens)
    config = replace(config, out=str(scratch / "first"), data=data, steps=steps, device="cpu", quiet=True, threads=1)
    supervised.build_run(config)
    tokenizer = str(scratch / "first/tokenizer")
    return replace(config, tokenizer=tokenizer, eval_every=max(1, steps // 10), eval_tokens=EVAL_TOKENS)


def train(config: SupervisedConfig, kind: Any, lr: float, seed: int) -> dict[str, Any]:
    """One run: validation losses at every tenth, and CPU seconds per step."""
    optim: OptimConfig = replace(config.optim, kind=kind, lr=lr)
    out = str(Path(config.out).parent / f"{kind}-{lr:g}-{seed}")
    run = supervised.build_run(replace(config, out=out, optim=optim, seed=seed))
    inner, seconds = supervised.train_step, []

    def timed(*args: Any) -> dict[str, float]:
        start = time.process_time()
        metrics = inner(*args)
        seconds.append(time.process_time() - start)
        return metrics

    supervised.train_step = timed
    try:
        supervised.train(run)
    finally:
        supervised.train_step = inner
    losses = [line["val_loss"] for line in read_metrics(out) if "val_loss" in line]
    print(f"{kind} {lr:g} seed {seed}: {losses[-1]:.4f}, {mean(seconds):.4f} CPU s a step", file=sys.stderr, flush=True)
    return {"losses": losses, "step_seconds": mean(seconds)}


def rows(
    grid: dict[str, dict[float, Any]], best: dict[str, float], runs: dict[str, list[dict[str, Any]]], config: Any
) -> list[dict[str, Any]]:
    pairs = list(zip(runs["muon"], runs["adamw"], strict=True))
    settings = {
        "rates": best,
        "grid": {kind: {f"{lr:g}": run["losses"][-1] for lr, run in tried.items()} for kind, tried in grid.items()},
        "at_the_end_of_the_grid": [kind for kind, lr in best.items() if lr in (RATES[kind][0], RATES[kind][-1])],
        "losses": {kind: [run["losses"][-1] for run in each] for kind, each in runs.items()},
        "tokens": config.steps * config.data.batch_tokens,
        "seeds": len(pairs),
    }
    gaps = [ours["losses"][-1] - theirs["losses"][-1] for ours, theirs in pairs]
    tokens = [reached(ours["losses"], theirs["losses"][-1]) for ours, theirs in pairs]
    steps = [ours["step_seconds"] / theirs["step_seconds"] for ours, theirs in pairs]
    return [
        interval_row("muon-loss-gap", gaps, "nats per token", limit=0.0, **settings),
        interval_row("muon-tokens-ratio", tokens, "ratio", limit=1.0),
        interval_row("muon-step-ratio", steps, "ratio"),
    ]


def interval_row(id: str, values: list[float], unit: str, **extra: Any) -> dict[str, Any]:
    """The mean with its 95% interval over seeds."""
    reach = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values))
    return row(id, mean(values), unit, low=mean(values) - reach, high=mean(values) + reach, **extra)


def reached(losses: list[float], target: float) -> float:
    """Share of the run after which the losses, at its tenths, have fallen to `target`; 1 where they have not."""
    for place in range(1, len(losses)):
        before, after = losses[place - 1], losses[place]
        if after <= target:
            inside = (before - target) / (before - after) if before > target else 0.0
            return (place + inside) / len(losses)
    return 1.0


if __name__ == "__main__":
    main()
