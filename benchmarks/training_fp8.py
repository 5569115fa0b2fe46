"""Training in FP8 on one Hopper GPU: whether every kernel is right and how fast, and what a step takes.

    python benchmarks/training_fp8.py [--parts check quantise dense grouped outer step] [--out FILE]

check     every kernel and whole layers against float64, on fresh random inputs and poisoned memory
quantise  the rounding kernels, in TB/s of what they must move
dense     cuBLAS with scales by block beside bf16, forward and for a gradient of a weight
grouped   the experts' kernel with many tiles, beside bf16 and row-wise FP8 of PyTorch; 64 experts, 98,304 rows
outer     gradients of experts' weights in bf16 and FP8, bringing rows into order; products in 16 bits beside CUTLASS
step      `train_step` of a model of hidden size 2048 with 64 experts of 1408, FP8 beside bf16, each in its own process
compiled  the same with layers compiled (FP8 products break their graphs)

Each part takes less than two minutes and is a process of its own: what fails is reported, and the rest goes on. Results
are added to the file as they come. Without a GPU all is tiny and runs in Triton's interpreter: to try the script.
"""

# ruff: noqa: B023  (what is timed is called before its variables change)

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

from result import row, write_result  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from kogia.data.loader import Batch  # noqa: E402
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig  # noqa: E402
from kogia.model.fp8 import train_in_fp8  # noqa: E402
from kogia.model.packed import PackedTokens  # noqa: E402
from kogia.model.transformer import Transformer, build_model  # noqa: E402
from kogia.ops import blockwise  # noqa: E402
from kogia.ops.blockwise import Blocks, Rows, WeightForms, fp8_experts, fp8_linears  # noqa: E402
from kogia.ops.dispatch import which  # noqa: E402
from kogia.ops.linear import grouped_linear, grouped_outer  # noqa: E402
from kogia.ops.moe import mix_experts  # noqa: E402
from kogia.ops.segments import segments_of  # noqa: E402
from kogia.train.config import OptimConfig  # noqa: E402
from kogia.train.loss import LossWeights, supervised_loss  # noqa: E402
from kogia.train.optim import build_optimizer  # noqa: E402
from kogia.train.step import TrainState, train_step  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
EXPERTS, DIM, WIDTH, TOPK, TOKENS = (64, 2048, 1408, 6, 16384) if ON_GPU else (4, 256, 128, 2, 64)
ROUTED = TOKENS * TOPK
LENGTH, VOCAB, LAYERS = (4096, 32000, 4) if ON_GPU else (32, 64, 2)
WARM_UP, STEPS = (6, 14) if ON_GPU else (1, 2)
PRODUCTS = {"dtype": "bf16", "fp8": "fp8"}
ROWS: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["check", "quantise", "dense", "grouped", "outer", "step"]
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="after which grouped begins nothing more")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step, of 16,384 tokens each")
    parser.add_argument("--profile", type=Path, help="directory for the kernels of a step in FP8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_fp8.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measured_step(**json.loads(args.child))))
        return
    if len(args.parts) > 1:
        others = [each for each in sys.argv[1:] if each not in (*args.parts, "--parts")]
        for name in args.parts:
            subprocess.run([sys.executable, __file__, *others, "--parts", name], check=False)
        return
    say(device=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__, dtype=str(DTYPE))
    for name in args.parts:
        start = time.perf_counter()
        attempt(name, partial(PARTS[name], args))
        say(part=name, seconds=round(time.perf_counter() - start, 1))
        write_result(args.out, "training in FP8", [*earlier(args.out), *ROWS])


def earlier(path: Path) -> list[dict[str, Any]]:
    """What the file has of other parts."""
    new = {each["id"] for each in ROWS}
    return [each for each in json.loads(path.read_text())["rows"] if each["id"] not in new] if path.exists() else []


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def record(id: str, value: float, unit: str, **extra: Any) -> None:
    ROWS.append(row(id, value, unit, **extra))
    say(**ROWS[-1])


def attempt(name: str, work: Callable[[], Any]) -> Any:
    """What it returns, or None with the error said: one failure must not hide what else there is."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:600]}"
        ROWS.append({"id": name, "error": text})
        say(failed=name, error=text, at=f"{Path(where.filename).name}:{where.lineno}")
        if ON_GPU and "CUDA error" in text:
            say(note="the device is in an unknown state after this; run the other parts by themselves")
        return None


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * std).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def seconds(*calls: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Sorted times of one call, of a graph of all of them where there is a GPU: inputs differ, so no cache helps."""
    for call in calls:
        call()
    if not ON_GPU:
        begin = time.perf_counter()
        calls[0]()
        return [time.perf_counter() - begin]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)


