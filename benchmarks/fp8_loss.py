"""FP8 beside bfloat16 while kogia-nano's base model is trained: the losses of pairs of runs that are alike otherwise.

    python benchmarks/fp8_loss.py runs/nano [--seeds 3] [--tokens 1.05e8] [--seconds 560] [--device cuda]

WORK has raw/ of `reproductions/kogia-nano/run.py pack`; what is made stands in WORK/fp8_loss: the data, with fewer
generated documents than the recipe has, and one run for each precision and seed, which sets weights and order of data.
Nothing is done twice, and a run that is told to stop goes on exactly: with --seconds the command ends in time with
status 3, and the same command goes on. The result is written after every pair; with --first-seed pairs of other seeds
that stand in it, of as many tokens and the same settings, stay, so that machines and days can share the work.

`fp8-loss-gap-percent` is what the training loss in FP8 lies above that in bfloat16, on the same batches over the last
tenth of the steps, in percent of it: a mean over seeds with the 95% interval of pairs (Student's t).
`fp8-validation-gap-percent` is the same of held-out documents at the end, which both models read in bfloat16. A Hopper
GPU multiplies in FP8, others emulate it. On a CPU the model is tiny: to try the script.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any, Literal

import torch
from result import row, write_result

from kogia.checkpoint.open import pick_device
from kogia.config import load_toml, save_toml
from kogia.data.config import SourceConfig
from kogia.data.shards import META
from kogia.eval.intervals import t_quantile
from kogia.log import read_metrics
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.prepare.config import PrepareConfig
from kogia.train.config import Fp8Config, SupervisedConfig

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "reproductions/kogia-nano"
PRECISIONS = ("dtype", "fp8")
LAST = 0.1
"""Share of the steps whose losses count."""
GRACE = 25.0
"""Seconds in which a run that was told to stop has to end."""
MORE_TO_DO = 3
TINY = ModelConfig(
    512, 64, 2, 96, max_position=256, num_mtp_layers=1, tie_embeddings=True,
    attention=MLAConfig(num_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16),
    moe=MoEConfig(num_experts=4, topk=2, expert_dim=32),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tokens", type=float, help="of each run; default 1.05e8, on a CPU 40,960")
    parser.add_argument("--documents", type=int, help="generated ones; default 100,000, on a CPU 300")
    parser.add_argument("--weight-gradients", choices=("none", "dense", "all"), default="dense")
    parser.add_argument("--seconds", type=float, help="stop in time to be done after so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fp8_loss.json")
    args = parser.parse_args()
    until = None if args.seconds is None else time.monotonic() + args.seconds
    place = args.work / "fp8_loss"
    is_tiny = pick_device(args.device).type == "cpu"
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    tokens = tokens_of(args, is_tiny)
    earlier = earlier_pairs(args.out, seeds, tokens, args.weight_gradients) if args.first_seed else []
    if not (place / "data" / META).exists() and not called("prepare", data_of(args, place, is_tiny), place, until):
        print(f"{place / 'data'} is not done; the same command goes on")
        return MORE_TO_DO
    pairs: list[dict[str, Any]] = []
    for seed in seeds:
        runs = [run_of(args, place, precision, seed, is_tiny) for precision in PRECISIONS]
        for run in runs:
            if not is_done(run) and not called("pretrain", run, place, until):
                print(f"{run.out} is not done; the same command goes on")
                return MORE_TO_DO
        pairs.append(pair(seed, runs))
        print(json.dumps(pairs[-1]), flush=True)
        found = rows(sorted([*earlier, *pairs], key=lambda pair: pair["seed"]), runs[1])
        write_result(args.out, "FP8 beside bfloat16, losses of training", found)
    for each in found:
        print(json.dumps(each))
    return 0


def tokens_of(args: argparse.Namespace, is_tiny: bool) -> float:
    """Of each run."""
    return args.tokens or (40_960 if is_tiny else 1.05e8)


def earlier_pairs(path: Path, seeds: range, tokens: float, weight_gradients: str) -> list[dict[str, Any]]:
    """Those of other seeds in the result. Raises SystemExit if they were trained otherwise."""
    found = json.loads(path.read_text(encoding="utf-8"))["rows"][0] if path.exists() else {"pairs": []}
    kept = [each for each in found["pairs"] if each["seed"] not in seeds]
    if kept and found["weight_gradients"] != weight_gradients:
        sys.exit(f"{path} has pairs with weight_gradients {found['weight_gradients']!r}; give another --out")
    if any(abs(each["fp8"]["tokens"] - tokens) > 0.01 * tokens for each in kept):
        sys.exit(f"{path} has pairs of {kept[0]['fp8']['tokens']:,} tokens each, not {tokens:,.0f}; give another --out")
    return kept


def data_of(args: argparse.Namespace, place: Path, is_tiny: bool) -> PrepareConfig:
    """The recipe's, with fewer generated documents and more held out."""
    config = load_toml(RECIPES / "prepare.toml", PrepareConfig)
    documents = args.documents or (300 if is_tiny else 100_000)
    raw = args.work / "raw"
    sources = tuple(
        replace(each, spec=str(raw / Path(each.spec).name)) if each.num is None else replace(each, num=documents)
        for each in config.sources
    )
    size = TINY.vocab_size if is_tiny else config.vocab_size
    return replace(
        config, out=str(place / "data"), sources=sources, evaluations=(), vocab_size=size, val_share=0.01
    )  # fmt: skip


