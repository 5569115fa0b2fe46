"""The kernels of a training step on one GPU: whether each is right, how fast, and what they are to whole steps.

    python benchmarks/training_kernels.py [--parts check,time,step,host,profile] [--without NAME ...] [--out FILE]

check    every kernel and its gradients beside the same formula in float64, on fresh random inputs and poisoned memory
time     every kernel forward and backward, in bytes that it must move, beside the rate of a copy and its reference
step     `train_step` of the models of benchmarks/training.py and training_fp8.py (`--shapes large-bf16 large-fp8` are
         twice as wide; with -dense, gradients of dense weights are in FP8 too) with all kernels, without any, and
         without each; before that, loss and gradients of one batch
host     what a step of few tokens takes, which is about what the host needs for one
profile  the kernels that take most of a step

`--without` leaves kernels out of the parts step, host and profile. Results are added to the file; what fails is
reported, and the rest goes on. Without a GPU all is tiny and runs in Triton's interpreter: to try the script.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import training
import training_fp8 as fp8
from result import row, write_result
from torch import Tensor
from training_fp8 import DEVICE, DTYPE, ON_GPU, ROOT, attempt, batch_of, error, poison, randn, record, say, synchronize

from kogia.model.config import ModelConfig
from kogia.model.fp8 import train_in_fp8
from kogia.model.transformer import build_model
from kogia.ops import adamw, latent, moe, norm
from kogia.ops.adamw import Trained, TrainedGroup
from kogia.ops.dispatch import use_backend
from kogia.ops.segments import segments_of
from kogia.train.loss import LossWeights, supervised_loss
from kogia.train.step import TrainState, train_step

KERNELS = {
    "norms": ("rms_norm", "add_rms_norm"),
    "latent": ("latent_and_key", "rotate_query", "keys_and_values"),
    "swiglu": ("silu_mul",),
    "router": ("router_logits",),
    "choice": ("route_logits", "expert_counts", "affinity_sums"),
    "sums": ("residual_sum", "branches"),
    "adamw": ("adamw", "added_up"),
}
"""Name -> the ops that a step does by them, and by their references without them."""
SEQUENCES = 16 if ON_GPU else 2
TOKENS = SEQUENCES * training.LENGTH if ON_GPU else 24
STEPS, WARM_UP = (6, 3) if ON_GPU else (1, 1)
LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.0, balance=1e-4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,time,step")
    parser.add_argument("--without", nargs="+", choices=KERNELS, default=[])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_kernels.json")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts: {sorted(unknown)}; there are {sorted(PARTS)}")
    say(device=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__, dtype=str(DTYPE))
    for name in parts:
        start = time.perf_counter()
        attempt(name, partial(PARTS[name], args))
        say(part=name, seconds=round(time.perf_counter() - start, 1))
        write_result(args.out, "kernels of training", [*fp8.earlier(args.out), *fp8.ROWS])


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Within the block, the references of these kernels' ops run."""
    with ExitStack() as stack:
        if ops := [each for name in names for each in KERNELS[name]]:
            stack.enter_context(use_backend("reference", ops))
        yield


# --- check and time