def timed(id: str, amount: float, unit: str, *calls: Callable[[], Any], **extra: Any) -> float:
    """`amount` per second in 1e12, recorded with its spread."""
    times = seconds(*calls)
    value = amount / median(times) / 1e12
    spread = {"low": amount / times[-1] / 1e12, "high": amount / times[0] / 1e12}
    record(id, value, unit, **spread, us=round(median(times) * 1e6, 1), **extra)
    return value


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28)[: 5 if ON_GPU else 2]:
        torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)


# --- check


def check(args: argparse.Namespace) -> None:
    for name, work in CHECKS.items():
        poison()
        found = attempt(f"check-{name}", work)
        if found is None:
            continue
        for what, (value, bound) in found.items():
            ROWS.append(row(f"check-{name}-{what}", value, "relative error", limit=bound, passed=value <= bound))
            say(check=f"{name} {what}", error=float(f"{value:.3g}"), bound=bound, passed=value <= bound)


Found = dict[str, tuple[float, float]]
"""What -> (error, bound)."""


def check_rounding() -> Found:
    from kogia.ops.triton import blockwise as kernels

    found: Found = {}
    for rows, width in ((1, 16), (257, 300), (1024, 2048) if ON_GPU else (130, 256)):
        x = randn(rows, width) * torch.exp(2 * randn(rows, 1))
        x = x.to(DTYPE)
        for powers in (False, True):
            both = kernels.quantize_both(x, power_of_two=powers)
            alone = kernels.quantize_rows(x, power_of_two=powers)
            want = blockwise.quantize_rows.reference(x, power_of_two=powers)
            turned = blockwise.quantize_columns.reference(x)
            case = f"{rows}x{width}{'-powers' if powers else ''}"
            for name, ours, theirs in (("rows", alone, want), ("both", both[0], want), ("columns", both[1], turned)):
                found[f"{name}-{case}"] = differing(ours, theirs), 1e-3
        weight = randn(3, rows, width)
        forms, want = kernels.quantize_weight(weight), blockwise.quantize_weight.reference(weight)
        found[f"weight-{rows}x{width}"] = differing(forms.forward, want.forward), 1e-3
        found[f"turned-{rows}x{width}"] = differing(forms.backward, want.backward), 1e-3
    return found


def differing(ours: Rows | Blocks, theirs: Rows | Blocks) -> float:
    """The share of codes that differ; infinite where scales do by more than a rounding."""
    if ours.codes.shape != theirs.codes.shape or not torch.allclose(ours.scale, theirs.scale, rtol=1e-6, atol=0):
        return float("inf")
    return float((ours.codes.float() != theirs.codes.float()).float().mean()) if ours.codes.numel() else 0.0


def check_activation() -> Found:
    from kogia.ops.triton import blockwise as kernels

    found: Found = {}
    for rows, width in ((1, 16), (300, 200), (999, WIDTH) if ON_GPU else (40, WIDTH)):
        both, grad, weights = randn(rows, 2 * width), randn(rows, width), torch.rand(rows, device=DEVICE)
        got = kernels.weighted_silu_mul_rows(both, weights)
        want = blockwise.weighted_silu_mul_rows.reference(both.double(), weights.double())
        found[f"forward-{rows}x{width}"] = error(got.dense(), want.dense()), 0.02
        ours = kernels.weighted_silu_mul_rows_backward(grad, both, weights)
        theirs = blockwise.weighted_silu_mul_rows_backward.reference(grad, both, weights)
        for name, a, b in zip(("both", "weights", "hidden"), ours[:3], theirs[:3], strict=True):
            found[f"{name}-{rows}x{width}"] = error(a, b), 5e-3
        found[f"rows-{rows}x{width}"] = error(ours[3].dense(), theirs[3].dense()), 0.02
    return found


