"""The engine on one GPU, beside the card's copy rate and, where its figures are given, vLLM.

    python benchmarks/engine_gpu.py [--peer vllm.jsonl] [--out benchmarks/results/engine_gpu.json]

A model of DeepSeek-V2-Lite's shape with random bf16 weights of standard deviation 0.02, so that routing is spread.
Decode: 129 tokens behind prompts of 512, less the time of 1, medians of three. Prefill: 16 to 64 prompts of 512, and
one of 8,192. `--peer` holds what a script printed that measured the same with vLLM on this machine just before: lines
of JSON, {"B": batch, "decode_tok_s": ..., "prefill_tok_s": ...} and {"...": "prefill_8k_tok_s", "v": ...}. With
--check, log-probabilities beside float32's; with --profile, the kernels of one decode step by time. With
--prompt-steps, steps with prompts of 2,048 to 8,192 tokens by themselves and beside 128 sequences that decode, and the
host's part of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
BARS = {1: 1.38, 16: 1.08, 64: 1.02, 256: 1.02}
"""Least ratio to vLLM by batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--peer", type=Path, help="lines of JSON that vLLM's script printed")
    parser.add_argument("--check", action="store_true", help="log-probabilities beside those of float32")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batches whose step is profiled")
    parser.add_argument("--profile-host", type=int, metavar="BATCH", help="0: of one long prompt")
    parser.add_argument("--profile-prefill", action="store_true")
    parser.add_argument("--long", action="store_true", help="what 63k more tokens of context add to a step of batch 1")
    parser.add_argument("--prompt-steps", action="store_true")
    parser.add_argument("--lazy", action="store_true", help="record graphs when they are needed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from result import row, write_result

    rows: list[dict[str, Any]] = []
    peer = {} if args.peer is None else peer_figures(args.peer)

    def say(id: str, value: float, unit: str, **extra: Any) -> None:
        rows.append(row(id, value, unit, **extra))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            write_result(args.out, "engine on a GPU", rows)

    def beside(id: str, values: list[float], limit: float, **extra: Any) -> None:
        """A speed, and its ratio to the peer's."""
        say(id, median(values), "tokens/s", low=min(values), high=max(values), peer=peer.get(id), **extra)
        if id in peer:
            ratios = [value / peer[id] for value in values]
            say(f"{id}-vs-vllm", median(ratios), "ratio", low=min(ratios), high=max(ratios), limit=limit)

    say("copy-tbps", copy_rate(), "TB/s")
    model, seconds = timed_call(lambda: v2_lite(args.layers))
    say("model-seconds", seconds, "s")
    if args.check:
        for id, value, extra in check():
            say(id, value, "nats, mean gap to float32", **extra)
    engine = build_engine(model)
    _, seconds = timed_call(lambda: None if args.lazy else engine.warm_up())
    say("warm-up-seconds", seconds, "s")
    prefills = []
    for batch in args.batches:
        speeds = [decode(engine, batch) for _ in range(args.rounds)]
        if batch in (16, 64):
            prefills += [speed[1] for speed in speeds]
        beside(f"decode-bf16-b{batch}", [s[0] for s in speeds], BARS.get(batch, 1.0), **host_share(engine, batch))
    if prefills:
        beside("prefill-bf16", prefills, 1.0)
    if args.batches:
        prefill(engine, 1, 8192)
        beside("prefill-bf16-8k", [prefill(engine, 1, 8192) for _ in range(args.rounds)], 1.0)
    for batch in args.profile:
        profile(engine, batch)
    if args.profile_host is not None:
        host_profile(engine, args.profile_host)
    if args.profile_prefill:
        profile_prefill(engine)
    if args.prompt_steps:
        for decoding in (0, 128):
            for id, value, extra in prompt_steps(engine, decoding):
                say(id, value, "ms", **extra)
    if args.long:
        del engine, model
        torch.cuda.empty_cache()
        added, short = zip(*long_context(args.layers, args.rounds))
        say("decode-ctx64k-added-ms", median(added), "ms", low=min(added), high=max(added), limit=0.75,
            short_ms=round(median(short), 3))  # fmt: skip


def peer_figures(file: Path) -> dict[str, float]:
    """Our ids -> the peer's figures."""
    found: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line) if line.startswith("{") else {}
        if "decode_tok_s" in fields:
            found[f"decode-bf16-b{fields['B']}"] = fields["decode_tok_s"]
            if fields["B"] in (16, 64):
                found["prefill-bf16"] = max(found.get("prefill-bf16", 0.0), fields["prefill_tok_s"])
        elif "prefill_8k_tok_s" in fields.values():
            found["prefill-bf16-8k"] = fields["v"]
        elif "prefill_8k_tok_s" in fields:
            found["prefill-bf16-8k"] = fields["prefill_8k_tok_s"]
    return found