@dataclass(frozen=True)
class Case:
    """A kernel with its reference and the same in float64, which get `leaves` and then `others`."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    leaves: Sequence[Tensor]
    others: Sequence[Any] = ()
    moved: tuple[float, float] = (0.0, 0.0)
    """Bytes that a forward and a backward pass must read and write."""


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(tokens, half, device=DEVICE) * 100
    return angle.cos(), angle.sin()


def cases(tokens: int, dim: int, width: int, heads: int, sizes: tuple[int, int, int, int]) -> dict[str, Case]:
    """`sizes` are those of a latent and of a head's nope, rope and value."""
    from kogia.ops.aten import router
    from kogia.ops.triton import experts, latent_training, norm_training, router_training, sums

    rank, nope, rope, v = sizes
    x, delta, factor = randn(tokens, dim), randn(tokens, dim), randn(dim)
    gate, up = randn(tokens, width), randn(tokens, width)
    q, both = randn(tokens, heads, nope + rope), randn(tokens, heads, nope + v)
    kv, key, rank_factor = randn(tokens, rank + rope), randn(tokens, 1, rope), randn(rank)
    turn, unit = angles(tokens, rope // 2), tokens * DTYPE.itemsize
    eps = 1e-6
    all_cases = {
        "rms_norm": Case(
            lambda x, w: norm_training.rms_norm(x, w, eps), lambda x, w: norm.rms_norm.reference(x, w, eps),
            (x, factor), moved=(2 * dim * unit, 3 * dim * unit),
        ),
        "add_rms_norm": Case(
            lambda x, d, w: norm_training.add_rms_norm(x, d, w, eps),
            lambda x, d, w: norm.add_rms_norm.reference(x, d, w, eps),
            (x, delta, factor), moved=(4 * dim * unit, 4 * dim * unit),
        ),
        "silu_mul": Case(
            experts.silu_mul, moe.silu_mul.reference, (gate, up), moved=(3 * width * unit, 5 * width * unit)
        ),
        "rotate_query": Case(
            lambda q, c, s: latent_training.rotate_query(q, c, s, nope),
            lambda q, c, s: latent.rotate_query.reference(q, c, s, nope),
            (q,), turn, moved=(2 * heads * (nope + rope) * unit,) * 2,
        ),
        "latent_and_key": Case(
            lambda kv, w, c, s: latent_training.latent_and_key(kv, w, c, s, eps),
            lambda kv, w, c, s: latent.latent_and_key.reference(kv, w, c, s, eps),
            (kv, rank_factor), turn, moved=(2 * (rank + rope) * unit, (3 * rank + 2 * rope) * unit),
        ),
        "keys_and_values": Case(
            lambda both, key: latent_training.keys_and_values(both, key, nope),
            lambda both, key: latent.keys_and_values.reference(both, key, nope),
            (both, key),
            moved=((heads * (2 * nope + rope) + rope) * unit, heads * (2 * nope + 2 * v + rope) * unit),
        ),
    }  # fmt: skip
    all_cases["residual_sum"] = Case(
        sums.residual_sum, norm.residual_sum.reference, (x, delta, randn(tokens, dim)), moved=(4 * dim * unit, 0.0)
    )
    all_cases["branches"] = Case(
        lambda x: sums.branches(x, 3), lambda x: norm.branches.reference(x, 3), (x,), moved=(0.0, 4 * dim * unit)
    )
    logits, count = randn(tokens, 64).float(), min(6, tokens)
    given = torch.rand(tokens, 64, device=DEVICE).topk(count).indices

    def chosen(function: Callable[..., moe.Routed], logits: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        routed = function(
            logits, None, ids, score="sigmoid", topk=count, num_groups=1, topk_groups=1, normalize=True, scale=1.0
        )
        return routed.weights, routed.scores

    scores, segments = logits.sigmoid(), segments_of([tokens - tokens // 3, *([tokens // 3] * (tokens > 2))], DEVICE)
    all_cases["affinity_sums"] = Case(
        router_training.affinity_sums, moe.affinity_sums.reference, (scores,), (segments.owner, segments.cu_seqlens),
        moved=(tokens * 64 * 4, tokens * 64 * 8),
    )  # fmt: skip
    all_cases["route_logits"] = Case(
        partial(chosen, router_training.route_logits), partial(chosen, moe.route_logits.reference), (logits,), (given,),
        moved=(tokens * (2 * 64 * 4 + count * 12), tokens * (3 * 64 * 4 + count * 12)),
    )  # fmt: skip
    if ON_GPU and dim % 8 == 0:
        weight = randn(64, dim, std=0.02)
        all_cases["router_logits"] = Case(
            router.router_logits, moe.router_logits.reference, (x, weight),
            moved=((dim + 2 * 64) * unit, (2 * dim + 2 * 64) * unit),
        )  # fmt: skip
    return all_cases


def check(args: argparse.Namespace) -> None:
    attempt("check-adamw", check_adamw)
    attempt("check-choice", check_choice)
    shapes = [
        (1, 16, 16, 1, (8, 2, 2, 2)),
        (77, 1000, 520, 3, (200, 16, 8, 32)),
        (4099, 1024, 4096, 8, (256, 128, 64, 128)),
    ]
    for shape in shapes if ON_GPU else shapes[:2]:
        for name, case in cases(*shape).items():
            attempt(f"check-{name}", partial(check_case, f"{name}-{shape[0]}", case))


def check_case(name: str, case: Case) -> None:
    """The errors of kernel and reference, each the largest over results and gradients."""
    poison()
    found, outs = {}, {}
    for who, function, kind in (
        ("exact", case.reference, torch.float64), ("kernel", case.kernel, None), ("again", case.kernel, None),
        ("reference", case.reference, None),
    ):  # fmt: skip
        leaves = [leaf.detach().to(kind or leaf.dtype).requires_grad_() for leaf in case.leaves]
        made = function(*leaves, *(in_kind(each, kind) for each in case.others))
        made = [made] if isinstance(made, Tensor) else list(made)
        if who == "exact":
            upstream = [randn(*each.shape) for each in made]
        grads = torch.autograd.grad(made, leaves, [g.to(each.dtype) for g, each in zip(upstream, made, strict=True)])
        outs[who] = [*made, *grads]
    for who in ("kernel", "reference"):
        found[who] = [error(a, b) for a, b in zip(outs[who], outs["exact"], strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(outs["kernel"], outs["again"], strict=True))
    floor = 4e-3 if ON_GPU else 2e-6
    bounds = [max(1.5 * each, floor) for each in found["reference"]]
    passed = same and all(a <= b for a, b in zip(found["kernel"], bounds, strict=True))
    report_check(name, max(found["kernel"]), max(bounds), passed, reference=max(found["reference"]), repeatable=same)
    if not passed:
        say(check=name, kernel=found["kernel"], bounds=bounds)


def in_kind(x: Tensor, kind: torch.dtype | None) -> Tensor:
    return x if kind is None or not x.is_floating_point() else x.to(kind)


def report_check(name: str, value: float, bound: float, passed: bool, **extra: Any) -> None:
    fp8.ROWS.append(row(f"check-{name}", value, "relative error", limit=bound, passed=passed, **extra))
    say(check=name, error=float(f"{value:.3g}"), bound=float(f"{bound:.3g}"), passed=passed, **extra)


def some_trained(sizes: Sequence[int], moments: torch.dtype, grads: torch.dtype, copies: bool) -> TrainedGroup:
    members = []
    for size in sizes:
        weight = torch.randn(size, device=DEVICE)
        grad, first = torch.randn_like(weight).to(grads), (torch.randn_like(weight) * 0.1).to(moments)
        second = torch.rand_like(weight).to(moments)
        copy = torch.empty_like(weight, dtype=torch.bfloat16) if copies else None
        members.append(Trained(weight, grad, first, second, torch.full((), 3.0, device=DEVICE), copy))
    return TrainedGroup(members)


def check_choice() -> None:
    """The experts chosen, of which rounding may exchange some that are as good; and how many copies each gets."""
    from kogia.ops.triton import router_training

    options: dict[str, Any] = {"topk": 6, "num_groups": 1, "topk_groups": 1, "normalize": True, "scale": 1.0}
    logits, bias = randn(4099 if ON_GPU else 50, 64).float(), torch.randn(64, device=DEVICE) * 0.1
    for score in ("sigmoid", "softmax"):
        functions = router_training.route_logits, moe.route_logits.reference
        ids = [f(logits, bias, None, score=score, **options).expert_ids for f in functions]
        others = float((ids[0].sort(-1).values != ids[1].sort(-1).values).float().mean())
        report_check(f"choice-{score}", others, 1e-3, others <= 1e-3)
    for experts in (64, 1024):
        ids = torch.randint(-1, experts, (5003, 6), device=DEVICE)
        same = torch.equal(router_training.expert_counts(ids, experts), moe.expert_counts.reference(ids, experts))
        report_check(f"counts-{experts}", float(not same), 0.0, same)


RATES: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def check_adamw() -> None:
    from kogia.ops.triton import adamw as kernels

    for moments in (torch.float32, torch.bfloat16):
        group = some_trained([16, 777, 2048, 1 << (22 if ON_GPU else 12)], moments, torch.bfloat16, True)
        exact = [[x.double() for x in (t.weight, t.grad, t.first, t.second)] for t in group.members]
        before = [t.weight.clone() for t in group.members]
        poison()
        kernels.adamw(group, torch.full((), 0.5, device=DEVICE), **RATES)
        worst = 0.0
        for t, (w, g, m, v), old in zip(group.members, exact, before, strict=True):
            g = 0.5 * g
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            moved = 1e-3 * w + 1e-2 / (1 - 0.9**4) * m / ((v / (1 - 0.95**4)).sqrt() + 1e-8)
            worst = max(worst, error(old.double() - t.weight.double(), moved))
            assert t.copy is not None
            if ON_GPU:
                assert torch.equal(t.copy, t.weight.bfloat16()), "the copy is the weight, rounded"
            for kept, want in ((t.first, m), (t.second, v)):
                assert error(kept, want) < (1e-6 if moments == torch.float32 else 8e-3), "a moment is wrong"
        report_check(f"adamw-{str(moments).removeprefix('torch.')}", worst, 2e-4, worst < 2e-4)
    total, more = randn(5, 1001).bfloat16(), randn(5, 1001).bfloat16()
    assert torch.equal(kernels.added_up(total, more), total.float() + more.float()), "sums are wrong"


def seconds_of(call: Callable[[], Any], repeats: int = 12) -> float:
    for _ in range(2):
        call()
    synchronize()
    if not ON_GPU:
        return 1.0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def time_kernels(args: argparse.Namespace) -> None:
    source = torch.empty(1 << (30 if ON_GPU else 10), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
    record("copy-rate", rate / 1e12, "TB/s")
    del source, target
    shape = (TOKENS, 1024, 512, 8, (256, 128, 64, 128)) if ON_GPU else (TOKENS, 32, 16, 2, (16, 8, 4, 8))
    for name, case in cases(*shape).items():
        attempt(f"time-{name}", partial(time_case, name, case, rate))
        gc.collect()
    attempt("time-adamw", partial(time_adamw, rate))


def time_case(name: str, case: Case, rate: float) -> None:
    found: dict[str, float] = {}
    for who, function in (("kernel", case.kernel), ("reference", case.reference)):
        leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
        call = partial(function, *leaves, *case.others)
        found[f"{who}-forward"] = seconds_of(call)
        made = call()
        made = [made] if isinstance(made, Tensor) else list(made)
        upstream = [torch.randn_like(each) for each in made]
        back = partial(torch.autograd.grad, made, leaves, upstream, retain_graph=True)
        found[f"{who}-backward"] = seconds_of(back)
    for way, nbytes in zip(("forward", "backward"), case.moved, strict=True):
        took, before = found[f"kernel-{way}"], found[f"reference-{way}"]
        record(
            f"time-{name}-{way}", 1e6 * took, "us", least=round(1e6 * nbytes / rate, 1),
            share=round(nbytes / took / rate, 3), reference=round(1e6 * before, 1),
        )  # fmt: skip


def time_adamw(rate: float) -> None:
    from kogia.ops.triton import adamw as kernels

    for moments in (torch.float32, torch.bfloat16):
        sizes = [1 << (26 if ON_GPU else 10)] * 4 + [1024] * 40
        group = some_trained(sizes, moments, torch.bfloat16, True)
        scale = torch.full((), 0.5, device=DEVICE)
        took = seconds_of(partial(kernels.adamw, group, scale, **RATES), 8)
        before = seconds_of(partial(adamw.adamw.reference, group, scale, **RATES), 4)
        nbytes = sum(sizes) * (2 + 8 + 4 * moments.itemsize + 2)
        record(
            f"time-adamw-{str(moments).removeprefix('torch.')}", 1e6 * took, "us", least=round(1e6 * nbytes / rate, 1),
            share=round(nbytes / took / rate, 3), reference=round(1e6 * before, 1),
        )  # fmt: skip


# --- steps


@dataclass(frozen=True)
class Shape:
    state: Callable[[], TrainState]
    micro_batches: int
    tokens: int
    """Of a micro-batch."""


def state_1b() -> TrainState:
    config = replace(training.model_config(), init_std=0.02) if ON_GPU else fp8.model_config()
    return fp8.state_of(build_model(config, device=DEVICE, dtype=DTYPE), 10_000)


def large_config() -> ModelConfig:
    """Hidden 4096 and experts of 2048: twice as many products for a number as the wide one has."""
    wide = fp8.model_config(3)
    if not ON_GPU or wide.moe is None:
        return wide
    attention = replace(wide.attention, num_heads=32)
    moe = replace(wide.moe, num_experts=32, num_shared_experts=1, expert_dim=2048)
    return replace(wide, dim=4096, ffn_dim=11008, attention=attention, moe=moe)


def state_fp8(config: Callable[[], ModelConfig], gradients: str | None) -> TrainState:
    """In FP8 unless `gradients` is None: which gradients of weights are too."""
    model = build_model(config(), device=DEVICE, dtype=DTYPE)
    if gradients is not None:
        train_in_fp8(model, gradients, power_of_two=False)  # pyright: ignore[reportArgumentType]
    return fp8.state_of(model, 10_000, moments="bfloat16")


SHAPES = {
    "1b": Shape(state_1b, 1, TOKENS if ON_GPU else fp8.TOKENS),
    "wide-bf16": Shape(partial(state_fp8, fp8.model_config, None), 2, fp8.TOKENS),
    "wide-fp8": Shape(partial(state_fp8, fp8.model_config, "none"), 2, fp8.TOKENS),
    "wide-fp8-dense": Shape(partial(state_fp8, fp8.model_config, "dense"), 2, fp8.TOKENS),
    "wide-fp8-all": Shape(partial(state_fp8, fp8.model_config, "all"), 2, fp8.TOKENS),
    "large-bf16": Shape(partial(state_fp8, large_config, None), 2, fp8.TOKENS),
    "large-fp8": Shape(partial(state_fp8, large_config, "none"), 2, fp8.TOKENS),
    "large-fp8-dense": Shape(partial(state_fp8, large_config, "dense"), 2, fp8.TOKENS),
    "large-fp8-all": Shape(partial(state_fp8, large_config, "all"), 2, fp8.TOKENS),
}
"""As benchmarks/training.py has it, with 16 sequences, as training_fp8.py has it, and larger."""


def batches(shape: Shape) -> list[Any]:
    vocab = fp8.VOCAB
    return [
        batch_of(torch.randint(vocab, (shape.tokens,), device=DEVICE), fp8.LENGTH) for _ in range(shape.micro_batches)
    ]


def step(args: argparse.Namespace) -> None:
    medians: dict[str, float] = {}
    for name in args.shapes:
        shape = SHAPES[name]
        free()
        state = attempt(f"build-{name}", shape.state)
        if state is None:
            continue
        attempt(f"same-{name}", partial(same_gradients, name, shape, state, args.without))
        for left in [
            args.without,
            list(KERNELS),
            *([*args.without, each] for each in KERNELS if each not in args.without),
        ]:
            with without(left):
                id = f"step-{name}-{'without-' + '-'.join(left) if left else 'all'}".replace("-".join(KERNELS), "any")
                found = attempt(id, partial(measured, id, shape, state))
                medians[id] = found if found is not None else float("nan")
            if found is None:  # the state of the device or of the optimiser is not known
                break
        del state
    whole = "-".join(args.without)
    own = "all" if not whole else f"without-{whole}"
    for name in args.shapes:
        if (a := medians.get(f"step-{name}-{own}")) and (b := medians.get(f"step-{name}-without-any")):
            record(f"step-{name}-gain", b / a, "ratio")
    for name in (name for name in SHAPES if "-fp8" in name):
        plain = f"step-{name.split('-')[0]}-bf16-{own}"
        if (a := medians.get(f"step-{name}-{own}")) and (b := medians.get(plain)):
            record(f"train-fp8-ratio-{name}", b / a, "ratio", limit=1.15)


def free() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(id: str, shape: Shape, state: TrainState) -> float:
    """Median seconds of a step."""
    times, loss = [], 0.0
    warm_up, steps = (WARM_UP, STEPS) if id.endswith(("all", "any")) else (1, 3 if ON_GPU else 1)
    for i in range(warm_up + steps):
        work = batches(shape)
        synchronize()
        begin = time.perf_counter()
        loss = train_step(state, work, LOSS)["loss"]
        synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - begin)
    value, tokens = median(times), shape.tokens * shape.micro_batches
    memory = round(torch.cuda.max_memory_allocated() / 1e9, 2) if ON_GPU else 0.0
    record(
        id, 1e3 * value, "ms", low=1e3 * min(times), high=1e3 * max(times), tokens_per_second=round(tokens / value),
        memory_gb=memory, loss=round(loss, 4),
    )  # fmt: skip
    return value


def same_gradients(name: str, shape: Shape, state: TrainState, left: Sequence[str]) -> None:
    """Loss and gradients of one batch with the kernels and without: they differ by the rounding of 16 bits."""
    batch, found = batches(shape)[0], {}
    for who, names in (("kernels", left), ("references", list(KERNELS))):
        state.optimizer.zero_grad()
        with without(names):
            loss = LOSS(state.model, batch)
            (loss.total / batch.num_loss_tokens).backward()
        weights = state.optimizer.weights.items()
        found[who] = loss.total.item(), {n: w.grad.clone() for n, w in weights if w.grad is not None}
    state.optimizer.zero_grad()
    (ours, grads), (theirs, wanted) = found["kernels"], found["references"]
    errors = {n: error(grads[n], wanted[n]) for n in wanted if wanted[n].any()}
    worst = sorted(errors, key=lambda n: -errors[n])[:3]
    value = abs(ours / theirs - 1)
    report_check(f"same-loss-{name}", value, 1e-3, value < 1e-3)
    say(gradients={n: float(f"{errors[n]:.3g}") for n in worst}, median=float(f"{median(errors.values()):.3g}"))
    record(f"same-gradients-{name}", median(errors.values()), "relative difference", high=errors[worst[0]])


def profile(args: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    for name in args.shapes:
        free()
        shape = SHAPES[name]
        state = shape.state()
        with without(args.without):
            for _ in range(3):
                train_step(state, batches(shape), LOSS)
            work = batches(shape)
            synchronize()
            begin = time.perf_counter()
            with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                train_step(state, work, LOSS)
                synchronize()
            wall = time.perf_counter() - begin
        del state
        events = found.key_averages()
        device = [each for each in events if "CUDA" in str(each.device_type)]
        top = sorted(device, key=lambda each: -each.self_device_time_total)[:40]
        total = sum(each.self_device_time_total for each in device) / 1e3
        launches = sum(each.count for each in device)
        record(f"profile-{name}", total, "ms of kernels", wall_ms=round(1e3 * wall, 1), kernels=launches)
        for each in top:
            took = each.self_device_time_total / 1e3
            say(shape=name, ms=round(took, 2), calls=each.count, kernel=each.key[:110])
            if each in top[:20]:
                fp8.ROWS.append(row(f"profile-{name}-{each.key[:60]}", took, "ms", calls=each.count))


def host(args: argparse.Namespace) -> None:
    """What a step takes whose tokens take no time: about what the host needs for one."""
    for name in args.shapes:
        free()
        shape, tokens, times = SHAPES[name], fp8.LENGTH // 16, []
        state = shape.state()
        with without(args.without):
            for i in range(WARM_UP + STEPS):
                ids = torch.randint(fp8.VOCAB, (shape.micro_batches, tokens), device=DEVICE)
                work = [batch_of(each, tokens) for each in ids]
                synchronize()
                begin = time.perf_counter()
                train_step(state, work, LOSS)
                synchronize()
                if i >= WARM_UP:
                    times.append(1e3 * (time.perf_counter() - begin))
        del state
        record(f"host-{name}", median(times), "ms", low=min(times), high=max(times), tokens=tokens)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "check": check,
    "time": time_kernels,
    "step": step,
    "host": host,
    "profile": profile,
}

if __name__ == "__main__":
    main()