def check_dense() -> Found:
    found: Found = {}
    for rows, width, depth in ((1, 16, 16), (77, 576, 2048), (513, 1408, 300)) if ON_GPU else ((5, 32, 150),):
        x, weight = blockwise.quantize_rows(randn(rows, depth)), blockwise.quantize_weight(randn(width, depth))
        exact = x.dense().double() @ weight.forward.dense().double().T
        found[f"product-{rows}x{width}x{depth}"] = error(blockwise.rows_product(x, weight.forward, DTYPE), exact), 5e-3
    for rows, a, b in ((256, 576, 2048), (1000, 128, 272)) if ON_GPU else ((40, 32, 48),):
        x, y = blockwise.quantize_columns(randn(rows, a)), blockwise.quantize_columns(randn(rows, b))
        exact = x.dense().double() @ y.dense().double().T
        for dtype in {DTYPE, torch.float32}:
            case = f"outer-{rows}x{a}x{b}-{str(dtype).removeprefix('torch.')}"
            found[case] = error(blockwise.rows_outer(x, y, dtype), exact), 5e-3
    return found


def check_grouped() -> Found:
    from kogia.ops.triton import hopper_grouped
    from kogia.ops.triton.grouped import TILE, tiled_product

    found: Found = {}
    cases: list[tuple[list[int], int, int]] = [([40, 0, 133, 1], 144, 300), ([0, 0, 5, 0], 16, 128)]
    if ON_GPU:
        cases += [([128] * 8, 2816, 2048), ([0, 777, 1, 300, 0, 0, 4096, 129], 1408, 2048), ([1000] * 64, 2048, 1408)]
    for counts, width, depth in cases:
        beyond = 9
        a = blockwise.quantize_rows(randn(sum(counts) + beyond, depth))
        b = blockwise.quantize_weight(randn(len(counts), width, depth)).forward
        tiles = (TILE, replace(TILE, flatten=True), replace(TILE, parts=2), replace(TILE, rows=64, warps=4))
        for tile in tiles if len(counts) < 10 else (TILE,):
            poison()
            got = tiled_product(a, b, torch.tensor(counts, device=DEVICE), DTYPE, tile)
            dense, start, parts = a.dense().double(), 0, []
            for e, count in enumerate(counts):
                parts.append(dense[start : start + count] @ Blocks(b.codes[e], b.scale[e]).dense().double().T)
                start += count
            case = f"{len(counts)}x{width}x{depth}-{tile.rows}x{tile.columns}x{tile.parts}{'-flat' * tile.flatten}"
            found[case] = error(got[: sum(counts)], torch.cat(parts)), 5e-3
            found[f"{case}-nobody"] = float((~got.isfinite()).sum()), 0.0
        for shape in shapes() if ON_GPU else ():
            poison()
            got = hopper_grouped.shaped_product(a, b, torch.tensor(counts, device=DEVICE), DTYPE, shape)
            case = f"{len(counts)}x{width}x{depth}-{name_of(shape)}"
            found[case] = error(got[: sum(counts)], torch.cat(parts)), 5e-3
            found[f"{case}-nobody"] = float((~got.isfinite()).sum()), 0.0
    return found


