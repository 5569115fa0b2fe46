"""Training on one GPU beside torchtitan, in one run: tokens per second and peak memory.

    python benchmarks/training.py [--peer DIRECTORY] [--steps 12] [--out benchmarks/results/training.json]
    python benchmarks/training.py --work 16b-layers --peer DIRECTORY      # train-16b-layers-ratio
    python benchmarks/training.py --work moe-tax                          # moe-tax

1b          1.245B parameters of which a token uses 0.242B
16b-layers  8 of the 27 layers of DeepSeek-V2-Lite's shape, 4.6B parameters: 83 GB before activations, an H200
moe-tax     1b beside a dense model of as many parameters as a token of it uses: the time of a step over the other's

Sequences have 4096 random tokens, and routers choose by themselves. Weights, gradients and moments are bfloat16 on both
sides, ours has float32 masters besides. Every variant is a process of its own;
its figure is the median of the steps after the warm-up, and written at once. DIRECTORY has torchtitan 0.2.2 and what it
imports (`pip install --target`); without it there is no ratio to it. A step here is `train_step`: balance loss, loads,
clipping and metrics included. MFU counts the FLOPs of the model, attention causal or in full, over the rate of a large
product measured before. Without a GPU all is tiny: to try the script.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LENGTH = 4096 if ON_GPU else 64
VARIANTS = {
    "1b": (
        "peer-compiled-8",
        "peer-compiled-16",
        "ours-eager-8",
        "ours-eager-16",
        "ours-compiled-8",
        "ours-compiled-16",
    ),
    "16b-layers": (
        "peer-compiled-4",
        "ours-eager-4",
        "peer-compiled-8",
        "ours-eager-8",
        "peer-compiled-16",
        "ours-eager-16",
    ),
    "moe-tax": ("dense-eager-8", "ours-eager-8", "dense-eager-16", "ours-eager-16"),
}
"""Whose, whether torch.compile fuses its layers, and sequences of a step."""
WARM_UP = 6 if ON_GPU else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=VARIANTS, default="1b")
    parser.add_argument("--peer", help="directory with torchtitan")
    parser.add_argument("--steps", type=int, default=12 if ON_GPU else 3)
    parser.add_argument("--variants", nargs="+", help="all of the work if left out")
    parser.add_argument("--profile", type=Path, help="directory for the kernels of our steps")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training.json, or training_WORK.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measured(**json.loads(args.child))))
        return
    from result import write_result

    from kogia.ops.machine import product_rate

    variants = VARIANTS[args.work] if args.variants is None else args.variants
    if unknown := set(variants) - set(VARIANTS[args.work]):
        parser.error(f"--variants: {sorted(unknown)}; of {args.work} there are {', '.join(VARIANTS[args.work])}")
    name = "training" if args.work == "1b" else f"training_{args.work.replace('-', '_')}"
    out = args.out or ROOT / f"benchmarks/results/{name}.json"
    peak = product_rate(DEVICE, torch.bfloat16, repeats=15)
    rows = []
    for variant in variants:
        if variant.startswith("peer") and not args.peer:
            continue
        profile = str(args.profile) if args.profile else None
        work = {"work": args.work, "variant": variant, "steps": args.steps, "profile": profile}
        rows.append(figure(args.work, variant, child(work, args.peer), peak))
        print(json.dumps(rows[-1]), flush=True)
        write_result(out, "training on one GPU", [*rows, *ratios(args.work, rows)])
    for row in ratios(args.work, rows):
        print(json.dumps(row), flush=True)


def child(work: dict[str, Any], directory: str | None) -> dict[str, Any]:
    """What a process of its own measured, or the end of what it had to say."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), directory, os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr[-1500:]}


def figure(work: str, variant: str, found: dict[str, Any], peak: float) -> dict[str, Any]:
    from result import row

    from kogia.model.costs import flops_per_token

    who, how, sequences = variant.split("-")
    id = f"train-{work}-{who}-{how}-b{sequences}"
    if "error" in found:
        return {"id": id, **found}
    speeds = sorted(found.pop("tokens_per_second"))
    value, model = median(speeds), model_of(work, who)
    causal, full = (value * flops_per_token(model, LENGTH, is_causal=causal) / peak for causal in (True, False))
    extra = {"mfu_causal": round(causal, 4), "mfu_full": round(full, 4), "peak_tflops": round(peak / 1e12, 1)}
    return row(id, value, "tokens/s", low=speeds[0], high=speeds[-1], **found, **extra)


