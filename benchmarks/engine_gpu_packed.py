"""The engine on one GPU with packed weights, beside itself with bf16 weights in the same run.

    python benchmarks/engine_gpu_packed.py [--formats int4 fp8] [--batches 1 64] [--profile] [--out FILE]
    python benchmarks/engine_gpu_packed.py --products --prefill --formats none fp8 --batches 64 256

The model of engine_gpu.py, context 512 + 128, its weights drawn and packed on the device. With --large,
DeepSeekMoE-145B in int4 at batch 1 as well, which takes 80 GB. `--check` compares log-probabilities of greedy tokens
with those of the same numbers in dense float32; `--profile` prints the kernels of a step.

--products checks the products of the model's matrices in FP8 (ops/w8a8) against references, and times them by number
of rows beside what else there is: the kernel for few rows, the weight made dense in bf16, and a bf16 weight. The
crossovers are the constants of ops/w8a8/products.py. --prefill reads 16 prompts of 512 and one of 8,192. FP8 weights
are measured as they are used, with those of many rows made dense, and with the crossovers that --products found.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
NEVER = 1 << 40
Crossovers = tuple[int, int]
"""Rows and tokens from which on products are in FP8."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=["none", "int4", "fp8"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from engine_gpu import build_engine, copy_rate, decode, host_share, prefill, profile, v2_lite_config
    from result import row, write_result

    from kogia.model.presets import preset

    rows: list[dict[str, Any]] = []

    def say(id: str, value: float, unit: str, **extra: Any) -> None:
        rows.append(row(id, value, unit, **extra))
        print(json.dumps(rows[-1]), flush=True)
        if args.out is not None:
            write_result(args.out, "engine on a GPU, packed weights", rows)

    def speeds(name: str, engine: Any, batches: list[int]) -> None:
        for batch in batches:
            found = [decode(engine, batch)[0] for _ in range(args.rounds)]
            share = host_share(engine, batch)
            say(f"decode-{name}-b{batch}", median(found), "tokens/s", low=min(found), high=max(found), **share)
            if args.profile:
                profile(engine, batch)
        for count, length in ((16, 512), (1, 8192)) if args.prefill else ():
            prefill(engine, count, length)
            found = [prefill(engine, count, length) for _ in range(args.rounds)]
            say(f"prefill-{name}-{count}x{length}", median(found), "tokens/s", low=min(found), high=max(found))

    say("copy-tbps", copy_rate(), "TB/s")
    ways: dict[str, Crossovers | None] = {"": None, "-made-dense": (NEVER, NEVER)}
    if args.products:
        for id, error, bound in checked_products():
            say(id, error, "relative error", limit=bound)
        crossovers = timed_products(say)
        ways[f"-from-{crossovers[0]}-{crossovers[1]}"] = crossovers
    for format in args.formats:
        if args.check and format != "none":
            for id, value, extra in check(format):
                say(id, value, "nats, mean gap to float32", **extra)
        model = drawn(v2_lite_config(), format)
        for way, crossovers in ways.items() if format == "fp8" else [("", None)]:
            with fp8_from(crossovers):
                speeds(("bf16" if format == "none" else format) + way, build_engine(model), args.batches)
            gc.collect()  # an engine and its loop know each other
        say(f"weights-{format}-gb", sum(t.nbytes for t in model.state_dict().values()) / 1e9, "GB")
        del model
        gc.collect()
        torch.cuda.empty_cache()
    if args.large:
        engine = build_engine(drawn(preset("deepseek-moe-145b"), "int4"), num_blocks=40, max_sequences=2)
        speeds("145b-int4", engine, [1])


@contextmanager
def fp8_from(crossovers: Crossovers | None) -> Iterator[None]:
    """Within the block, products in FP8 begin at these numbers of rows and tokens."""
    from kogia.ops.w8a8 import products

    before = products.LEAST_ROWS, products.LEAST_TOKENS
    products.LEAST_ROWS, products.LEAST_TOKENS = before if crossovers is None else crossovers
    try:
        yield
    finally:
        products.LEAST_ROWS, products.LEAST_TOKENS = before


