"""What a step costs a GPU beside its kernels: hidden waits, copies, launches; and decoding beside an earlier commit.

    python benchmarks/seams_gpu.py [--base DIRECTORY] [--rounds 3] [--out benchmarks/results/seams_gpu.json]

Waits are found by PyTorch itself (`torch.cuda.set_sync_debug_mode`), copies and launches counted by its profiler, over
one decode step, one mixed step and one training step of a small model in bfloat16, whose grouped products have a kernel
of their own there (in float32 PyTorch falls back to a loop that waits). Tokens are compared with those of a CPU. With
--base, a checkout of an earlier commit, both sides decode with a model of DeepSeek-V2-Lite's shape and random weights,
in processes of their own that alternate.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
BATCHES = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/seams_gpu.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(decode_speeds()))
        return
    from result import row, write_result

    rows = [row("seams-gpu-tokens-equal", same_tokens(), "share of completions that equal the CPU's", limit=1.0)]
    rows += [
        row(f"seams-gpu-experts-{name}-error", value, "millionths of the norm", limit=limit)
        for name, value, limit in errors()
    ]
    for name, (syncs, uploads, launches) in step_costs().items():
        rows.append(row(f"seams-gpu-{name}-syncs", syncs, "waits", limit=1, uploads=uploads, launches=launches))
    print(rows, file=sys.stderr)
    if args.base is not None:
        pairs = [(child(ROOT), child(args.base)) for _ in range(args.rounds)]
        for batch in map(str, BATCHES):
            ratios = [ours[batch] / theirs[batch] for ours, theirs in pairs]
            ours, theirs = (round(median(pair[i][batch] for pair in pairs), 1) for i in (0, 1))
            speeds = {"tokens_per_second": ours, "base_tokens_per_second": theirs}
            rows.append(
                row(
                    f"seams-gpu-decode-b{batch}-ratio",
                    median(ratios),
                    "ratio",
                    low=min(ratios),
                    high=max(ratios),
                    **speeds,
                )
            )
    write_result(args.out, "seams on a GPU", rows)


def tiny_model(device: str, dtype: torch.dtype = torch.float32) -> Any:
    from kogia.model.config import IndexerConfig, MLAConfig, ModelConfig, MoEConfig
    from kogia.model.transformer import build_model

    mla = MLAConfig(num_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
                    indexer=IndexerConfig(num_heads=4, head_dim=16, topk=64))  # fmt: skip
    moe = MoEConfig(num_experts=8, num_shared_experts=1, topk=2, expert_dim=16, num_groups=4, topk_groups=2)
    config = ModelConfig(vocab_size=61, dim=32, num_layers=3, ffn_dim=64, attention=mla, num_mtp_layers=1,
                         max_position=256, init_std=0.2, moe=moe)  # fmt: skip
    model = build_model(config, seed=1, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model.to(device)


def engine(device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine

    return Engine(tiny_model(device, dtype), None, EngineConfig(block_size=4, num_blocks=300, **options))


def same_tokens() -> float:
    """Over drafts, chunks, overlap and a small cache."""
    from kogia.engine.request import SamplingParams

    prompts = [[0, 5, 9, 11, 3], [0, 7], list(range(2, 40)), [2] * 17]
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=20, seed=7, n=2, ignore_eos=True)
    want = engine("cpu").generate(prompts, params)
    equal = []
    for options in ({}, {"overlap": False}, {"num_draft_tokens": 1}, {"num_draft_tokens": 2}, {"max_batch_tokens": 7},
                    {"max_sequences": 3, "max_batch_tokens": 9}):  # fmt: skip
        got = engine("cuda", **options).generate(prompts, params)
        pairs = [(a, b) for mine, theirs in zip(got, want) for a, b in zip(mine, theirs)]
        equal += [a.token_ids == b.token_ids for a, b in pairs]
    return sum(equal) / len(equal)


def errors() -> list[tuple[str, float, float]]:
    """(name, largest error, limit), in millionths of the norm, of mixed experts and their gradients against float64.

    Random inputs and loads, an expert without tokens, and choices that are nobody's; by backend and dtype.
    """
    from kogia.ops.dispatch import use_backend
    from kogia.ops.moe import mix_experts

    torch.manual_seed(0)
    ids = torch.randint(-1, 7, (500, 4))  # the last of 8 experts has none
    shapes = ((500, 64), (500, 4), (8, 2, 32, 64), (8, 64, 32), (500, 64))
    x, weights, gate_up, down, upstream = (torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Any]:
        inputs = [
            each.to(device, dtype).detach().clone().requires_grad_() for each in (x, weights, gate_up * 0.1, down * 0.1)
        ]
        with use_backend(backend, ["grouped_linear"]):
            y = mix_experts(inputs[0], ids.to(device), *inputs[1:])
            y.backward(upstream.to(device, dtype))
        return [each.double().cpu() for each in (y.detach(), *(each.grad for each in inputs))]

    want, found = run("cpu", torch.float64, "reference"), []
    for dtype, limit in ((torch.float32, 10), (torch.bfloat16, 20_000)):
        for backend in ("reference", "aten"):
            pairs = zip(run("cuda", dtype, backend), want)
            worst = 1e6 * max(float((got - right).norm() / right.norm()) for got, right in pairs)
            found.append((f"{backend}-{str(dtype).removeprefix('torch.')}", worst, limit))
    return found


def step_costs() -> dict[str, tuple[int, int, int]]:
    """Name -> (waits, copies to the device, kernels) of a step."""
    from kogia.engine.request import SamplingParams

    found = {}
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=60, seed=7, ignore_eos=True)
    for drafts in (0, 1, 2):
        busy = engine("cuda", torch.bfloat16, num_draft_tokens=drafts, overlap=False)
        for prompt in ([0, 5, 9], [7] * 17, [3, 4]):
            busy.add(prompt, params)
        for _ in range(4):
            busy.step()
        found[f"decode-{drafts}-drafts"] = cost(busy.step)
        busy.add(list(range(2, 40)), params)
        found[f"mixed-{drafts}-drafts"] = cost(busy.step)
    found["train"] = cost(training_step())
    return found


def training_step() -> Any:
    from functools import partial

    from kogia.data.loader import Batch
    from kogia.model.packed import pack
    from kogia.train.config import OptimConfig
    from kogia.train.loss import LossWeights, supervised_loss
    from kogia.train.optim import build_optimizer
    from kogia.train.step import TrainState, train_step

    model, optim = tiny_model("cuda", torch.bfloat16), OptimConfig(lr=1e-3, warmup_steps=0)
    tokens = pack([list(range(2, 40)), [5, 6, 7], list(range(9, 55))])
    mask = tokens.positions > 0
    batches = [Batch(tokens, mask, int(mask.sum())).to("cuda") for _ in range(2)]
    state = TrainState(model, build_optimizer(model, optim), optim, 10)
    loss = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3, indexer=1.0))
    train_step(state, batches, loss)
    return lambda: train_step(state, batches, loss)


def cost(action: Any) -> tuple[int, int, int]:
    """Of the second call: the first may still make what is made once. A wait for an event is one, too."""
    action()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        action()
        torch.cuda.set_sync_debug_mode("default")
    # switching the warning on warns of itself, once
    own = "torch/cuda/__init__.py"
    messages = [w for w in caught if "synchroniz" in str(w.message) and not w.filename.endswith(own)]
    waits = [f"{w.filename}:{w.lineno}" for w in messages]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        action()
        torch.cuda.synchronize()
    names = Counter(event.name for event in profile.events())
    copies = sum(n for name, n in names.items() if name.startswith("Memcpy HtoD"))
    events = names["cudaEventSynchronize"]
    launches = sum(n for name, n in names.items() if "LaunchKernel" in name)
    print(Counter(waits), {n: c for n, c in names.items() if "Memcpy" in n or "Synchronize" in n}, file=sys.stderr)
    return len(waits) + events, copies, launches


def child(checkout: Path) -> dict[str, float]:
    """Tokens per second by batch size, measured by a process that imports kogia from `checkout`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def decode_speeds(context: int = 256, num_tokens: int = 24) -> dict[str, float]:
    """Of a model of V2-Lite's shape in bfloat16, weights drawn on the device: uses only what both commits have."""
    from dataclasses import replace

    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine
    from kogia.engine.request import SamplingParams
    from kogia.model.presets import preset
    from kogia.model.transformer import Transformer

    config = replace(preset("deepseek-v2-lite"), init_std=0.02)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if name.endswith("norm.weight") else parameter.normal_(0.0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    model.eval()
    speeds = {}
    for batch in BATCHES:
        run = Engine(model, None, EngineConfig(num_blocks=batch * 20 + 8, max_batch_tokens=16384))
        prompts = [[(31 * i + 7 * j) % 100000 for j in range(context)] for i in range(batch)]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens + 4, ignore_eos=True)
        for prompt in prompts:
            run.add(prompt, params)
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_tokens):
            run.step()
        torch.cuda.synchronize()
        speeds[batch] = batch * num_tokens / (time.perf_counter() - start)
    return {str(batch): speed for batch, speed in speeds.items()}


if __name__ == "__main__":
    main()