def check_outer() -> Found:
    found: Found = {}
    cases: list[tuple[list[int], int, int]] = [([40, 0, 133, 1], 144, 48), ([0, 0, 5, 0], 16, 16)]
    if ON_GPU:
        cases += [([128] * 8, 2816, 2048), ([0, 777, 1, 300, 0, 0, 4096, 129], 200, 1408)]
    for counts, height, width in cases:
        routed, numbers = sum(counts) + 3, torch.tensor(counts, device=DEVICE)
        x, dy, places = randn(50, width), randn(routed, height), torch.randint(50, (routed,), device=DEVICE)
        dy[sum(counts) :] = 0
        poison()
        a, b = (blockwise.quantize_routed_columns(*each, numbers) for each in ((dy, None), (x, places)))
        case = f"{len(counts)}x{height}x{width}"
        parts = blockwise.quantize_routed_columns.reference(x, places, numbers).split()
        found[f"{case}-rounding"] = max(differing(*each) for each in zip(b.split(), parts, strict=True)), 1e-3
        poison()
        got = blockwise.routed_outer(a, b, DTYPE)
        pairs = zip(a.split(), b.split(), strict=True)
        want = torch.stack([left.dense().double() @ right.dense().double().T for left, right in pairs])
        found[case] = error(got, want), 5e-3
        found[f"{case}-none"] = float(got[:-1][numbers[:-1] == 0].abs().sum()), 0.0
    return found


def check_halves() -> Found:
    """The grouped product in 16 bits, with weights as they lie and transposed."""
    if not ON_GPU:
        return {}
    from kogia.ops.triton.hopper_grouped import halves_product

    found: Found = {}
    for counts, width, depth in (([40, 0, 133, 1], 136, 192), ([0, 777, 1, 300, 0, 0, 4096, 129], 1408, 2048)):
        routed, experts = sum(counts) + 3, len(counts)
        x, numbers = randn(routed, depth), torch.tensor(counts, device=DEVICE)
        for name, weight in (("", randn(experts, width, depth)), ("-turned", randn(experts, depth, width).mT)):
            poison()
            got, start = halves_product(x, weight, numbers), 0
            for e, count in enumerate(counts):
                part, want = got[start : start + count], x[start : start + count].double() @ weight[e].double().T
                found[f"{experts}x{width}x{depth}{name}-{e}"] = error(part, want) if count else 0.0, 5e-3
                start += count
            found[f"{experts}x{width}x{depth}{name}-nobody"] = float((~got.isfinite()).sum()), 0.0
    return found


def check_layers() -> Found:
    """FP8 errs by 3.7% a product of random numbers; the bounds leave room for two of them in a row."""
    found: Found = {}
    x, weight, dy = randn(300, 512, std=1), randn(256, 512, std=0.05), randn(300, 256)
    exact = x.double() @ weight.double().T, dy.double() @ weight.double(), dy.double().T @ x.double()
    for gradient in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        (y,) = fp8_linears(leaves[0], leaves[1:], [WeightForms()], fp8_gradient=gradient)
        y.backward(dy)
        for name, got, want in zip(("y", "dx", "dw"), (y, leaves[0].grad, leaves[1].grad), exact, strict=True):
            assert got is not None
            found[f"linear-{name}{'-fp8' if gradient else ''}"] = error(got, want), 0.05
    tokens, experts, dim, width = (2000, 16, 512, 384) if ON_GPU else (40, 4, 128, 64)
    operands = randn(tokens, dim), torch.rand(tokens, 2, device=DEVICE), randn(experts, 2, width, dim, std=0.05)
    operands = *operands, randn(experts, dim, width, std=0.05)
    ids = torch.rand(tokens, experts, device=DEVICE).topk(2, -1).indices
    dy, wide = randn(tokens, dim), [t.detach().double().requires_grad_() for t in operands]
    want = mix_experts(wide[0], ids, wide[1], wide[2], wide[3])
    want.backward(dy.double())
    for gradient in (False, True):
        leaves = [t.clone().requires_grad_() for t in operands]
        forms = WeightForms(), WeightForms()
        how = {"fp8_gradient": gradient, "power_of_two": True}
        got = fp8_experts(leaves[0], ids, leaves[1], leaves[2], leaves[3], forms, **how)
        got.backward(dy)
        name = "-fp8" if gradient else ""
        found[f"experts-y{name}"] = error(got, want), 0.08
        for part, ours, theirs in zip(("dx", "dweights", "dgate_up", "ddown"), leaves, wide, strict=True):
            assert ours.grad is not None and theirs.grad is not None
            found[f"experts-{part}{name}"] = error(ours.grad, theirs.grad), 0.1
    return found


