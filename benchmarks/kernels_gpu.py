"""Every GPU kernel beside its reference: the error on fresh random inputs, and the time beside the card's own limits.

    python benchmarks/kernels_gpu.py [--only NAME ...] [--sweep] [--out benchmarks/results/kernels_gpu.json]

Errors are ||out - reference|| / ||reference|| against float64 or the float32 reference. Times are medians over replays
of a CUDA graph with several calls in a row on different weights, so that nothing but the activations stays in the
cache. Shapes are DeepSeek-V2-Lite's unless a row says otherwise.
"""

# ruff: noqa: B023  (what is timed is called before its variables change)

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

ROWS: list[dict[str, Any]] = []
DIM, HEADS, LATENT, ROPE, NOPE, V = 2048, 16, 512, 64, 128, 128
EXPERTS, TOPK, WIDTH, SHARED = 64, 6, 1408, 2
DEVICE = "cuda"
CASE = ("op", "shape", "seqs", "count", "context", "length", "heads", "queries", "experts", "score", "tokens")
"""What tells one row from another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--sweep", action="store_true", help="time several configurations of each kernel")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(torch.seed() % 2**31)
    limits = {"copy": copy_rate()}
    say(card=torch.cuda.get_device_name(), copy_tbps=round(limits["copy"], 3))
    for name, part in PARTS.items():
        if name not in (args.only or [n for n in PARTS if n != "attention_one"]):
            continue
        part(limits, args.sweep)
        if args.out:
            write_rows(args.out, limits["copy"])


def write_rows(out: Path, copy: float) -> None:
    """The committed form: one row a case, microseconds, what was measured beside it."""
    from result import row, write_result

    rows = [row("copy-tbps", copy, "TB/s")]
    for fields in ROWS[1:]:
        case = "-".join(str(fields[name]) for name in CASE if name in fields)
        found = {k: round(v, 6) if isinstance(v, float) else v for k, v in fields.items() if k not in ("us", "op")}
        rows.append(row(case, fields.get("us", fields.get("absorb_us", 0.0)), "us", **found))
    write_result(out, "kernels on a GPU", rows)


def say(**fields: Any) -> None:
    ROWS.append(fields)
    print(json.dumps(fields), flush=True)


def copy_rate() -> float:
    a = torch.empty(2**31, dtype=torch.uint8, device=DEVICE).random_()
    b = torch.empty_like(a)
    ms = triton.testing.do_bench(lambda: b.copy_(a), return_mode="median")
    assert isinstance(ms, float)
    return 2 * a.numel() / ms / 1e9


def graph_ms(calls: list[Callable[[], Any]], replays: int = 30) -> float:
    """Median milliseconds of one call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return float(np.median(times))


def error(out: torch.Tensor, want: torch.Tensor) -> float:
    out, want = out.double(), want.double()
    return float((out - want).norm() / want.norm())


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * std).to(dtype)


def norm(limits: dict[str, float], sweep: bool) -> None:
    from kogia.ops.triton.norm import add_rms_norm

    for tokens in (1, 3, 64, 4096):
        x, d, w = randn(tokens, DIM), randn(tokens, DIM), randn(DIM)
        total, out = add_rms_norm(x, d, w, 1e-6)
        wide = (x + d).double()
        want = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w.double()
        ms = graph_ms([lambda: add_rms_norm(x, d, w, 1e-6)] * 20)
        say(op="add_rms_norm", tokens=tokens, error=error(out, want), equal=bool((total == x + d).all()), us=ms * 1e3)