MATRICES = {
    "joint": (3648, 2048), "kv_b": (4096, 512), "o": (2048, 2048), "up": (10944, 2048), "down": (2048, 10944),
    "shared-down": (2048, 2816),
}  # fmt: skip
"""Of the model: rows and columns of the projections of queries and latents, of keys and values, and so on."""
EXPERTS, TOPK, DIM, WIDTH, SHARED = 64, 6, 2048, 1408, 2816
ROWS = 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 8192, 16384
TOKENS = 64, 128, 256, 384, 512, 768, 1024, 2048, 8192, 16384
Work = Callable[[], object]


def fp8_weight(*shape: int) -> Any:
    from kogia.ops.packed import FORMATS

    return FORMATS["fp8"].pack(0.02 * torch.randn(shape, device="cuda"))


def rows_of(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, device="cuda", dtype=torch.bfloat16)


def drawn_experts(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their experts and weights."""
    ids = torch.rand(tokens, EXPERTS, device="cuda").topk(TOPK, -1).indices
    return rows_of(tokens, DIM), ids, torch.rand(tokens, TOPK, device="cuda")


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for size in (1 << 12, 1 << 20, 1 << 24, 1 << 28):
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")


@torch.no_grad()
def checked_products() -> Iterator[tuple[str, float, float]]:
    """(id, error beside the same products by their references, its bound)."""
    from kogia.ops.dispatch import use_backend
    from kogia.ops.w8a8 import products

    plain = ["quantize_rows", "rows_product", "grouped_product", "silu_mul_rows", "silu_mul", "gathered_sum"]

    def compared(id: str, work: Callable[[], torch.Tensor], bound: float) -> tuple[str, float, float]:
        poison()
        got = work().double()
        with use_backend("reference", plain):
            want = work().double()
        return id, float((got - want).norm() / want.norm()), bound

    for name, shape in MATRICES.items():
        weight, bias = fp8_weight(*shape), rows_of(1, shape[0])[0]
        for rows in (1, 513, 1026):
            work = partial(products.linear, rows_of(rows, shape[1]), weight, bias)
            yield compared(f"check-product-{name}-{rows}", work, 5e-3)
    gate_up, down = fp8_weight(8, 2, WIDTH, DIM), fp8_weight(8, DIM, WIDTH)
    shared = fp8_weight(SHARED, DIM), fp8_weight(SHARED, DIM), fp8_weight(DIM, SHARED)
    for tokens in (3, 515, 2049):
        x, ids, weights = drawn_experts(tokens)
        ids = ids % 10 - 1  # some nobody's, expert 0 the rarest
        ids = torch.where(ids == 8, 3, ids).masked_fill(ids == 5, 4)  # expert 5 has no rows
        work = partial(products.mix_experts, x, ids, weights, gate_up, down, shared=shared, residual=x)
        yield compared(f"check-experts-{tokens}", work, 0.02)  # some numbers round to the code beside


@torch.no_grad()
def timed_products(say: Callable[..., None]) -> Crossovers:
    """Say what each takes by number of rows; returns from where on FP8 is the fastest."""
    from kogia.ops import linear as linears
    from kogia.ops import moe
    from kogia.ops.triton import linear as few_rows
    from kogia.ops.triton import moe as few_tokens
    from kogia.ops.w8a8 import products

    found = []
    for name, (width, depth) in MATRICES.items():
        copies = -(-(1 << 27) // (width * depth))  # so that the cache does not hold them
        weights = [fp8_weight(width, depth) for _ in range(copies)]
        dense = [weight.dense(torch.bfloat16) for weight in weights]
        times = {}
        for rows in ROWS:
            x = rows_of(rows, depth)
            ways = {"fp8": [partial(products.linear, x, w) for w in weights]}
            if few_rows.linear_supports(x, weights[0]) is None:
                ways["few_rows"] = [partial(few_rows.linear, x, w) for w in weights]
            ways["made_dense"] = [partial(linears.linear.reference, x, w) for w in weights]
            ways["bf16"] = [partial(torch.nn.functional.linear, x, w) for w in dense]
            times[rows] = said(say, f"product-{name}-{rows}", ways)
        found.append(crossover(times))
        say(f"crossover-{name}", found[-1], "rows")
    gate_up, down = fp8_weight(EXPERTS, 2, WIDTH, DIM), fp8_weight(EXPERTS, DIM, WIDTH)
    shared = fp8_weight(SHARED, DIM), fp8_weight(SHARED, DIM), fp8_weight(DIM, SHARED)
    routed = gate_up.dense(torch.bfloat16), down.dense(torch.bfloat16)
    both = tuple(weight.dense(torch.bfloat16) for weight in shared)
    times = {}
    for tokens in TOKENS:
        x, ids, weights = drawn_experts(tokens)
        work = {"shared": shared, "residual": x}
        ways = {"fp8": [partial(products.mix_experts, x, ids, weights, gate_up, down, **work)]}
        if few_tokens.mix_experts_supports(x, ids, weights, gate_up, down, **work) is None:
            ways["few_rows"] = [partial(few_tokens.mix_experts, x, ids, weights, gate_up, down, **work)]
        ways["made_dense"] = [partial(moe.mix_experts.reference, x, ids, weights, gate_up, down, **work)]
        ways["bf16"] = [partial(moe.mix_experts, x, ids, weights, *routed, shared=both, residual=x)]
        times[tokens] = said(say, f"experts-{tokens}", ways)
    say("crossover-experts", crossover(times), "tokens")
    return int(median(found)), crossover(times)


def said(say: Callable[..., None], id: str, ways: Mapping[str, Sequence[Work]]) -> dict[str, float]:
    """Microseconds of each way; the first is the figure."""
    with fp8_from((NEVER, NEVER)):  # the others' own products stay what they are
        times = {way: microseconds(calls) for way, calls in ways.items()}
    first, *others = times
    say(id, times[first], "us", **{f"{way}_us": round(times[way], 2) for way in others})
    return times


def crossover(times: dict[int, dict[str, float]]) -> int:
    """The least number from which on FP8 takes no longer than the others with the same weight."""
    best = NEVER
    for rows in sorted(times, reverse=True):
        each = times[rows]
        if each["fp8"] > min(value for way, value in each.items() if way not in ("fp8", "bf16")):
            break
        best = rows
    return best


def microseconds(calls: Sequence[Work], repeats: int = 5) -> float:
    """Of one call, the median over replays of a graph of all of them."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(times[1:])


def drawn(config: Any, format: str) -> Any:
    """A bf16 model on the GPU with random weights, packed where `format` is not "none"."""
    from kogia.model.quantised import build_packed
    from kogia.model.transformer import build_model

    if format == "none":
        return build_model(config, device="cuda", dtype=torch.bfloat16)
    return build_packed(config, format, device="cuda", dtype=torch.bfloat16)


def check(format: str, layers: int = 4) -> Any:
    """Log-probabilities of greedy tokens, with graphs and without, beside those of the same weights in float32."""
    from dataclasses import replace

    from engine_gpu import build_engine, params_of, prompts_of, v2_lite_config

    from kogia.model.linear import Linear
    from kogia.model.packed import pack
    from kogia.model.transformer import build_model
    from kogia.ops.dispatch import use_backend

    model = drawn(v2_lite_config(layers), format)
    prompts = [p[: 40 + 97 * i] for i, p in enumerate(prompts_of(6, 700))]
    params = replace(params_of(24), logprobs=True)
    found = {}
    for name, options in (("eager", {"graphs": False}), ("graphs", {}), ("fp8-rows", {"cache_dtype": "fp8"})):
        engine = build_engine(model, num_blocks=400, max_sequences=16, **options)
        found[name] = [c[0] for c in engine.generate(prompts, params)]
    wide = build_model(model.config, device="cuda", dtype=torch.float32)
    sources = dict(model.named_modules())
    with torch.no_grad(), use_backend("reference"):
        for name, module in wide.named_modules():
            source = sources[name]
            if isinstance(module, Linear):
                module.weight.copy_(source.dense_weight(torch.float32))
            else:
                for key, parameter in module.named_parameters(recurse=False):
                    parameter.copy_(getattr(source, key))
        for name, outputs in found.items():
            whole = pack([p + c.token_ids for p, c in zip(prompts, outputs, strict=True)]).to("cuda")
            want = wide.logprobs(whole).cpu()
            ends = np.cumsum(whole.segments.lengths)
            gaps = [
                abs(float(want[e - 24 + i]) - c.logprobs[i])
                for e, c in zip(ends, outputs, strict=True)
                for i in range(24)
            ]
            yield f"check-{format}-{name}", float(np.mean(gaps)), {"worst": round(max(gaps), 4)}


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
