"""The Triton kernels of training, forward and backward, against formulas in float64 and PyTorch's own gradients.

On a GPU they run as compiled, elsewhere in Triton's interpreter, which is slow: sizes are odd, ragged and small.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from train.tiny import make_batch, random_sequences, tiny_config, tiny_state

triton = pytest.importorskip("triton", reason="kernels need Triton")

from kogia.model.config import MLAConfig, MoEConfig  # noqa: E402
from kogia.model.fp8 import train_in_fp8  # noqa: E402
from kogia.model.transformer import Transformer, build_model  # noqa: E402
from kogia.ops import adamw, latent, moe, norm  # noqa: E402
from kogia.ops.adamw import Trained, TrainedGroup  # noqa: E402
from kogia.ops.dispatch import all_ops, use_backend  # noqa: E402
from kogia.ops.segments import segments_of  # noqa: E402
from kogia.ops.triton import adamw as triton_adamw  # noqa: E402
from kogia.ops.triton import experts, latent_training, norm_training, router_training, sums  # noqa: E402
from kogia.ops.triton.common import INTERPRETED  # noqa: E402
from kogia.train.loss import LossWeights, supervised_loss  # noqa: E402
from kogia.train.step import train_step  # noqa: E402

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
HALVES = 0.008 if INTERPRETED else 0.004
"""Error of bfloat16: the interpreter cuts numbers off where a GPU rounds them."""
TOLERANCE = 2e-6 if INTERPRETED else 0.01


LOSS = partial(supervised_loss, weights=LossWeights(mtp=0.3, balance=1e-3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(shape, generator=generator).to(DEVICE, DTYPE)


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = draw(tokens, half, seed=9).float() * 3
    return angle.cos(), angle.sin()


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    assert got.shape == want.shape, what
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all(), what
    assert (got - want).norm() <= TOLERANCE * want.norm() + 1e-12, f"{what}: {(got - want).norm() / want.norm()}"


def same_with_gradients(
    ours: Callable[..., Any], exact: Callable[..., Any], leaves: Sequence[Tensor], others: Sequence[Any] = ()
) -> None:
    """Outputs and gradients of `ours` are those of `exact` in float64, and the same bits a second time."""
    runs = []
    for function, kind in ((ours, DTYPE), (ours, DTYPE), (exact, torch.float64)):
        mine = [leaf.to(kind).detach().requires_grad_() for leaf in leaves]
        out = function(*mine, *(each.double() if kind == torch.float64 and is_real(each) else each for each in others))
        outs = [out] if isinstance(out, Tensor) else list(out)
        upstream = [draw(*each.shape, seed=7 + i).to(each.dtype) for i, each in enumerate(outs)]
        grads = torch.autograd.grad(outs, mine, upstream)
        runs.append([*outs, *grads])
    for i, (first, again, want) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(first, again)
        assert first.dtype == DTYPE
        close(first, want, f"result {i}")


def is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (2, 5, 33), (37, 300), (0, 8)])
def test_norms_and_their_gradients_are_those_of_the_formula(shape):
    x, delta, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)
    same_with_gradients(
        lambda x, w: norm_training.rms_norm(x, w, 1e-3), lambda x, w: plain_norm(x, w, 1e-3), (x, weight)
    )

    def exact(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, plain_norm(x + delta, weight, 1e-3)

    same_with_gradients(lambda x, d, w: norm_training.add_rms_norm(x, d, w, 1e-3), exact, (x, delta, weight))


def test_a_norm_of_which_only_one_result_is_used_has_the_gradient_of_that_one():
    x, delta, weight = (t.requires_grad_() for t in (draw(5, 24), draw(5, 24, seed=1), draw(24, seed=2)))
    for i in (0, 1):
        got = torch.autograd.grad(
            norm_training.add_rms_norm(x, delta, weight, 1e-5)[i].sum(), (x, delta), allow_unused=True
        )
        want = torch.autograd.grad(
            norm.add_rms_norm.reference(x, delta, weight, 1e-5)[i].sum(), (x, delta), allow_unused=True
        )
        for a, b in zip(got, want, strict=True):
            close(a, b)


def test_rows_that_lie_apart_are_normed_where_they_are():
    wide, weight = draw(9, 40), draw(24, seed=1)
    x = wide[:, 8:32]
    assert norm_training.rms_norm_supports(x, weight, 1e-5) is None
    same_with_gradients(
        lambda wide, w: norm_training.rms_norm(wide[:, 8:32], w, 1e-5),
        lambda wide, w: plain_norm(wide[:, 8:32], w, 1e-5),
        (wide, weight),
    )
    assert norm_training.rms_norm_supports(wide.T, weight, 1e-5) is not None


def test_weights_of_another_dtype_are_left_to_the_reference():
    x, weight = draw(3, 8), draw(8).double()
    assert "float64" in str(norm_training.rms_norm_supports(x, weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 16), (7, 300), (70, 33), (0, 8)])
def test_silu_mul_and_its_gradients_are_those_of_the_formula(shape):
    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return gate / (1 + torch.exp(-gate)) * up

    rows, width = shape
    same_with_gradients(experts.silu_mul, exact, (draw(*shape), draw(*shape, seed=1)))
    both = draw(rows, 2 * width)
    same_with_gradients(lambda x: experts.silu_mul(*x.chunk(2, 1)), lambda x: exact(*x.chunk(2, 1)), (both,))


SIZES = (1,), (5, 7), (2049,), (3, 16, 48)


def some_trained(moments: torch.dtype, grads: torch.dtype, copies: bool) -> list[Trained]:
    found = []
    for i, shape in enumerate(SIZES):
        weight, grad = draw(*shape, seed=i).float(), draw(*shape, seed=10 + i).to(grads)
        first, second = (draw(*shape, seed=20 + i) * 0.1).to(moments), draw(*shape, seed=30 + i).square().to(moments)
        copy = torch.empty_like(weight, dtype=torch.bfloat16) if copies else None
        found.append(Trained(weight, grad, first, second, torch.tensor(float(i), device=DEVICE), copy))
    return found


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("moments", "grads", "copies"),
    [
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_adamw_in_one_pass_is_adamw_as_written_down(moments, grads, copies, scale):
    ours = some_trained(moments, grads, copies)
    lr, (b1, b2), eps, decay = 0.01, (0.9, 0.999), 1e-8, 0.1
    exact = []
    for each in ours:
        w, g, m, v = (x.double() for x in (each.weight, each.grad, each.first, each.second))
        g, t = g * (scale or 1.0), float(each.step) + 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = (1 - lr * decay) * w - lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + eps)
        exact.append((w, m, v, t))
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    options: Any = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": decay}
    assert triton_adamw.adamw_supports(TrainedGroup(ours), factor, **options) is None
    theirs = [Trained(*(None if x is None else x.clone() for x in fields(each))) for each in ours]
    triton_adamw.adamw(TrainedGroup(ours), factor, **options)
    adamw.adamw.reference(TrainedGroup(theirs), factor, **options)
    for each, other, (w, m, v, t) in zip(ours, theirs, exact, strict=True):
        assert float(each.step) == float(other.step) == t
        for got in (each, other):
            torch.testing.assert_close(got.weight.double(), w, rtol=1e-6, atol=1e-7)
            for kept, want in ((got.first, m), (got.second, v)):
                assert kept.dtype == moments
                torch.testing.assert_close(
                    kept.double(), want, rtol=HALVES if moments != torch.float32 else 1e-6, atol=1e-7
                )
            if copies:
                torch.testing.assert_close(got.copy.float(), got.weight, rtol=HALVES, atol=0)


def fields(each: Trained) -> tuple[Tensor | None, ...]:
    return each.weight, each.grad, each.first, each.second, each.step, each.copy


def test_the_optimisers_kernel_refuses_what_it_would_get_wrong():
    weight = draw(4, 6).float()
    options: Any = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 0.0, "weight_decay": 0.0}

    def reason(**changed: Tensor) -> str:
        parts = dict.fromkeys(("weight", "grad", "first", "second"), weight) | changed
        group = TrainedGroup([Trained(step=weight.new_zeros(()), **parts)])
        return str(triton_adamw.adamw_supports(group, None, **options))

    assert reason() == "None"
    assert "float64" in reason(weight=weight.double())
    assert "strides" in reason(grad=draw(6, 4).float().T)
    assert "strides" in reason(**{name: weight[:0] for name in ("weight", "grad", "first", "second")})


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_gradients_are_added_up_in_float32(dtypes):
    total, more = (draw(5, 411, seed=i).to(dtype) for i, dtype in enumerate(dtypes))
    want = total.float() + more.float()
    assert triton_adamw.added_up_supports(total, more) is None
    assert torch.equal(adamw.added_up.reference(total.clone(), more), want)
    got = triton_adamw.added_up(total, more)
    assert torch.equal(got, want)
    assert (got.data_ptr() == total.data_ptr()) == (dtypes[0] == torch.float32)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@pytest.mark.parametrize(
    ("tokens", "heads", "nope", "rope", "v"), [(1, 1, 16, 8, 16), (5, 3, 16, 8, 32), (37, 2, 4, 2, 8)]
)
def test_queries_keys_and_values_of_training_and_their_gradients_are_those_of_the_formula(tokens, heads, nope, rope, v):
    cos, sin = angles(tokens, rope // 2)
    wide = draw(tokens, heads * (nope + rope) + 4)  # rows that lie apart

    def query(x: Tensor) -> Tensor:
        return x[:, 4:].unflatten(1, (heads, -1))

    assert latent_training.rotate_query_supports(query(wide), cos, sin, nope) is None

    def exact_query(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((query(x)[..., :nope], turned(query(x)[..., nope:], cos, sin)), -1)

    same_with_gradients(
        lambda x, cos, sin: latent_training.rotate_query(query(x), cos, sin, nope), exact_query, (wide,), (cos, sin)
    )
    rank = 24
    kv, weight = draw(tokens, rank + rope), draw(rank, seed=1)
    assert latent_training.latent_and_key_supports(kv, weight, cos, sin, 1e-5) is None

    def exact_latent(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return plain_norm(kv[:, :rank], weight, 1e-5), turned(kv[:, None, rank:], cos, sin)

    same_with_gradients(
        lambda kv, w, cos, sin: latent_training.latent_and_key(kv, w, cos, sin, 1e-5),
        exact_latent,
        (kv, weight),
        (cos, sin),
    )
    both, key = draw(tokens, heads, nope + v), draw(tokens, 1, rope, seed=1)
    assert latent_training.keys_and_values_supports(both, key, nope) is None

    def exact_keys(both: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((both[..., :nope], key.expand(-1, heads, -1)), -1), both[..., nope:]

    same_with_gradients(lambda both, key: latent_training.keys_and_values(both, key, nope), exact_keys, (both, key))


def test_gradients_of_queries_and_keys_may_lie_as_attention_leaves_them():
    """Heads in front of tokens, values as a part of wider rows."""
    tokens, heads, nope, rope, v = 6, 3, 8, 4, 8
    cos, sin = angles(tokens, rope // 2)
    q, both, key = draw(tokens, heads, nope + rope), draw(tokens, heads, nope + v), draw(tokens, 1, rope)
    of_k = draw(heads, tokens, nope + rope).transpose(0, 1)
    of_v = draw(heads, tokens, v + 4).transpose(0, 1)[..., :v]
    for ours, theirs, leaves, upstream in (
        (lambda q: latent_training.rotate_query(q, cos, sin, nope),
         lambda q: latent.rotate_query.reference(q, cos, sin, nope), (q,), (of_k,)),
        (lambda *x: latent_training.keys_and_values(*x, nope),
         lambda *x: latent.keys_and_values.reference(*x, nope), (both, key), (of_k, of_v)),
    ):  # fmt: skip
        leaves = [each.requires_grad_() for each in leaves]
        got, want = (torch.autograd.grad(f(*leaves), leaves, upstream) for f in (ours, theirs))
        for a, b in zip(got, want, strict=True):
            close(a, b)


@pytest.mark.skipif(INTERPRETED, reason="the product that adds bfloat16 up in float32 is CUDA's")
def test_logits_of_routers_and_their_gradients_are_as_good_as_in_float32():
    from kogia.ops.aten import router

    x, weight = draw(777, 136), draw(24, 136, seed=1)
    assert router.router_logits_supports(x, weight) is None
    leaves = [t.double().requires_grad_() for t in (x, weight)], [t.clone().requires_grad_() for t in (x, weight)]
    want, got = leaves[0][0] @ leaves[0][1].T, router.router_logits(*leaves[1])
    assert got.dtype == torch.float32
    assert (got.double() - want).norm() < 1e-6 * want.norm()
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves[1], upstream)
    for a, b in zip(grads, torch.autograd.grad(want, leaves[0], upstream.double()), strict=True):
        assert (a.double() - b).norm() < 0.003 * b.norm(), "rounded once"


def test_only_what_takes_gradients_goes_to_the_kernels_of_training():
    kv, weight, (cos, sin) = draw(3, 12), draw(8), angles(3, 2)
    assert latent_training.latent_and_key_supports(kv, weight, cos, sin, 1e-5) is None
    with torch.no_grad():
        assert latent_training.latent_and_key_supports(kv, weight, cos, sin, 1e-5) == "it is for training"
    assert "powers of two" in str(latent_training.rotate_query_supports(kv[:, None], cos, sin, 6))


def test_what_is_compiled_is_left_to_the_compiler(monkeypatch):
    from kogia.ops.aten import router

    kv, weight, (cos, sin), logits = draw(3, 12), draw(8), angles(3, 2), draw(3, 8).float()
    ids, segments = torch.zeros(512, 8, dtype=torch.int64, device=DEVICE), segments_of([2, 1], DEVICE)
    options: dict[str, Any] = {"score": "sigmoid", "topk": 2, "num_groups": 1, "topk_groups": 1}
    halves = draw(8, 8).bfloat16()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for reason in (
        norm_training.rms_norm_supports(kv, draw(12), 1e-5),
        norm_training.add_rms_norm_supports(kv, kv, draw(12), 1e-5),
        latent_training.latent_and_key_supports(kv, weight, cos, sin, 1e-5),
        latent_training.rotate_query_supports(kv[:, None], cos, sin, 8),
        latent_training.keys_and_values_supports(kv[:, None], kv[:, None, :4], 8),
        experts.silu_mul_supports(kv, kv),
        router.router_logits_supports(halves, halves),
        router_training.route_logits_supports(logits, None, None, **options, normalize=True, scale=1.0),
        router_training.expert_counts_supports(ids, 8),
        router_training.affinity_sums_supports(logits, segments.owner, segments.cu_seqlens),
        sums.residual_sum_supports(kv, kv, kv),
        sums.branches_supports(kv, 3),
    ):
        assert "torch.compile" in str(reason)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("biased", "normalize", "repeated"), [(True, True, False), (False, False, False), (True, True, True)]
)
@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 4, 4), (7, 12, 3), (70, 16, 6)])
def test_choices_of_routers_and_their_gradients_are_those_of_the_reference(
    score, biased, normalize, repeated, tokens, experts, topk
):
    logits, bias = draw(tokens, experts).float(), draw(experts, seed=1).float() * 0.1 if biased else None
    given = torch.rand(tokens, experts, device=DEVICE).topk(topk).indices if repeated else None
    options: Any = {
        "score": score, "topk": topk, "num_groups": 1, "topk_groups": 1, "normalize": normalize, "scale": 2.5
    }  # fmt: skip
    assert router_training.route_logits_supports(logits, bias, given, **options) is None
    runs = []
    for function in (router_training.route_logits, moe.route_logits.reference):
        leaf = logits.clone().requires_grad_()
        routed = function(leaf, bias, given, **options)
        order = routed.expert_ids.argsort(-1)
        weights = routed.weights.gather(1, order)
        outs = [weights, routed.scores]
        upstream = [draw(*each.shape, seed=3).float() for each in outs]
        parts = [torch.autograd.grad(o, leaf, g, retain_graph=True)[0] for o, g in zip(outs, upstream, strict=True)]
        runs.append([routed.expert_ids.gather(1, order), *outs, *parts, torch.autograd.grad(outs, leaf, upstream)[0]])
    assert torch.equal(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1:], runs[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_token_that_is_not_a_number_chooses_experts_that_exist_in_training_too():
    logits = draw(3, 12).float()
    logits[1] = float("nan")
    options: Any = {"score": "sigmoid", "topk": 3, "num_groups": 1, "topk_groups": 1, "normalize": True, "scale": 1.0}
    routed = router_training.route_logits(logits, None, None, **options)
    assert ((routed.expert_ids >= 0) & (routed.expert_ids < 12)).all()
    assert routed.weights[[0, 2]].isfinite().all() and not routed.weights[1].isfinite().all()


@pytest.mark.parametrize("experts", [5, 64, 1000])
def test_copies_of_tokens_are_counted_without_nobodys(experts):
    ids = torch.randint(-1, experts, (1500, 3), device=DEVICE)
    assert router_training.expert_counts_supports(ids, experts) is None
    assert torch.equal(router_training.expert_counts(ids, experts), moe.expert_counts.reference(ids, experts))
    assert router_training.expert_counts_supports(ids[:4], experts) is not None


@pytest.mark.parametrize("shape", [(1, 3), (70, 33), (0, 4)])
def test_sums_of_several_and_gradients_of_several_readers_are_one_pass(shape):
    x, delta, more, last = (draw(*shape, seed=i) for i in range(4))
    for parts in ((x, delta, more), (x, delta, more, last)):
        assert sums.residual_sum_supports(*parts) is None
        same_with_gradients(sums.residual_sum, lambda *parts: torch.stack(parts).sum(0), parts)
    assert "not 2" in str(sums.residual_sum_supports(x, delta))
    for number in (3, 4):
        assert sums.branches_supports(x, number) is None
        same_with_gradients(lambda x: sums.branches(x, number), lambda x: (x.clone(),) * number, (x,))  # noqa: B023


@pytest.mark.parametrize("lengths", [[1], [70, 1, 33], [9, 500]])
@pytest.mark.parametrize("over", ["sequence", "batch"])
def test_balance_losses_and_their_gradients_are_those_of_the_reference(kernels_here, lengths, over):
    segments, experts, topk = segments_of(lengths, DEVICE), 12, 3
    scores = draw(sum(lengths), experts).float().sigmoid().requires_grad_()
    ids, found = scores.topk(topk).indices, []
    for backend in (None, "reference"):
        with nullcontext() if backend is None else use_backend(backend, ["affinity_sums", "expert_counts"]):
            losses = moe.balance_losses(scores, ids, segments, moe.Balance(over))
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), scores)[0]))
    assert router_training.affinity_sums_supports(scores, segments.owner, segments.cu_seqlens) is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


TRAINING_OPS = (
    "rms_norm", "add_rms_norm", "silu_mul", "latent_and_key", "rotate_query", "keys_and_values", "route_logits",
    "expert_counts", "weighted_silu_mul", "weighted_silu_mul_backward", "sum_copies", "adamw", "added_up",
    "residual_sum", "branches", "affinity_sums",
)  # fmt: skip


@pytest.fixture
def kernels_here(monkeypatch):
    """What runs on a GPU runs on this device."""
    for name in TRAINING_OPS:
        op = all_ops()[name]
        monkeypatch.setitem(op._backends, DEVICE, op.backends("cuda"))


@pytest.mark.parametrize(
    ("precision", "recompute"),
    [
        ("full", "none"),
        ("full", "layer"),
        ("full", "attention"),
        ("full", "feed_forward"),
        ("fp8", "none"),
        ("fp8", "layer"),
    ],
)
def test_a_model_has_the_loss_and_the_gradients_of_the_references(kernels_here, precision, recompute):
    batch = make_batch(random_sequences([13, 20, 7])).to(DEVICE)
    weights, found = LossWeights(mtp=0.3, balance=0.01), []
    for backend in (None, "reference"):
        model = whole_model(DTYPE)
        if precision == "fp8":
            train_in_fp8(model, "none", power_of_two=False)
        with nullcontext() if backend is None else use_backend(backend, TRAINING_OPS):
            loss = supervised_loss(model, batch, weights, recompute=recompute)
            loss.total.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (ours, grads), (theirs, wanted) = found
    assert torch.equal(ours.loads, theirs.loads)
    close(ours.total.detach(), theirs.total.detach())
    for name, want in wanted.items():
        assert (grads[name] - want).norm() <= (2e-5 if INTERPRETED else 0.1) * want.norm() + 1e-9, name


def whole_model(dtype: torch.dtype) -> Transformer:
    attention = MLAConfig(
        num_heads=2, q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
    )
    moe = MoEConfig(num_experts=6, num_shared_experts=1, topk=2, expert_dim=24, num_dense_layers=1)
    return build_model(tiny_config(attention=attention, moe=moe, num_mtp_layers=1), dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_of_16_bits_ends_at_the_weights_of_the_references(kernels_here, kind, micro_batches):
    batches = [make_batch(random_sequences([9, 12], seed)).to(DEVICE) for seed in range(micro_batches)]
    found = []
    for backend in (None, "reference"):
        model = whole_model(torch.bfloat16)
        state = tiny_state(model, kind=kind, moments="bfloat16", clip=0.1, lr=1e-3)
        with nullcontext() if backend is None else use_backend(backend, TRAINING_OPS):
            norm = train_step(state, batches, LOSS)["grad_norm"]
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.float(), state.optimizer.weights[name], rtol=HALVES, atol=1e-9)
        found.append((norm, {name: w.detach() for name, w in state.optimizer.weights.items()}))
    (norm, ours), (wanted, theirs) = found
    assert norm == pytest.approx(wanted, rel=1e-6 if INTERPRETED else 0.01)
    start = dict(whole_model(torch.bfloat16).named_parameters())
    for name, want in theirs.items():
        moved = want - start[name].detach().float()
        assert (ours[name] - want).norm() <= (1e-3 if INTERPRETED else 0.1) * moved.norm(), name