def timed_call(work: Any) -> tuple[Any, float]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def copy_rate() -> float:
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    times = []
    for _ in range(12):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * a.numel() / median(times) / 1e9


def v2_lite_config(layers: int = 27, mtp_layers: int = 0, max_position: int = 16384) -> Any:
    from kogia.model.config import MLAConfig, ModelConfig, MoEConfig

    mla = MLAConfig(num_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                    v_head_dim=128)  # fmt: skip
    moe = MoEConfig(num_experts=64, num_shared_experts=2, topk=6, expert_dim=1408, num_dense_layers=1)
    return ModelConfig(vocab_size=32000, dim=2048, num_layers=layers, ffn_dim=10944, attention=mla, moe=moe,
                       max_position=max_position, init_std=0.02, num_mtp_layers=mtp_layers)  # fmt: skip


def v2_lite(layers: int = 27, mtp_layers: int = 0, max_position: int = 16384) -> Any:
    from kogia.model.transformer import build_model

    return build_model(v2_lite_config(layers, mtp_layers, max_position), device="cuda", dtype=torch.bfloat16)


def build_engine(model: Any, **options: Any) -> Any:
    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine

    settings = {"block_size": 64, "num_blocks": 5000, "max_sequences": 256, "max_batch_tokens": 16384,
                "prefix_cache": False}  # fmt: skip
    return Engine(model, None, EngineConfig(**{**settings, **options}))


def prompts_of(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(5, 32000, (count, length)).tolist()


def params_of(tokens: int, temperature: float = 0.0) -> Any:
    from kogia.engine.request import SamplingParams

    return SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=1)


