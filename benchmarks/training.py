"""Training on one GPU beside torchtitan, in one run: tokens per second and peak memory.

    python benchmarks/training.py [--peer DIRECTORY] [--steps 12] [--out benchmarks/results/training.json]

The model has 1.245B parameters of which a token uses 0.242B, sequences have 4096 random tokens; weights, gradients and
moments are bfloat16 on both sides, AdamW is the fused one. Every variant is a process of its own; its figure is the
median of the steps after the warm-up. DIRECTORY has torchtitan 0.2.2 and what it imports (`pip install --target`);
without it there is no ratio. A step here is `train_step`: balance loss, loads, clipping and metrics included.
MFU counts 6 FLOPs per used parameter of a product and token, and attention causal or in full, over the rate of a large
product measured before.
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

ROOT = Path(__file__).parent.parent
LENGTH, VOCAB = 4096, 32000
VARIANTS = (
    "peer-compiled-8",
    "peer-compiled-16",
    "ours-eager-8",
    "ours-eager-16",
    "ours-compiled-8",
    "ours-compiled-16",
)
"""Whose, whether torch.compile fuses its layers, and sequences of a step."""
WARM_UP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="directory with torchtitan")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--profile", type=Path, help="directory for the kernels of our steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        who, how, sequences, steps, profile = json.loads(args.child)
        print(json.dumps((ours if who == "ours" else peer)(sequences, how == "compiled", steps, profile)))
        return
    import torch
    from result import write_result

    peak = product_rate(torch)
    rows = []
    for who, how, sequences in (name.split("-") for name in args.variants):
        if who == "peer" and not args.peer:
            continue
        work = [who, how, int(sequences), args.steps, str(args.profile) if args.profile else None]
        rows.append(figure(who, int(sequences), how, child(work, args.peer), peak))
        print(json.dumps(rows[-1]), flush=True)
        write_result(args.out, "training on one GPU", [*rows, *ratios(rows)])
    for row in ratios(rows):
        print(json.dumps(row), flush=True)


def child(work: list[Any], directory: str | None) -> dict[str, Any]:
    """What a process of its own measured, or the end of what it had to say."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), directory, os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"error": done.stderr[-1500:]}


def figure(who: str, sequences: int, how: str, found: dict[str, Any], peak: float) -> dict[str, Any]:
    from result import row

    id = f"train-1b-{who}-{how}-b{sequences}"
    if "error" in found:
        return {"id": id, **found}
    speeds = sorted(found["tokens_per_second"])
    value = median(speeds)
    causal, full = (value * flops / peak for flops in flops_per_token())
    extra = {"memory_gb": found["memory_gb"], "mfu_causal": round(causal, 4), "mfu_full": round(full, 4)}
    extra |= {"peak_tflops": round(peak / 1e12, 1), "loss": found["loss"], "first_step_s": found["first_step_s"]}
    return row(id, value, "tokens/s", low=speeds[0], high=speeds[-1], **extra)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our best over the peer's best, and our peak memory there over the peer's at 16 sequences."""
    from result import row

    of = {who: [r for r in rows if f"-{who}-" in r["id"] and "value" in r] for who in ("ours", "peer")}
    if not of["ours"] or not of["peer"]:
        return []
    best = {who: max(of[who], key=lambda r: r["value"]) for who in of}
    made = [row("train-1b-ratio", best["ours"]["value"] / best["peer"]["value"], "ratio", limit=1.25)]
    largest = [r for r in of["peer"] if r["id"].endswith("b16")]
    if largest:
        share = best["ours"]["memory_gb"] / largest[0]["memory_gb"]
        made.append(row("train-1b-memory-ratio", share, "ratio", limit=0.8))
    return made


def model_config() -> Any:
    from kogia.model.config import MLAConfig, ModelConfig, MoEConfig

    attention = MLAConfig(
        num_heads=8, q_lora_rank=None, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    moe = MoEConfig(num_experts=64, num_shared_experts=1, topk=6, expert_dim=512, num_dense_layers=1)
    sizes = {"vocab_size": VOCAB, "dim": 1024, "num_layers": 12, "ffn_dim": 4096, "max_position": LENGTH}
    return ModelConfig(**sizes, attention=attention, moe=moe, num_mtp_layers=0)


def flops_per_token() -> tuple[float, float]:
    """(with causal attention, with attention in full), forward and backward."""
    config = model_config()
    a, moe = config.attention, config.moe
    qk, heads = a.qk_nope_head_dim + a.qk_rope_head_dim, a.num_heads
    up = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    projections = config.dim * (heads * (qk + a.v_head_dim) + a.kv_lora_rank + a.qk_rope_head_dim) + up
    expert = 3 * config.dim * moe.expert_dim * (moe.topk + moe.num_shared_experts) + config.dim * moe.num_experts
    layers = config.num_layers
    products = layers * projections + (layers - 1) * expert + 3 * config.dim * config.ffn_dim + config.dim * VOCAB
    attention = layers * heads * (qk + a.v_head_dim) * LENGTH
    return 6 * (products + attention / 2), 6 * (products + attention)


def product_rate(torch: Any) -> float:
    """FLOP/s of a bfloat16 product of 8192 by 8192 by 8192 random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / median(seconds[5:])