def check_backends() -> Found:
    """Not a number of anything: which of the ops have their kernel here."""
    for name, backends in which(DEVICE).items():
        if name in FP8_OPS:
            say(op=name, backends=backends)
    return {}


FP8_OPS = tuple(name for name in vars(blockwise) if hasattr(getattr(blockwise, name), "reference"))
CHECKS: dict[str, Callable[[], Found]] = {
    "backends": check_backends,
    "rounding": check_rounding,
    "activation": check_activation,
    "dense": check_dense,
    "grouped": check_grouped,
    "outer": check_outer,
    "halves": check_halves,
    "layers": check_layers,
}


# --- speed of kernels


def quantise(args: argparse.Namespace) -> None:
    both, weights = randn(ROUTED, 2 * WIDTH), torch.rand(ROUTED, device=DEVICE)
    x, grad = randn(TOKENS, DIM), randn(ROUTED, WIDTH)
    stack = randn(EXPERTS, 2 * WIDTH, DIM)
    width = DTYPE.itemsize
    jobs: dict[str, tuple[float, Callable[[], Any]]] = {
        "rows": (x.numel() * (width + 1), lambda: blockwise.quantize_rows(x)),
        "columns": (x.numel() * (width + 1), lambda: blockwise.quantize_columns(x)),
        "both": (x.numel() * (width + 2), lambda: blockwise.quantize_both(x)),
        "weights": (stack.numel() * (width + 2), lambda: blockwise.quantize_weight(stack)),
        "silu": (both.numel() * (width + 0.5), lambda: blockwise.weighted_silu_mul_rows(both, weights)),
        "silu-backward": (
            both.numel() * (width * 3 + 1),
            lambda: blockwise.weighted_silu_mul_rows_backward(grad, both, weights),
        ),
    }
    rows = blockwise.quantize_rows(x)
    places = torch.randint(TOKENS, (ROUTED,), device=DEVICE)
    jobs["gather"] = (2 * ROUTED * DIM, lambda: rows.gathered(places))
    for name, (nbytes, work) in jobs.items():
        attempt(f"quantise-{name}", partial(timed, f"quantise-{name}", nbytes, "TB/s", work))


def dense(args: argparse.Namespace) -> None:
    for rows, width, depth in ((TOKENS, 10944, DIM), (TOKENS, DIM, 10944), (TOKENS, 3072, DIM)):
        work, case = 2.0 * rows * width * depth, f"{rows}x{width}x{depth}"
        x, weight = randn(rows, depth), randn(width, depth)
        a, b = blockwise.quantize_rows(x), blockwise.quantize_weight(weight).forward
        timed(f"dense-bf16-{case}", work, "TFLOP/s", lambda: x @ weight.T)
        fp8 = lambda: blockwise.rows_product(a, b, DTYPE)  # noqa: E731
        attempt(f"dense-fp8-{case}", partial(timed, f"dense-fp8-{case}", work, "TFLOP/s", fp8))
        y = randn(rows, width)
        c, d = blockwise.quantize_columns(y), blockwise.quantize_columns(x)
        timed(f"outer-bf16-{case}", work, "TFLOP/s", lambda: y.T @ x)
        fp8 = lambda: blockwise.rows_outer(c, d, DTYPE)  # noqa: E731
        attempt(f"outer-fp8-{case}", partial(timed, f"outer-fp8-{case}", work, "TFLOP/s", fp8))