def timed(engine: Any, prompts: list[list[int]], tokens: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.generate(prompts, params_of(tokens))
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode(engine: Any, batch: int, tokens: int = 128) -> tuple[float, float]:
    """(decode tokens/s, prefill tokens/s)"""
    prompts = prompts_of(batch, 512)
    timed(engine, prompts, 8)
    one = timed(engine, prompts, 1)
    return batch * tokens / (timed(engine, prompts, tokens + 1) - one), batch * 512 / one


def long_context(layers: int, rounds: int) -> list[tuple[float, float]]:
    """(what a step at a context of 65k takes beyond one at 2k, the latter), milliseconds."""
    engine = build_engine(v2_lite(layers, max_position=67584), num_blocks=1100)
    found = []
    for _ in range(rounds):
        short, long = step_ms(engine, 2048), step_ms(engine, 2048 + 63 * 1024)
        found.append((long - short, short))
    return found


def step_ms(engine: Any, context: int, steps: int = 100) -> float:
    """Of a decode step of one sequence behind a prompt of `context` tokens."""
    engine.add(prompts_of(1, context)[0], params_of(steps + 60))
    for _ in range(-(-context // engine.config.max_batch_tokens) + 40):
        engine.step()
    _, seconds = timed_call(lambda: [engine.step() for _ in range(steps)])
    while engine.num_unfinished:
        engine.step()
    return seconds / steps * 1e3


def prefill(engine: Any, count: int, length: int) -> float:
    return count * length / timed(engine, prompts_of(count, length), 1)


def prompt_steps(engine: Any, decoding: int) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Steps of prompts of 512 tokens beside so many sequences that decode: (id, milliseconds until the device is done,
    those of them until the host is)."""
    if decoding:
        for prompt in prompts_of(decoding, 512):
            engine.add(prompt, params_of(200))
        for _ in range(20):
            engine.step()
    for tokens in (2048, 4096, 8192):
        found = []
        for seed in range(6):
            for prompt in prompts_of(tokens // 512, 512, seed):
                engine.add(prompt, params_of(1))
            torch.cuda.synchronize()
            start = time.perf_counter()
            engine.step()  # of the step before only what the host does: the device is done with it
            host = time.perf_counter() - start
            torch.cuda.synchronize()
            found.append((time.perf_counter() - start, host))
            for _ in range(3):
                engine.step()
        whole, host = (median(values) * 1e3 for values in zip(*found[1:], strict=True))
        yield f"prompt-step-{tokens}-beside-{decoding}", whole, {"host_ms": round(host, 2)}
    while engine.num_unfinished:
        engine.step()


def host_share(engine: Any, batch: int) -> dict[str, float]:
    """Milliseconds of a decode step: all of it, those the host is busy planning, launching and settling, and those of
    them in which the driver starts graphs."""
    for prompt in prompts_of(batch, 512):
        engine.add(prompt, params_of(200))
    for _ in range(40):
        engine.step()
    from kogia.engine import runner

    torch.cuda.synchronize()
    with timed_calls(runner.Flight, "wait") as waits, timed_calls(torch.cuda.CUDAGraph, "replay") as starts:
        start = time.perf_counter()
        for _ in range(30):
            engine.step()
        total = time.perf_counter() - start
    while engine.num_unfinished:
        engine.step()
    seconds = {"step_ms": total, "host_ms": total - sum(waits), "graph_start_ms": sum(starts)}
    return {name: round(each / 30 * 1e3, 3) for name, each in seconds.items()}


@contextmanager
def timed_calls(owner: type, name: str) -> Iterator[list[float]]:
    """Seconds of every call of a method within the block."""
    method, found = getattr(owner, name), []

    def timed_method(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        found.append(time.perf_counter() - start)
        return result

    setattr(owner, name, timed_method)
    try:
        yield found
    finally:
        setattr(owner, name, method)


def profile(engine: Any, batch: int) -> None:
    from collections import defaultdict

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for prompt in prompts_of(batch, 512):
        engine.add(prompt, params_of(60))
    for _ in range(40):
        engine.step()
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            engine.step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in found.events() or ():
        times[event.name[:60]].append(event.device_time)
    total = sum(map(sum, times.values())) / 5
    print(f"--- batch {batch}: {total:.0f} us of kernels a step, {sum(map(len, times.values())) / 5:.0f} kernels")
    for name, each in sorted(times.items(), key=lambda pair: -sum(pair[1]))[:26]:
        print(f"{sum(each) / 5:9.1f} us {len(each) / 5:6.1f} x {median(each):7.2f}  {name}")
    while engine.num_unfinished:
        engine.step()


def host_profile(engine: Any, batch: int) -> None:
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    if not batch:  # of one long prompt instead
        prompts = prompts_of(1, 8192)
        timed(engine, prompts, 1)
        profiler.enable()
        timed(engine, prompts, 1)
        profiler.disable()
        pstats.Stats(profiler).sort_stats("cumtime").print_stats(30)
        return
    for prompt in prompts_of(batch, 512):
        engine.add(prompt, params_of(100))
    for _ in range(40):
        engine.step()
    profiler.enable()
    for _ in range(30):
        engine.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
    while engine.num_unfinished:
        engine.step()


def profile_prefill(engine: Any) -> None:
    from collections import defaultdict

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for count, length in ((16, 512), (1, 8192)):
        timed(engine, prompts_of(count, length), 1)
        with profiler(activities=[ProfilerActivity.CUDA]) as found:
            timed(engine, prompts_of(count, length), 1)
        times: dict[str, list[float]] = defaultdict(list)
        for event in found.events() or ():
            times[event.name[:90]].append(event.device_time)
        print(f"--- prefill {count} x {length}: {sum(map(sum, times.values())):.0f} us of kernels")
        for name, each in sorted(times.items(), key=lambda pair: -sum(pair[1]))[:22]:
            print(f"{sum(each):9.1f} us {len(each):6.1f} x {median(each):7.2f}  {name}")


def check(layers: int = 6) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Greedy tokens with graphs beside those without; log-probabilities beside those of float32 weights, and beside
    them what bfloat16 alone costs in plain PyTorch."""
    from dataclasses import replace

    from kogia.model.packed import pack
    from kogia.ops.dispatch import use_backend

    model = v2_lite(layers)
    prompts = [p[: 40 + 37 * i] for i, p in enumerate(prompts_of(9, 512))]
    params = replace(params_of(24), logprobs=True)
    found = {}
    for name, options in (("eager", {"graphs": False}), ("graphs", {}), ("chunked", {"max_batch_tokens": 100})):
        engine = build_engine(model, num_blocks=400, max_sequences=16, **options)
        found[name] = [c[0] for c in engine.generate(prompts, params)]
    with use_backend("reference"):
        engine = build_engine(model, num_blocks=400, max_sequences=16, graphs=False)
        found["reference"] = [c[0] for c in engine.generate(prompts, params)]
    wide = v2_lite(layers).float()
    with torch.no_grad(), use_backend("reference"):
        for name, outputs in found.items():
            whole = pack([p + c.token_ids for p, c in zip(prompts, outputs)]).to("cuda")
            want = wide.logprobs(whole).cpu()
            ends = np.cumsum(whole.segments.lengths)
            gaps = [abs(float(want[e - 24 + i]) - c.logprobs[i]) for e, c in zip(ends, outputs) for i in range(24)]
            same = sum(a.token_ids == b.token_ids for a, b in zip(outputs, found["eager"]))
            yield f"check-{name}", float(np.mean(gaps)), {"worst": round(max(gaps), 4), "same": same}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