def timed(step: Callable[[], float], tokens: int, steps: int) -> dict[str, Any]:
    """Tokens per second of each step after the warm-up."""
    import torch

    begin, loss, speeds = time.perf_counter(), 0.0, []
    for i in range(WARM_UP + steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        if i == 0:
            first = time.perf_counter() - begin
            torch.cuda.reset_peak_memory_stats()
        if i >= WARM_UP:
            speeds.append(tokens / (time.perf_counter() - start))
    memory = torch.cuda.max_memory_allocated() / 1e9
    return {
        "tokens_per_second": speeds, "memory_gb": round(memory, 2), "loss": round(loss, 4),
        "first_step_s": round(first, 1),
    }  # fmt: skip


def ours(sequences: int, compiled: bool, steps: int, profile: str | None) -> dict[str, Any]:
    import torch

    from kogia.data.loader import Batch
    from kogia.model.packed import PackedTokens
    from kogia.model.transformer import build_model
    from kogia.ops.segments import segments_of
    from kogia.train.config import OptimConfig
    from kogia.train.loss import LossWeights, supervised_loss
    from kogia.train.optim import build_optimizer
    from kogia.train.step import TrainState, train_step

    model = build_model(replace(model_config(), init_std=0.02), device="cuda", dtype=torch.bfloat16)
    if compiled:
        model.compile_layers()
    optim = OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0)
    state = TrainState(model, build_optimizer(model, optim), optim, WARM_UP + steps)
    segments = segments_of([LENGTH] * sequences, "cuda")
    tokens, positions = segments.num_tokens, segments.offsets
    loss = partial(supervised_loss, weights=LossWeights(mtp=0.0, balance=1e-4))

    def step() -> float:
        ids = torch.randint(VOCAB, (tokens,), device="cuda")
        batch = Batch(PackedTokens(ids, positions, segments), positions > 0, tokens - sequences)
        return train_step(state, [batch], loss)["loss"]

    found = timed(step, tokens, steps)
    if profile:
        kernels(step, Path(profile) / f"kernels-b{sequences}-{'compiled' if compiled else 'eager'}.txt")
    return found


def kernels(step: Callable[[], float], path: Path) -> None:
    """Write where the time of a step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
    path.write_text(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=70, max_name_column_width=90))


def peer(sequences: int, compiled: bool, steps: int, profile: str | None) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs  # pyright: ignore
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model  # pyright: ignore
    from torchtitan.models.llama4.infra.parallelize import apply_compile  # pyright: ignore
    from torchtitan.models.moe import MoEArgs  # pyright: ignore

    moe = MoEArgs(
        num_experts=64, num_shared_experts=1, top_k=6, score_func="sigmoid", route_norm=True, score_before_experts=False
    )
    args = DeepSeekV3ModelArgs(
        vocab_size=VOCAB, dim=1024, inter_dim=4096, moe_inter_dim=512, n_layers=12, n_dense_layers=1, n_heads=8,
        max_seq_len=LENGTH, moe_args=moe, q_lora_rank=0, kv_lora_rank=256, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, attn_type="sdpa", rope_factor=1.0,
    )  # fmt: skip
    args.moe_impl = "standard"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = DeepSeekV3Model(args)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.init_weights(torch.device("cuda"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(logits: Any, targets: Any) -> Any:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    if compiled:
        apply_compile(model, SimpleNamespace(backend="inductor", enable=True, components=["model"]), False)
        loss_of = torch.compile(loss_of)

    def step() -> float:
        ids = torch.randint(VOCAB, (sequences, LENGTH), device="cuda")
        loss = loss_of(model(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed(step, sequences * LENGTH, steps)


if __name__ == "__main__":
    main()