def counts_of(kind: str) -> Tensor:
    """Rows of each expert: even, or as a router that is not quite balanced leaves them."""
    if kind == "even":
        return torch.full((EXPERTS,), ROUTED // EXPERTS, device=DEVICE)
    shares = torch.rand(EXPERTS, device=DEVICE) + 0.3
    counts = (shares / shares.sum() * ROUTED).long()
    counts[0] += ROUTED - counts.sum()
    return counts


def tiles() -> Iterator[Any]:
    """The likeliest first."""
    from kogia.ops.triton.grouped import TILE

    yield TILE
    yield replace(TILE, flatten=True)
    yield replace(TILE, parts=2)
    if not ON_GPU:
        return
    yield replace(TILE, stages=3, programs=2, registers=128)
    yield replace(TILE, rows=64, warps=4, stages=3, programs=3)
    yield replace(TILE, rows=256, stages=3)
    yield replace(TILE, columns=64, warps=4, stages=3, programs=3)
    yield replace(TILE, stages=5)
    yield replace(TILE, parts=2, stages=3)
    yield replace(TILE, parts=2, flatten=True)
    yield replace(TILE, stages=3, flatten=True)
    yield replace(TILE, rows=64, warps=4, stages=4, programs=2)
    yield replace(TILE, rows=64, warps=4, stages=4, programs=2, flatten=True)
    yield replace(TILE, rows=64, parts=2, warps=4, stages=3)
    yield replace(TILE, columns=64, parts=2)
    yield replace(TILE, rows=256, warps=16, stages=3)
    yield replace(TILE, warps=4, stages=3)


def shapes() -> Iterator[Any]:
    """Of the kernel whose warps have roles, the likeliest first."""
    from kogia.ops.triton.hopper_grouped import SHAPE

    yield SHAPE
    yield replace(SHAPE, stages=3)
    yield replace(SHAPE, columns=64, stages=6)
    yield replace(SHAPE, groups=2, stages=5, registers=168)
    yield replace(SHAPE, groups=2, stages=6, registers=168)
    yield replace(SHAPE, groups=2, stages=6, registers=168, columns=64)


def name_of(settings: Any) -> str:
    return "-".join(f"{k[0]}{v}" for k, v in asdict(settings).items())


def grouped(args: argparse.Namespace) -> None:
    from kogia.ops.triton import hopper_grouped
    from kogia.ops.triton.grouped import TILE, tiled_product
    from kogia.ops.triton.hopper_grouped import SHAPE

    end, counts = time.perf_counter() + args.seconds, counts_of("even")
    work = 2.0 * ROUTED * WIDTH * DIM
    x, weights = randn(ROUTED, DIM), [randn(EXPERTS, WIDTH, DIM) for _ in range(2)]
    attempt("grouped-bf16", partial(
        timed, "grouped-bf16", work, "TFLOP/s", *(partial(grouped_linear, x, w[:, None], counts) for w in weights)
    ))  # fmt: skip
    attempt("grouped-rowwise-torch", partial(rowwise, x, weights[0], counts, work))
    a, stacks = blockwise.quantize_rows(x), [blockwise.quantize_weight(w).forward for w in weights]
    speeds: dict[Any, float] = {}
    for shape in shapes() if ON_GPU else ():
        name = f"grouped-fp8-roles-{name_of(shape)}"
        calls = [partial(hopper_grouped.shaped_product, a, b, counts, DTYPE, shape) for b in stacks]
        speed = attempt(name, partial(timed, name, work, "TFLOP/s", *calls, **asdict(shape)))
        if speed is not None:
            speeds[shape] = speed
    for tile in tiles():
        if time.perf_counter() > end:
            say(note="no time for more tiles; --seconds gives more")
            break
        name = f"grouped-fp8-{name_of(tile)}"
        calls = [partial(tiled_product, a, b, counts, DTYPE, tile) for b in stacks]
        speed = attempt(name, partial(timed, name, work, "TFLOP/s", *calls, **asdict(tile)))
        if speed is not None:
            speeds[tile] = speed
    if not speeds:
        return
    best = max(speeds, key=lambda settings: speeds[settings])
    default = speeds.get(SHAPE, speeds.get(TILE))
    record("fp8-grouped-tflops", speeds[best], "TFLOP/s", limit=700, default=default, **asdict(best))
    ragged = counts_of("ragged")
    calls = [partial(tiled_product, a, b, ragged, DTYPE, TILE) for b in stacks]
    attempt("grouped-fp8-ragged", partial(timed, "grouped-fp8-ragged", work, "TFLOP/s", *calls))
    both = [SHAPE, replace(SHAPE, groups=2, stages=5, registers=168)] if ON_GPU else []
    for shape in both:
        calls = [partial(hopper_grouped.shaped_product, a, b, ragged, DTYPE, shape) for b in stacks]
        name = f"grouped-fp8-ragged-roles-{shape.groups}"
        attempt(name, partial(timed, name, work, "TFLOP/s", *calls))
    for width, depth in ((2 * WIDTH, DIM), (DIM, WIDTH), (DIM, 2 * WIDTH)):
        y = blockwise.quantize_rows(randn(ROUTED, depth))
        b = blockwise.quantize_weight(randn(EXPERTS, width, depth)).forward
        call, amount = partial(tiled_product, y, b, counts, DTYPE, TILE), 2.0 * ROUTED * width * depth
        name = f"grouped-fp8-{ROUTED}x{width}x{depth}"
        attempt(name, partial(timed, name, amount, "TFLOP/s", call))
        for shape in both:
            call = partial(hopper_grouped.shaped_product, y, b, counts, DTYPE, shape)
            attempt(name, partial(timed, f"{name}-roles-{shape.groups}", amount, "TFLOP/s", call))


def outer(args: argparse.Namespace) -> None:
    """Gradients of the experts' weights, in bf16 and in FP8, and what comes before each: bringing rows into order."""
    counts, work = counts_of("even"), 2.0 * ROUTED * WIDTH * DIM
    x, dy, places = randn(TOKENS, DIM), randn(ROUTED, WIDTH), torch.randint(TOKENS, (ROUTED,), device=DEVICE)
    ordered = x.index_select(0, places)
    timed("outer-bf16", work, "TFLOP/s", partial(grouped_outer, dy, ordered, counts))
    timed("outer-bf16-order", 4.0 * ordered.numel(), "TB/s", partial(torch.index_select, x, 0, places))
    for name, rows, where in (("order", x, places), ("in-order", dy, None)):
        call = partial(blockwise.quantize_routed_columns, rows, where, counts)
        timed(f"outer-fp8-{name}", 3.0 * (ROUTED if where is not None else len(rows)) * rows.shape[1], "TB/s", call)
    a, b = blockwise.quantize_routed_columns(dy, None, counts), blockwise.quantize_routed_columns(x, places, counts)
    attempt("outer-fp8", partial(timed, "outer-fp8", work, "TFLOP/s", partial(blockwise.routed_outer, a, b, DTYPE)))
    if ON_GPU:
        from kogia.ops.aten.linear import grouped_linear as by_cutlass
        from kogia.ops.triton.hopper_grouped import halves_product, shaped_outer

        for width, depth in ((2 * WIDTH, DIM), (DIM, WIDTH), (WIDTH, DIM), (DIM, 2 * WIDTH)):
            rows, stack = randn(ROUTED, depth), randn(EXPERTS, width, depth)
            for name, weight in (("", stack), ("-turned", stack.mT.contiguous().mT)):
                for who, call in (("cutlass", by_cutlass), ("roles", halves_product)):
                    id, amount = f"grouped-16-{who}-{width}x{depth}{name}", 2.0 * ROUTED * width * depth
                    attempt(id, partial(timed, id, amount, "TFLOP/s", partial(call, rows, weight, counts)))

        call = partial(shaped_outer, a, b, DTYPE, 6)
        attempt("outer-fp8-6-stages", partial(timed, "outer-fp8-6-stages", work, "TFLOP/s", call))


def rowwise(x: Tensor, weight: Tensor, counts: Tensor, work: float) -> None:
    """PyTorch's own grouped product in FP8, with one scale a row."""
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    ones = torch.ones(len(x), device=DEVICE), torch.ones(EXPERTS, WIDTH, device=DEVICE)
    ends = counts.cumsum(0).int()
    call = partial(torch._scaled_grouped_mm, a, b.transpose(1, 2), *ones, offs=ends, out_dtype=torch.bfloat16)
    timed("grouped-rowwise-torch", work, "TFLOP/s", call)


# --- steps


def model_config(layers: int = LAYERS) -> ModelConfig:
    attention = MLAConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    if not ON_GPU:
        attention = MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
    moe = MoEConfig(num_experts=EXPERTS, num_shared_experts=2, topk=TOPK, expert_dim=WIDTH, num_dense_layers=1)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "dim": DIM, "num_layers": layers, "ffn_dim": 10944 if ON_GPU else 384}
    return ModelConfig(**sizes, max_position=LENGTH, attention=attention, moe=moe, num_mtp_layers=0, init_std=0.02)