def ratios(work: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the work is for, as far as it was measured."""
    of = {who: [r for r in rows if f"-{who}-" in r["id"] and "value" in r] for who in ("ours", "peer", "dense")}
    if work == "moe-tax":
        pairs = [(ours, other) for ours in of["ours"] for other in of["dense"] if sequences(ours) == sequences(other)]
        if not pairs:
            return []
        ours, other = max(pairs, key=lambda pair: sequences(pair[0]))
        return [ratio("moe-tax", other, ours, 1.25, sequences=sequences(ours))]
    if not of["ours"] or not of["peer"]:
        return []
    best = {who: max(of[who], key=lambda r: r["value"]) for who in ("ours", "peer")}
    if work == "16b-layers":
        return [ratio("train-16b-layers-ratio", best["ours"], best["peer"], 1.3, mfu_causal=best["ours"]["mfu_causal"])]
    made = [ratio("train-1b-ratio", best["ours"], best["peer"], 1.25)]
    if largest := [r for r in of["peer"] if sequences(r) == 16]:
        share = best["ours"]["memory_gb"] / largest[0]["memory_gb"]
        made.append(ratio_row("train-1b-memory-ratio", share, 0.8))
    return made


def sequences(row: dict[str, Any]) -> int:
    return int(row["id"].rpartition("-b")[2])


def ratio(id: str, above: dict[str, Any], below: dict[str, Any], limit: float, **extra: Any) -> dict[str, Any]:
    """Of two speeds, with the least and the largest that their spreads allow."""
    low, high = above["low"] / below["high"], above["high"] / below["low"]
    return ratio_row(id, above["value"] / below["value"], limit, low=low, high=high, **extra)


def ratio_row(id: str, value: float, limit: float, **extra: Any) -> dict[str, Any]:
    from result import row

    return row(id, value, "ratio", limit=limit, **extra)


# Models ---------------------------------------------------------------------------------------------------------------


def model_config(work: str = "1b") -> Any:
    from kogia.model.config import MLAConfig, ModelConfig, MoEConfig

    attention = MLAConfig(
        num_heads=8, q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    moe = MoEConfig(num_experts=64, num_shared_experts=1, topk=6, expert_dim=512, num_dense_layers=1)
    config = ModelConfig(32000, 1024, 12, 4096, attention=attention, moe=moe, num_mtp_layers=0)
    if work == "16b-layers":
        attention = replace(attention, num_heads=16, kv_lora_rank=512)
        moe = replace(moe, num_shared_experts=2, expert_dim=1408)
        config = ModelConfig(102400, 2048, 8, 10944, attention=attention, moe=moe, num_mtp_layers=0)
    if not ON_GPU:
        attention = replace(attention, num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16)
        attention = replace(attention, v_head_dim=16)
        moe = replace(moe, num_experts=8, topk=2, expert_dim=32)
        config = replace(config, vocab_size=256, dim=64, num_layers=3, ffn_dim=96, attention=attention, moe=moe)
    return replace(config, max_position=LENGTH, init_std=0.02)


def model_of(work: str, who: str) -> Any:
    config = model_config(work)
    if who != "dense":
        return config
    moe = config.moe
    width = config.ffn_dim + (config.num_layers - 1) * (moe.topk + moe.num_shared_experts) * moe.expert_dim
    return replace(config, moe=None, ffn_dim=round(width / config.num_layers / 16) * 16)


# Steps ----------------------------------------------------------------------------------------------------------------


def measured(work: str, variant: str, steps: int, profile: str | None) -> dict[str, Any]:
    """A variant, in this process."""
    who, how, count = variant.split("-")
    if who == "peer":
        return peer(model_config(work), int(count), how == "compiled", steps)
    file = Path(profile) / f"kernels-{work}-{variant}.txt" if profile else None
    return ours(model_of(work, who), int(count), how == "compiled", steps, file)


def timed(step: Callable[[], float], tokens: int, steps: int) -> dict[str, Any]:
    """Tokens per second of each step after the warm-up."""
    from kogia.ops.machine import finish, peak_memory

    begin, loss, speeds = time.perf_counter(), 0.0, []
    for i in range(WARM_UP + steps):
        finish(DEVICE)
        start = time.perf_counter()
        loss = step()
        finish(DEVICE)
        if i == 0:
            first = time.perf_counter() - begin
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
        if i >= WARM_UP:
            speeds.append(tokens / (time.perf_counter() - start))
    memory = round(peak_memory(DEVICE) / 1e9, 2)
    return {"tokens_per_second": speeds, "memory_gb": memory, "loss": round(loss, 4), "first_step_s": round(first, 1)}


def ours(config: Any, sequences: int, compiled: bool, steps: int, profile: Path | None) -> dict[str, Any]:
    from kogia.data.loader import Batch
    from kogia.model.packed import PackedTokens
    from kogia.model.transformer import build_model
    from kogia.ops.segments import segments_of
    from kogia.train.config import OptimConfig
    from kogia.train.loss import LossWeights, supervised_loss
    from kogia.train.optim import build_optimizer
    from kogia.train.step import TrainState, train_step

    model = build_model(config, device=DEVICE, dtype=torch.bfloat16)
    if compiled:
        model.compile_layers()
    optim = OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0, moments="bfloat16")
    state = TrainState(model, build_optimizer(model, optim), optim, WARM_UP + steps)
    segments = segments_of([LENGTH] * sequences, DEVICE)
    tokens, positions = segments.num_tokens, segments.offsets
    loss = partial(supervised_loss, weights=LossWeights(mtp=0.0, balance=1e-4))

    def step() -> float:
        ids = torch.randint(config.vocab_size, (tokens,), device=DEVICE)
        batch = Batch(PackedTokens(ids, positions, segments), positions > 0, tokens - sequences)
        return train_step(state, [batch], loss)["loss"]

    found = timed(step, tokens, steps)
    if profile:
        kernels(step, profile)
    return found


def kernels(step: Callable[[], float], path: Path) -> None:
    """Write where the time of a step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    path.write_text(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=70, max_name_column_width=90))