def run_of(
    args: argparse.Namespace, place: Path, precision: Literal["dtype", "fp8"], seed: int, is_tiny: bool
) -> SupervisedConfig:
    config = load_toml(RECIPES / "base.toml", SupervisedConfig)
    out = place / f"{'bf16' if precision == 'dtype' else precision}-{seed}"
    data = replace(config.data, sources=(SourceConfig(str(place / "data")),))
    if is_tiny:
        data, config = replace(data, batch_tokens=2048, max_seqlen=256), replace(config, model=TINY, threads=1)
    steps = -(-int(tokens_of(args, is_tiny)) // data.batch_tokens)
    return replace(
        config, out=str(out), data=data, seed=seed, precision=precision, device=args.device, steps=steps, epochs=None,
        fp8=Fp8Config(weight_gradients=args.weight_gradients), optim=replace(config.optim, warmup_steps=steps // 10),
        save_every=max(1, steps // 5), eval_every=0, resume=out.exists(),
    )  # fmt: skip


def is_done(run: SupervisedConfig) -> bool:
    return Path(run.out).exists() and any("val_loss" in line for line in read_metrics(run.out))


def called(name: str, config: Any, place: Path, until: float | None) -> bool:
    """`kogia NAME` with a recipe. False if it was told to stop before it was done."""
    recipe = place / "recipes" / f"{Path(config.out).name}.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    save_toml(config, recipe)
    left = None if until is None else until - GRACE - time.monotonic()
    if left is not None and left <= 0:
        return False
    process = subprocess.Popen([sys.executable, "-m", "kogia.cli", name, str(recipe)])
    try:
        status = process.wait(left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait() == 0
    if status:
        sys.exit(f"kogia {name} {recipe}: ended with {status}")
    return True


def pair(seed: int, runs: Sequence[SupervisedConfig]) -> dict[str, Any]:
    """What a pair has come to."""
    logs = [read_metrics(run.out) for run in runs]
    found: dict[str, Any] = {"seed": seed}
    for name, lines in zip(("bf16", "fp8"), logs, strict=True):
        steps = [line for line in lines if "loss" in line]
        losses = [line["loss"] for line in steps]
        found[name] = {
            "loss": fmean(losses[-max(1, round(LAST * len(losses))) :]),
            "val_loss": next(line["val_loss"] for line in lines if "val_loss" in line),
            "tokens_per_second": sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2],
            "skipped": sum("skipped" in line for line in steps),
            "tokens": int(sum(line["tokens"] for line in steps)),
        }
    return found


def rows(pairs: Sequence[dict[str, Any]], run: SupervisedConfig) -> list[dict[str, Any]]:
    settings = {"limit": 0.25, "seeds": len(pairs), "tokens": pairs[-1]["fp8"]["tokens"]}
    settings["weight_gradients"] = run.fp8.weight_gradients
    losses = [gap(pair, "loss") for pair in pairs]
    held_out = [gap(pair, "val_loss") for pair in pairs]
    speeds = [pair["fp8"]["tokens_per_second"] / pair["bf16"]["tokens_per_second"] for pair in pairs]
    return [
        interval_row("fp8-loss-gap-percent", losses, "percent", **settings, pairs=list(pairs)),
        interval_row("fp8-validation-gap-percent", held_out, "percent"),
        interval_row("fp8-nano-speed-ratio", speeds, "ratio"),
    ]


def gap(pair: dict[str, Any], name: str) -> float:
    return 100 * (pair["fp8"][name] / pair["bf16"][name] - 1)


def interval_row(id: str, values: Sequence[float], unit: str, **extra: Any) -> dict[str, Any]:
    """The mean with its 95% interval over seeds, of which two are the least."""
    middle = mean(values)
    reach = t_quantile(len(values) - 1) * stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    low, high = (None, None) if reach is None else (middle - reach, middle + reach)
    return row(id, middle, unit, low=low, high=high, **extra)


if __name__ == "__main__":
    torch.set_num_threads(1)  # of this process, which waits
    sys.exit(main())