def state_of(model: Transformer, steps: int, **optim: Any) -> TrainState:
    settings = OptimConfig(**{"schedule": "constant", "warmup_steps": 0, "lr": 1e-4, **optim})
    return TrainState(model, build_optimizer(model, settings), settings, steps)


def batch_of(ids: Tensor, length: int) -> Batch:
    segments = segments_of([length] * (len(ids) // length), DEVICE)
    positions = segments.offsets
    counted = len(ids) - segments.num_seqs
    return Batch(PackedTokens(ids, positions, segments), positions > 0, counted)


def measured_step(
    precision: str, gradients: str, compiled: bool, micro_batches: int, profile: str | None
) -> dict[str, Any]:
    """Tokens per second of each step after the warm-up, in this process."""
    torch.manual_seed(0)
    model = build_model(model_config(), device=DEVICE, dtype=DTYPE)
    if precision == "fp8":
        train_in_fp8(model, gradients, power_of_two=False)  # pyright: ignore[reportArgumentType]
    if compiled:
        model.compile_layers()
    state = state_of(model, WARM_UP + STEPS, moments="bfloat16")
    loss = partial(supervised_loss, weights=LossWeights(mtp=0.0, balance=1e-4))
    values, speeds = [], []

    def step() -> float:
        batches = [batch_of(torch.randint(VOCAB, (TOKENS,), device=DEVICE), LENGTH) for _ in range(micro_batches)]
        return train_step(state, batches, loss)["loss"]

    for i in range(WARM_UP + STEPS):
        synchronize()
        begin = time.perf_counter()
        values.append(step())
        synchronize()
        if i >= WARM_UP:
            speeds.append(micro_batches * TOKENS / (time.perf_counter() - begin))
    memory = torch.cuda.max_memory_allocated() / 1e9 if ON_GPU else 0.0
    if profile:
        kernels(step, Path(profile) / f"fp8-step-{precision}-{gradients}{'-compiled' if compiled else ''}.txt")
    return {"speeds": sorted(speeds), "memory_gb": round(memory, 2), "losses": [round(v, 4) for v in values]}


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def kernels(work: Callable[[], Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        work()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    path.write_text(table)


def child(**work: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return json.loads(done.stdout.splitlines()[-1])


def step(args: argparse.Namespace, compiled: bool = False) -> None:
    how, found = "-compiled" if compiled else "", {}
    profile = None if args.profile is None else str(args.profile)
    variants = [("dtype", "none"), ("fp8", "dense"), ("fp8", "none")]
    for precision, gradients in variants[: 2 if compiled else 3]:
        name = f"step-{PRODUCTS[precision]}{'' if precision == 'dtype' else '-' + gradients}{how}"
        work = {"precision": precision, "gradients": gradients, "compiled": compiled, "profile": profile}
        work["micro_batches"] = args.micro_batches
        got = attempt(name, partial(child, **work))
        if got is None:
            continue
        speeds = got.pop("speeds")
        found[precision, gradients] = median(speeds)
        record(name, median(speeds), "tokens/s", low=speeds[0], high=speeds[-1], **got)
    base = found.pop(("dtype", "none"), None)
    if base and found:
        best = max(found, key=lambda each: found[each])
        record(f"train-fp8-ratio{how}", found[best] / base, "ratio", limit=1.15, weight_gradients=best[1])


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "quantise": quantise,
    "dense": dense,
    "grouped": grouped,
    "outer": outer,
    "step": step,
    "compiled": partial(step, compiled=True),
}

if __name__ == "__main__":
    main()