def peer(config: Any, sequences: int, compiled: bool, steps: int) -> dict[str, Any]:
    import torch.nn.functional as F
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs  # pyright: ignore
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model  # pyright: ignore
    from torchtitan.models.llama4.infra.parallelize import apply_compile  # pyright: ignore
    from torchtitan.models.moe import MoEArgs  # pyright: ignore

    a, m = config.attention, config.moe
    moe = MoEArgs(
        num_experts=m.num_experts, num_shared_experts=m.num_shared_experts, top_k=m.topk, score_func="sigmoid",
        route_norm=True, score_before_experts=False,
    )  # fmt: skip
    args = DeepSeekV3ModelArgs(
        vocab_size=config.vocab_size, dim=config.dim, inter_dim=config.ffn_dim, moe_inter_dim=m.expert_dim,
        n_layers=config.num_layers, n_dense_layers=m.num_dense_layers, n_heads=a.num_heads, max_seq_len=LENGTH,
        moe_args=moe, q_lora_rank=0, kv_lora_rank=a.kv_lora_rank, qk_nope_head_dim=a.qk_nope_head_dim,
        qk_rope_head_dim=a.qk_rope_head_dim, v_head_dim=a.v_head_dim, attn_type="sdpa", rope_factor=1.0,
    )  # fmt: skip
    args.moe_impl = "standard"
    with DEVICE:
        torch.set_default_dtype(torch.bfloat16)
        model = DeepSeekV3Model(args)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.init_weights(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(logits: Any, targets: Any) -> Any:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    if compiled:
        apply_compile(model, SimpleNamespace(backend="inductor", enable=True, components=["model"]), False)
        loss_of = torch.compile(loss_of)

    def step() -> float:
        ids = torch.randint(config.vocab_size, (sequences, LENGTH), device=DEVICE)
        loss = loss_of(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed(step, sequences * LENGTH, steps)


if __name__ == "__main__":
    main()