def paged(seqs: int, context: int, heads: int, queries: int = 1, page: int = 16, ragged: bool = False) -> Any:
    from kogia.ops.cache import LatentRow, LayerCache
    from kogia.ops.segments import segments_of

    lens = np.full(seqs, context)
    if ragged:
        lens = np.random.randint(queries, context + 1, seqs)
        lens[0] = queries
    pages = -(-context // page)
    rows = randn((seqs * pages + 1) * page, LATENT + ROPE)
    tables = torch.randperm(seqs * pages, device=DEVICE).view(seqs, pages)
    slots = torch.zeros(seqs * queries, dtype=torch.int64, device=DEVICE)
    cache = LayerCache(rows, slots, tables, torch.from_numpy(lens).to(DEVICE), lens, page, LatentRow(LATENT, ROPE))
    return randn(seqs * queries, heads, LATENT + ROPE), cache, segments_of([queries] * seqs, DEVICE)


def attention(limits: dict[str, float], sweep: bool) -> None:
    from kogia.ops.attention import cached_attention

    scale = 192**-0.5
    for seqs, context, heads, queries in ((1, 1, 16, 1), (5, 700, 16, 1), (3, 300, 16, 2), (2, 200, 128, 1),
                                          (3, 130, 5, 3), (2, 100, 1, 1), (4, 1000, 128, 1), (1, 3000, 128, 2),
                                          (200, 300, 16, 1)):  # fmt: skip
        q, cache, segments = paged(seqs, context, heads, queries, ragged=context > 1)
        want = cached_attention.reference(q.double(), paged_double(cache), segments, scale=scale)
        out = cached_attention(q, cache, segments, scale=scale)
        say(op="attention", seqs=seqs, context=context, heads=heads, queries=queries, error=error(out, want))
    for seqs, context, heads in ((1, 512, 16), (1, 1024, 16), (1, 2048, 16), (1, 4096, 16), (1, 65536, 16),
                                 (16, 576, 16), (16, 4096, 16), (64, 576, 16), (64, 4096, 16), (256, 576, 16),
                                 (64, 4096, 64), (64, 4096, 128), (128, 8192, 128)):  # fmt: skip
        q, cache, segments = paged(seqs, context, heads)
        caches = [cache, *(replace(cache, rows=randn(*cache.rows.shape), shared={}) for _ in range(cold_copies(cache)))]
        read = seqs * context * (LATENT + ROPE) * 2
        flops = 2 * seqs * context * heads * (2 * LATENT + ROPE)
        calls = [
            (lambda at=at: cached_attention(q, at, segments, scale=scale)) for at in caches * -(-10 // len(caches))
        ]
        ms = graph_ms(calls, 10)
        say(op="attention", seqs=seqs, context=context, heads=heads, us=round(ms * 1e3, 2),
            tbps=round(read / ms / 1e9, 3), tflops=round(flops / ms / 1e9, 1))  # fmt: skip


def cold_copies(cache: Any) -> int:
    """More caches of that size, so that none is still in the GPU's own when its turn comes; 16 at most."""
    return min(16, 200_000_000 // cache.rows.nbytes)


def paged_double(cache: Any) -> Any:
    return replace(cache, rows=cache.rows.double(), shared={})


def prefill(limits: dict[str, float], sweep: bool) -> None:
    from kogia.ops.segments import segments_of
    from kogia.ops.triton.prefill import varlen_attention

    for count, length in ((16, 512), (1, 8192)):
        q, k, v = (randn(count * length, HEADS, w) for w in (NOPE + ROPE, NOPE + ROPE, V))
        segments = segments_of([length] * count, DEVICE)
        flops = count * HEADS * length * length * (NOPE + ROPE + V)
        found = []
        others = [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 4)]
        for config in [(128, 64, 8, 3), *(others if sweep else [])]:
            try:
                ms = graph_ms([lambda: varlen_attention(q, k, v, segments, scale=0.07, config=config)] * 3, 10)
            except triton.runtime.errors.OutOfResources:
                continue
            found.append((round(ms * 1e3, 1), round(flops / ms / 1e9, 1), config))
        grid = [x.view(count, length, HEADS, -1).transpose(1, 2) for x in (q, k, v)]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms = graph_ms(
                [lambda: torch.nn.functional.scaled_dot_product_attention(grid[0], grid[1], grid[2], is_causal=True)]
                * 3,
                10,
            )
        say(
            op="prefill",
            count=count,
            length=length,
            cudnn_us=round(ms * 1e3, 1),
            us=found[0][0],
            tflops=found[0][1],
            best=sorted(found)[:6],
        )


def latent(limits: dict[str, float], sweep: bool) -> None:
    from kogia.ops.cache import write_latent
    from kogia.ops.rope import rotate_interleaved
    from kogia.ops.triton import latent as kernels

    for tokens in (1, 5, 64, 200):
        q = randn(tokens, HEADS, NOPE + ROPE)
        up = randn(HEADS, NOPE + V, LATENT, std=0.05)
        w_uk, w_uv = up.split([NOPE, V], 1)
        angle = torch.rand(tokens, ROPE // 2, device=DEVICE) * 6
        cos, sin = angle.cos(), angle.sin()
        out = kernels.absorb_query(q, w_uk, cos, sin)
        want = torch.cat((torch.einsum("thn,hnr->thr", q[..., :NOPE].double(), w_uk.double()),
                          rotate_interleaved(q[..., NOPE:], cos, sin).double()), -1)  # fmt: skip
        mixed = randn(tokens, HEADS, LATENT)
        values = kernels.project_values(mixed, w_uv)
        want_values = torch.einsum("thr,hvr->thv", mixed.double(), w_uv.double())
        _, cache, _ = paged(1, 512, HEADS)
        object.__setattr__(cache, "slots", torch.randperm(512, device=DEVICE)[:tokens])
        kv, weight = randn(tokens, LATENT + ROPE), randn(LATENT)
        before = cache.rows.clone()
        write_latent.reference(kv, cache, weight, cos, sin, eps=1e-6)
        wanted = cache.rows.clone()
        cache.rows.copy_(before)
        kernels.write_latent(kv, cache, weight, cos, sin, eps=1e-6)
        say(op="latent", tokens=tokens, absorb_error=error(out, want), values_error=error(values, want_values),
            write_error=error(cache.rows, wanted),
            absorb_us=graph_ms([lambda: kernels.absorb_query(q, w_uk, cos, sin)] * 20) * 1e3,
            bmm_us=graph_ms([lambda: torch.bmm(q[..., :NOPE].transpose(0, 1), w_uk)] * 20) * 1e3,
            values_us=graph_ms([lambda: kernels.project_values(mixed, w_uv)] * 20) * 1e3,
            bmm_values_us=graph_ms([lambda: torch.bmm(mixed.transpose(0, 1), w_uv.transpose(1, 2))] * 20) * 1e3,
            write_us=graph_ms([lambda: kernels.write_latent(kv, cache, weight, cos, sin, eps=1e-6)] * 20) * 1e3,
        )  # fmt: skip


def router(limits: dict[str, float], sweep: bool) -> None:
    from kogia.ops.moe import route
    from kogia.ops.triton import moe as kernels

    cases = [(EXPERTS, TOPK, 1, 1, "sigmoid", True), (EXPERTS, TOPK, 1, 1, "softmax", False),
             (256, 8, 8, 4, "sigmoid", True), (160, 6, 8, 3, "softmax", False)]  # fmt: skip
    for experts, topk, groups, kept, score, biased in cases:
        for tokens in (1, 4, 5, 64, 256):
            x, w = randn(tokens, DIM), randn(experts, DIM, std=0.02)
            bias = torch.randn(experts, device=DEVICE) * 0.1 if biased else None
            options = {"score": score, "topk": topk, "num_groups": groups, "topk_groups": kept, "normalize": True,
                       "scale": 2.5}  # fmt: skip
            out = kernels.route(x, w, bias, **options)
            want = route.reference(x, w, bias, **options)
            a, order = out.expert_ids.sort(-1)
            b, order_b = want.expert_ids.sort(-1)
            say(op="route", experts=experts, tokens=tokens, score=score, same=float((a == b).float().mean()),
                weights=error(out.weights.gather(1, order), want.weights.gather(1, order_b)),
                scores=error(out.scores, want.scores),
                us=graph_ms([lambda: kernels.route(x, w, bias, **options)] * 20) * 1e3)  # fmt: skip


def experts(limits: dict[str, float], sweep: bool) -> None:
    mixtures(limits, "v2-lite", EXPERTS, TOPK, WIDTH, SHARED, (1, 2, 4, 8, 16, 64, 256))
    mixtures(limits, "e128-k8", 128, 8, 768, 0, (1, 8, 64))


def packed(limits: dict[str, float], sweep: bool) -> None:
    for format in ("int4", "int8", "fp8"):
        mixtures(limits, f"v2-lite-{format}", EXPERTS, TOPK, WIDTH, SHARED, (1, 8, 64, 256), format)
        for tokens in (1, 16, 64, 256):
            for width, depth in ((2048, 2048), (3648, 2048), (32000, 2048), (24576, 1536), (7168, 16384)):
                products(limits, tokens, width, depth, format)


def products(limits: dict[str, float], rows: int, width: int, depth: int, format: str) -> None:
    from kogia.ops.linear import dequantize
    from kogia.ops.triton import linear as kernels

    copies = max(2, 300_000_000 // (width * depth))  # together no part of the cache
    weights = [weight(width, depth, format=format) for _ in range(copies)]
    x = randn(rows, depth)
    want = torch.nn.functional.linear(x.float(), weights[0].dense(torch.float32))
    out = kernels.linear(x, weights[0])
    made = dequantize(weights[0], torch.bfloat16)
    equal = bool((made == weights[0].dense(torch.bfloat16)).all())
    ms = graph_ms([lambda w=w: kernels.linear(x, w) for w in weights[:20]], 20)
    read = weights[0].data.nbytes + weights[0].scale.nbytes
    say(op="linear", shape=f"{width}x{depth}-{format}", tokens=rows, error=error(out, want), equal=equal,
        us=round(ms * 1e3, 2), tbps=round(read / ms / 1e9, 3))  # fmt: skip


def weight(*shape: int, format: str) -> Any:
    """A random weight, dense in bf16 or packed."""
    from kogia.ops.packed import FORMATS

    dense = randn(*shape, std=0.02)
    return dense if format == "bf16" else FORMATS[format].pack(dense)


def mixtures(
    limits: dict[str, float], name: str, num: int, topk: int, width: int, num_shared: int, sizes: Any,
    format: str = "bf16",
) -> None:  # fmt: skip
    from kogia.ops.moe import mix_experts
    from kogia.ops.triton import moe as kernels

    layers = 4
    gate_up = [weight(num, 2, width, DIM, format=format) for _ in range(layers)]
    down = [weight(num, DIM, width, format=format) for _ in range(layers)]
    wide = num_shared * width
    shared: list[Any] = [None] * layers
    if num_shared:
        shared = [tuple(weight(*shape, format=format) for shape in ((wide, DIM), (wide, DIM), (DIM, wide)))
                  for _ in range(layers)]  # fmt: skip

    def numbers(each: Any) -> Any:
        return each.float() if format == "bf16" else each.dense(torch.float32)

    bytes_per_number = 2.0 if format == "bf16" else (down[0].data.nbytes + down[0].scale.nbytes) / num / DIM / width
    for tokens in sizes:
        x, residual, weights = randn(tokens, DIM), randn(tokens, DIM), torch.rand(tokens, topk, device=DEVICE)
        ids = [torch.rand(tokens, num, device=DEVICE).topk(topk).indices for _ in range(8)]
        wides = None if shared[0] is None else tuple(map(numbers, shared[0]))
        want = mix_experts.reference(x.float(), ids[0], weights, numbers(gate_up[0]), numbers(down[0]), shared=wides,
                                     residual=residual.float())  # fmt: skip
        out = kernels.mix_experts(x, ids[0], weights, gate_up[0], down[0], shared=shared[0], residual=residual)

        def call(i: int) -> Callable[[], Any]:
            j = i % layers
            return lambda: kernels.mix_experts(x, ids[i], weights, gate_up[j], down[j], shared=shared[j],
                                               residual=residual)  # fmt: skip

        ms = graph_ms([call(i) for i in range(8)], 20)
        read = (float(np.mean([len(each.unique()) for each in ids])) + num_shared) * 3 * DIM * width * bytes_per_number
        say(op="experts", shape=name, tokens=tokens, error=error(out, want), us=round(ms * 1e3, 2),
            tbps=round(read / ms / 1e9, 3), share=round(read / ms / 1e9 / limits["copy"], 3))  # fmt: skip


PARTS = {each.__name__: each for each in (prefill, norm, latent, router, attention, experts, packed)}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
    main()
