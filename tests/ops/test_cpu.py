"""Every C++ kernel against its reference in float64, for each instruction set that this processor has.

Inputs are random, sizes odd and single, and what a kernel writes into is poisoned.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kogia.ops import attention, cache, drafts, latent, linear, logprob, moe, norm, rope, sample
from kogia.ops.cache import KVRow, LatentRow, LayerCache
from kogia.ops.cpu import build
from kogia.ops.cpu.record import recording
from kogia.ops.packed import FORMATS, Packed
from kogia.ops.segments import segments_of

try:
    build.library()
except ImportError as error:
    pytest.skip(f"no kernels here: {error}", allow_module_level=True)

from kogia.ops.cpu import attention as cpu_attention
from kogia.ops.cpu import common
from kogia.ops.cpu import drafts as cpu_drafts
from kogia.ops.cpu import embed as cpu_embed
from kogia.ops.cpu import latent as cpu_latent
from kogia.ops.cpu import latent_training as cpu_latent_training
from kogia.ops.cpu import linear as cpu_linear
from kogia.ops.cpu import logprob as cpu_logprob
from kogia.ops.cpu import moe as cpu_moe
from kogia.ops.cpu import norm as cpu_norm
from kogia.ops.cpu import products as cpu_products
from kogia.ops.cpu import rope as cpu_rope
from kogia.ops.cpu import sample as cpu_sample
from kogia.ops.cpu import varlen as cpu_varlen

MODULES = (
    cpu_attention, cpu_drafts, cpu_embed, cpu_latent, cpu_latent_training, cpu_linear, cpu_logprob, cpu_moe, cpu_norm,
    cpu_products, cpu_rope, cpu_sample, cpu_varlen,
)  # fmt: skip
BF16 = torch.bfloat16
LEVELS = list(build.LEVELS)[list(build.LEVELS).index(build.level()) :]
PACKINGS = [None, "int8", "int4", "int4 asymmetric"]


@pytest.fixture(autouse=True, params=LEVELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels as compiled for an instruction set, which is returned; memory that is not initialised holds NaN."""
    compiled = build.load(request.param)
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, common.Kernel):
                function = getattr(compiled, kernel.name)
                function.argtypes, function.restype = kernel.function.argtypes, None
                monkeypatch.setattr(kernel, "function", function)
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    return request.param


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = allocate(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else -77)

    return poisoned


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed)).to(dtype)


def pack(weight: Tensor, packing: str | None) -> Tensor | Packed:
    if packing is None:
        return weight
    name, *options = packing.split()
    return FORMATS[name].pack(weight, **dict.fromkeys(options, True))


def wide(weight: Tensor | Packed) -> Tensor:
    return weight.double() if isinstance(weight, Tensor) else weight.dense(torch.float32).double()


def distance(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and torch.isfinite(got).all()
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


NUMBERS = [BF16, torch.float32]
ROUNDED = {BF16: 3e-3, torch.float32: 1e-6}
"""What rounding a result once may cost, over the whole."""


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("features", "width"), [(1, 64), (7, 128), (130, 320), (6, 1120)])
def test_products_with_weights_of_every_format_equal_those_in_float64(rows, packing, features, width):
    x, weight, bias = draw(rows, width), pack(draw(features, width, seed=1), packing), draw(features, seed=2)
    assert cpu_linear.linear_supports(x, weight, bias) is None
    want = x.double() @ wide(weight).T
    assert distance(cpu_linear.linear(x, weight, bias), want + bias.double()) < ROUNDED[BF16]
    assert distance(cpu_linear.linear(x[None], weight)[0], want) < ROUNDED[BF16]
    if packing is not None:  # rows of int16 are all that is lost
        got = cpu_linear.linear(x.float(), weight, bias.float())
        assert got.dtype == torch.float32 and distance(got, want + bias.double()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 32])
@pytest.mark.parametrize(("features", "width"), [(1, 16), (7, 48), (130, 304), (300, 1024)])
def test_products_in_float32_equal_those_in_float64(rows, features, width):
    x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((rows, width), (features, width), (features,)))
    assert cpu_linear.linear_supports(x, weight, bias) is None
    got, want = cpu_linear.linear(x, weight, bias), x.double() @ weight.double().T + bias.double()
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert not rows or distance(got, want) < ROUNDED[torch.float32]


def lying(x: Tensor, across: bool) -> Tensor:
    """The same numbers, those of a row or those of a column side by side."""
    return x.T.contiguous().T if across else x


@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 1), (12, 32, 256), (7, 48, 97), (250, 526, 97), (33, 17, 513)]
)
@pytest.mark.parametrize("a_across", [False, True])
@pytest.mark.parametrize("b_across", [False, True])
def test_products_of_many_rows_equal_those_in_float64_as_the_numbers_lie(rows, columns, width, a_across, b_across):
    a, b = draw(rows, width, dtype=torch.float32), draw(columns, width, seed=1, dtype=torch.float32)
    got = cpu_products.product(lying(a, a_across), lying(b, b_across))
    assert distance(got, a.double() @ b.double().T) < ROUNDED[torch.float32]
    assert torch.equal(cpu_products.product(a[rows // 2 :], b), got[rows // 2 :]), "a row's result is its own"
    strided = draw(rows, 2 * width, dtype=torch.float32)[:, ::2]
    assert distance(cpu_products.product(strided, b), strided.double() @ b.double().T) < ROUNDED[torch.float32]


@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(1, 1, 1), (12, 32, 256), (7, 48, 97), (250, 526, 97), (33, 17, 513), (500, 96, 300)]
)
@pytest.mark.parametrize("a_across", [False, True])
@pytest.mark.parametrize("b_across", [False, True])
def test_rounded_products_are_those_in_float64_of_numbers_in_bfloat16_where_the_processor_can(
    rows, columns, width, a_across, b_across, kernels, monkeypatch
):
    a, b = draw(rows, width, dtype=torch.float32), draw(columns, width, seed=1, dtype=torch.float32)
    want = a.double() @ b.double().T
    if "BF16" in kernels:
        want = a.bfloat16().double() @ b.bfloat16().double().T
        assert distance(want, a.double() @ b.double().T) < ROUNDED[BF16] or width == 1
    made = []
    with linear.rounded_products():
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            made.append(cpu_products.product(lying(a, a_across), lying(b, b_across)))
        assert torch.equal(cpu_products.product(a[rows // 2 :], b), made[0][rows // 2 :]), "a row's result is its own"
        total = torch.ones(rows, columns)
        assert distance(cpu_products.add_product(total, a, b), want + 1) < ROUNDED[torch.float32]
    assert torch.equal(*made)
    assert distance(made[0], want) < ROUNDED[torch.float32]
    assert distance(cpu_products.product(a, b), a.double() @ b.double().T) < ROUNDED[torch.float32], "outside as before"


def test_gradients_of_rounded_products_are_rounded_products(kernels):
    x, weight = draw(300, 72, dtype=torch.float32), draw(90, 72, seed=1, dtype=torch.float32)
    upstream, tensors = draw(300, 90, seed=2, dtype=torch.float32), (x.requires_grad_(), weight.requires_grad_())
    with linear.rounded_products():
        got = torch.autograd.grad(cpu_products.linear(*tensors), tensors, upstream)
    g, x, weight = ((t.bfloat16() if "BF16" in kernels else t).detach().double() for t in (upstream, x, weight))
    assert all(distance(*pair) < ROUNDED[torch.float32] for pair in zip(got, (g @ weight, g.T @ x), strict=True))


@pytest.mark.parametrize("rows", [1, 12, 96, 130, 500])
def test_products_are_the_same_in_any_number_of_threads(rows, monkeypatch):
    a, b = draw(rows, 300, dtype=torch.float32), draw(96, 300, seed=1, dtype=torch.float32)
    made = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(cpu_products.product(a, b))
    assert torch.equal(made[1], made[0]) and torch.equal(made[2], made[0])
    assert distance(made[0], a.double() @ b.double().T) < ROUNDED[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("spread", [False, True])
def test_products_are_added_to_what_is_there(spread):
    a, b, total = (draw(*shape, dtype=torch.float32) for shape in ((90, 256), (72, 256), (90, 144)))
    total = total[:, :72] if spread else total[:, :72].contiguous()
    want = total.double() + a.double() @ b.double().T
    assert cpu_products.add_product_supports(total, a, b) is None
    assert cpu_products.add_product(total, a, b) is total
    assert distance(total, want) < ROUNDED[torch.float32]
    assert "side by side" in str(cpu_products.add_product_supports(total.T.contiguous().T, a, b))


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_products_of_many_rows_equal_those_in_float64(bias):
    x, weight = draw(5, 60, 72, dtype=torch.float32), draw(90, 72, seed=1, dtype=torch.float32)
    tensors = [each.requires_grad_() for each in (x, weight, *([draw(90, dtype=torch.float32)] if bias else []))]
    assert cpu_products.linear_supports(*tensors) is None
    wide_ones = [each.detach().double().requires_grad_() for each in tensors]
    for upstream in (draw(5, 60, 90, dtype=torch.float32), torch.ones(()).expand(5, 60, 90)):
        got = torch.autograd.grad(cpu_products.linear(*tensors), tensors, upstream)
        want = torch.autograd.grad(torch.nn.functional.linear(*wide_ones), wide_ones, upstream.double())
        assert all(distance(one, other) < ROUNDED[torch.float32] for one, other in zip(got, want, strict=True))
    frozen = torch.autograd.grad(cpu_products.linear(x, weight.detach()).sum(), x)[0]
    assert distance(frozen, weight.detach().double().sum(0).expand_as(x)) < ROUNDED[torch.float32]


@pytest.mark.parametrize("counts", [[50, 200, 0, 70], [0, 0, 320, 0], [1, 300, 2, 3]])
def test_products_with_experts_and_their_gradients_equal_those_in_float64(counts):
    x, weight = draw(320, 80, dtype=torch.float32), draw(4, 2, 48, 80, seed=1, dtype=torch.float32)
    tensors, sizes = [x.requires_grad_(), weight.requires_grad_()], torch.tensor(counts)
    assert cpu_products.grouped_linear_supports(x, weight, sizes) is None
    got, upstream = cpu_products.grouped_linear(x, weight, sizes), draw(320, 96, seed=2, dtype=torch.float32)
    wide_ones = [each.detach().double().requires_grad_() for each in tensors]
    counts[-1] += 320 - sum(counts)  # nobody's
    want = linear.grouped_linear.reference(*wide_ones, torch.tensor(counts))
    assert distance(got, want) < ROUNDED[torch.float32]
    pairs = torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, wide_ones, upstream.double())
    assert all(distance(one, other) < ROUNDED[torch.float32] for one, other in zip(*pairs, strict=True))


def test_products_of_many_rows_refuse_what_is_not_for_them():
    x, weight = draw(300, 64, dtype=torch.float32), draw(64, 64, seed=1, dtype=torch.float32)
    supports = cpu_products.product_supports
    assert supports(x, weight) is None
    assert "multiplications and more, not 0" in str(supports(x[:0], weight))
    assert "float32, not torch.bfloat16" in str(supports(x.bfloat16(), weight))
    assert "no backward of its own" in str(supports(x, weight.requires_grad_()))
    assert "dense" in str(cpu_products.linear_supports(x, FORMATS["int8"].pack(weight)))
    assert "dense" in str(
        cpu_products.grouped_linear_supports(x, FORMATS["int8"].pack(weight[None]), torch.tensor([300]))
    )
    assert "plain tensors, not Own" in str(supports(x.as_subclass(type("Own", (Tensor,), {})), weight.detach()))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("group", [32, 64, 128, 192, 256])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_products_with_int4_equal_loops_in_float64_whatever_columns_share_a_scale(group, has_zeros, rows):
    width, features = 3 * group, 6
    generator = np.random.default_rng(group)
    codes, zeros = generator.integers(0, 16, (features, width)), generator.integers(0, 16, (features, 3))
    zeros = zeros if has_zeros else np.full_like(zeros, 8)
    scales, x = draw(features, 3, seed=1), draw(rows, width, dtype=torch.float32) + 1
    stored = torch.from_numpy((codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8))
    weight = Packed(stored, scales, torch.from_numpy(zeros.astype(np.uint8)) if has_zeros else None, "int4")
    assert cpu_linear.linear_supports(x, weight) is None
    want = torch.zeros(rows, features, dtype=torch.float64)
    for n in range(features):
        for i in range(width):
            want[:, n] += x[:, i].double() * float(codes[n, i] - zeros[n, i // group]) * float(scales[n, i // group])
    assert distance(cpu_linear.linear(x, weight), want) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("width", [192, 1120, 8448])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_row_has_the_same_product_in_any_company(packing, dtype, width):
    x, weight = draw(23, width, dtype=dtype), pack(draw(37, width, seed=1, dtype=dtype), packing)
    whole = cpu_linear.linear(x, weight)
    for rows in ([3], [0, 22], [5, 4, 3, 2, 1]):
        assert torch.equal(cpu_linear.linear(x[rows], weight), whole[rows])


@torch.no_grad()
@pytest.mark.parametrize("packing", ["int8", "int4"])
def test_rows_of_zeros_tiny_huge_and_of_no_number_meet_packed_weights(packing):
    x, weight = draw(6, 128, dtype=torch.float32), pack(draw(9, 128, seed=1), packing)
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e30
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    got = cpu_linear.linear(x, weight)
    assert not got[0].any() and got[3:5].isnan().all()
    for row in (1, 2, 5):
        assert distance(got[row] / x[row].abs().amax(), x[row].double() / x[row].abs().amax() @ wide(weight).T) < 1e-4
    x[0, 0] = 1e-42
    assert cpu_linear.linear(x[:1], weight).abs().max() < 1e-38


@torch.no_grad()
def test_the_widest_rows_of_int8_do_not_overflow():
    width = 1 << 16
    x, weight = (
        torch.ones(1, width, dtype=BF16),
        Packed(torch.full((4, width), 127, dtype=torch.int8), torch.ones(4, 1), None, "int8"),
    )
    assert distance(cpu_linear.linear(x.float(), weight), torch.full((1, 4), 127.0 * width)) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 5), (3, 77), (300, 401)])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_the_inside_of_a_feed_forward_part_is_the_references(shape, dtype):
    gate, up = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    assert cpu_moe.silu_mul_supports(gate, up) is None
    torch.testing.assert_close(cpu_moe.silu_mul(gate, up), moe.silu_mul.reference(gate, up))


@torch.no_grad()
@pytest.mark.parametrize(("rows", "width"), [(0, 5), (3, 1), (70, 64), (300, 77)])
def test_weighted_insides_of_experts_and_their_gradients_equal_those_in_float64(rows, width):
    both, weights, grad = (draw(*shape, dtype=torch.float32) for shape in ((rows, 2 * width), (rows,), (rows, width)))
    both *= 3
    both[:1, 0] = -200.0
    assert cpu_moe.weighted_silu_mul_supports(both, weights) is None
    assert cpu_moe.weighted_silu_mul_backward_supports(grad, both, weights) is None
    exact = both.double().requires_grad_(), weights.double().requires_grad_()
    with torch.enable_grad():
        gate, up = exact[0].chunk(2, -1)
        want = torch.nn.functional.silu(gate) * up * exact[1][:, None]
    slopes = torch.autograd.grad(want, exact, grad.double())
    grad_both, grad_weights, hidden = cpu_moe.weighted_silu_mul_backward(grad, both, weights)
    pairs = [(cpu_moe.weighted_silu_mul(both, weights), want), (hidden, want), (grad_both, slopes[0])]
    for got, wanted in [*pairs, (grad_weights, slopes[1])]:
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert "contiguous" in str(cpu_moe.weighted_silu_mul_supports(both[:, ::2], weights)) or rows < 2
    assert "float64" in str(cpu_moe.weighted_silu_mul_supports(both.double(), weights))


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=9))
def test_numbers_to_draw_with_are_the_references(pairs):
    seeds, positions = (torch.tensor(column) for column in zip(*pairs))
    assert cpu_sample.counter_uniforms_supports(seeds, positions) is None
    found = cpu_sample.counter_uniforms(seeds, positions)
    assert found.equal(sample.counter_uniforms.reference(seeds, positions))


@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (300, 401)])
def test_gradients_of_the_inside_of_a_feed_forward_part_equal_those_in_float64(shape):
    gate, up = (draw(shape[0], 2 * shape[1], dtype=torch.float32) * 3).chunk(2, -1)  # views, as experts have
    tensors = [each.detach().requires_grad_() for each in (gate, up)]
    assert cpu_moe.silu_mul_supports(*tensors) is None
    wide_ones = [each.detach().double().requires_grad_() for each in tensors]
    got, want = cpu_moe.silu_mul(*tensors), moe.silu_mul.reference(*wide_ones)
    assert distance(got, want) < ROUNDED[torch.float32]
    upstream = draw(*shape, dtype=torch.float32)
    pairs = torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, wide_ones, upstream.double())
    assert all(distance(one, other) < ROUNDED[torch.float32] for one, other in zip(*pairs, strict=True))
    tensors[0].data[:, 0], tensors[0].data[0, -1] = 200.0, -200.0
    slopes = torch.autograd.grad(cpu_moe.silu_mul(*tensors).sum(), tensors)
    assert all(each.isfinite().all() for each in slopes)


@torch.no_grad()
@pytest.mark.parametrize("vocab", [1, 31, 526, 1000])
@pytest.mark.parametrize("rows", [0, 1, 90])
def test_predictions_and_their_gradients_equal_those_in_float64(vocab, rows):
    logits, targets = draw(rows, vocab, dtype=torch.float32) * 5, torch.arange(rows) % vocab
    logits[:, -1] += 60
    exact = logits.double()
    got, want = cpu_logprob.predictions(logits, targets), logprob.predictions.reference(exact, targets)
    torch.testing.assert_close(got, tuple(each.float() for each in want), rtol=1e-6, atol=1e-5)
    grad = draw(rows, dtype=torch.float32)
    changed = cpu_logprob.prediction_grads(logits, targets, got[2], grad)
    assert changed is logits
    wanted = logprob.prediction_grads.reference(exact, targets, want[2], grad.double())
    torch.testing.assert_close(changed, wanted.float(), rtol=2e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("vocab", [3, 64, 1001])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_samples_and_log_probabilities_are_those_of_the_reference(vocab, dtype):
    logits, rows = draw(40, vocab, dtype=dtype) * 3, 40
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(vocab))
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    temperature = torch.tensor([0.0, 1.0, 0.5, 3.0]).repeat(10)
    assert cpu_sample.sample_supports(logits, temperature, uniforms) is None
    for drawn in (uniforms, None):
        tokens, logprobs = cpu_sample.sample(logits, temperature, drawn)
        wanted, its_logprobs = sample.sample.reference(logits.double(), temperature, drawn)
        same = tokens == wanted
        assert same.sum() >= rows - 1, "a uniform may fall on an edge"
        torch.testing.assert_close(logprobs[same], its_logprobs[same].float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@settings(max_examples=60)
@given(
    st.integers(0, 999),
    st.sampled_from([1, 7, 40, 700]),
    st.sampled_from([0.0, 0.5, 3.0, 60.0]),
    st.sampled_from(NUMBERS),
    st.sampled_from(["top_k", "top_p", "min_p", "all"]),
)
def test_filters_draw_the_tokens_of_the_reference(seed, vocab, spread, dtype, which):
    """Logits that are all equal, that differ little, and whose powers vanish; filters that are off in some rows."""
    random = torch.Generator().manual_seed(seed)
    logits, rows = (torch.randn(24, vocab, generator=random) * spread).to(dtype), 24
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.0]).repeat(6)
    uniforms = torch.rand(rows, generator=random, dtype=torch.float64)
    filters = {
        "top_k": torch.randint(0, min(vocab, 12) + 2, (rows,), generator=random),
        "top_p": torch.rand(rows, generator=random).masked_fill(torch.arange(rows) % 3 == 0, 1.0),
        "min_p": torch.rand(rows, generator=random).pow(3).masked_fill(torch.arange(rows) % 5 == 0, 0.0),
    }
    asked = filters if which == "all" else {which: filters[which]}
    assert cpu_sample.sample_supports(logits, temperature, uniforms, **asked) is None
    tokens, logprobs = cpu_sample.sample(logits, temperature, uniforms, **asked)
    wanted, its_logprobs = sample.sample.reference(logits, temperature, uniforms, **asked)
    same = tokens == wanted
    assert same.sum() >= rows - 1, "a uniform may fall on an edge"
    torch.testing.assert_close(logprobs[same], its_logprobs[same], rtol=1e-4, atol=1e-4)
    scaled = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
    drawn = temperature > 0
    kept = sample.filter_logits(scaled, **asked).gather(1, tokens[:, None])
    assert kept[drawn].isfinite().all(), "a token that a filter drops was drawn"


def test_filters_of_other_types_are_refused():
    logits, temperature, uniforms = draw(2, 9), torch.ones(2), torch.rand(2)
    assert "int64" in str(cpu_sample.sample_supports(logits, temperature, uniforms, top_k=temperature))
    assert "float32" in str(cpu_sample.sample_supports(logits, temperature, uniforms, top_p=temperature.double()))


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_show_in_the_log_probability_and_tokens_exist(value):
    logits, temperature = draw(2, 50), torch.tensor([0.0, 1.0])
    logits[:, 7] = value
    tokens, logprobs = cpu_sample.sample(logits, temperature, torch.tensor([0.1, 0.9]))
    assert logprobs.isnan().all() and tokens.min() >= 0 and tokens.max() < 50


@torch.no_grad()
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_what_runs_with_drafts_and_where_is_the_references(seqs, num_drafts, seed):
    """Of tables of three blocks of four slots; some sequences are known to the state alone."""
    rng = np.random.default_rng(seed)
    newest, lengths = (torch.from_numpy(rng.integers(1, 8, 9)) for _ in range(2))
    guesses = torch.from_numpy(rng.integers(0, 50, (num_drafts, 9)))
    numbers = torch.from_numpy(rng.integers(0, 50, (seqs, drafts.NUM_FIELDS + 1 + num_drafts + 3)))
    fields = rng.permutation(9)[:seqs], rng.integers(0, 8, seqs), rng.integers(1, num_drafts + 2, seqs)
    limits, slots = rng.integers(2, 12, seqs), 4 * rng.integers(1, 4, seqs)
    numbers[:, : drafts.NUM_FIELDS] = torch.from_numpy(np.stack((*fields, limits, slots), 1))
    args = numbers, newest, lengths, guesses, 4, 1000
    assert cpu_drafts.draft_inputs_supports(*args) is None
    got, want = cpu_drafts.draft_inputs(*args), drafts.draft_inputs.reference(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tables, positions = numbers[:, -3:], torch.from_numpy(rng.integers(0, 14, seqs))
    args = tables, positions, numbers[:, 4], 4, 1000
    assert cpu_drafts.next_slots_supports(*args) is None
    got, want = cpu_drafts.next_slots(*args), drafts.next_slots.reference(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@torch.no_grad()
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 999))
def test_drafts_that_stand_are_the_references(seqs, width, seed):
    rng = np.random.default_rng(seed)
    samples, token_ids = (torch.from_numpy(rng.integers(0, 2, (seqs, width))) for _ in range(2))
    num_samples, lengths = (torch.from_numpy(rng.integers(1, most, seqs)) for most in (width + 1, 99))
    args = samples, token_ids, num_samples, lengths
    assert cpu_drafts.accept_drafts_supports(*args) is None
    got, want = cpu_drafts.accept_drafts(*args), drafts.accept_drafts.reference(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    target, places = torch.zeros(9, dtype=torch.int64), torch.from_numpy(rng.permutation(9)[:seqs])
    assert cpu_drafts.put_numbers_supports(target, places, got.newest) is None
    cpu_drafts.put_numbers(target, places, got.newest)
    assert torch.equal(target, torch.zeros_like(target).index_copy_(0, places, got.newest))


def test_what_surrounds_drafts_refuses_what_it_does_not_take_with_the_reason():
    numbers, row = torch.ones(3, 12, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    assert "contiguous" in str(cpu_drafts.draft_inputs_supports(numbers[:, 1:], row, row, row[None], 4, 1000))
    assert "side by side" in str(cpu_drafts.next_slots_supports(numbers.T, row, row, 4, 1000))
    assert "int64" in str(cpu_drafts.accept_drafts_supports(numbers.int(), numbers, row, row))
    assert "int64" in str(cpu_drafts.put_numbers_supports(row, row, row.float()))
    assert "contiguous" in str(cpu_drafts.most_likely_tokens_supports(draw(4, 4).T))


@torch.no_grad()
@pytest.mark.parametrize("vocab", [1, 31, 32, 1001])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_the_most_likely_token_is_the_first_of_the_largest(vocab, dtype):
    logits = draw(40, vocab, dtype=dtype).mul_(2).round_()  # many are equal
    logits[7, vocab // 2], logits[8] = torch.nan, -torch.inf
    logits[9, vocab // 3] = torch.inf
    assert cpu_drafts.most_likely_tokens_supports(logits) is None
    assert torch.equal(cpu_drafts.most_likely_tokens(logits), logits.argmax(-1))


def test_what_products_cannot_take_is_refused_with_the_reason():
    x, weight = draw(2, 64), draw(8, 64, seed=1)
    supports = cpu_linear.linear_supports
    with torch.no_grad():
        assert "rows of 64 numbers do not fit a weight of 32" in str(supports(x, weight[:, :32].contiguous()))
        assert "dense weights in bfloat16 or float32 with rows alike" in str(supports(x.float(), weight))
        assert "up to 128 rows, not 129" in str(supports(*(draw(129, 64, dtype=torch.float32),) * 2))
        assert "not fp8" in str(supports(x, FORMATS["fp8"].pack(weight)))
        odd = Packed(torch.zeros(8, 48, dtype=torch.uint8), torch.ones(8, 1, dtype=BF16), None, "int4")
        assert "int4 groups of 32 or of a multiple of 64 numbers, not 96" in str(supports(draw(2, 96), odd))
        assert "contiguous" in str(supports(draw(64, 2).T, weight))
        assert "bias in the dtype" in str(supports(x, weight, torch.zeros(8)))
    assert "no backward" in str(supports(x, weight.requires_grad_()))
    assert "no backward" in str(supports(x.requires_grad_(), weight.detach()))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 5, 33), (0, 8), (700, 96)])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_norms_are_those_of_the_reference(shape, dtype):
    x, delta, weight = (draw(*size, seed=i, dtype=dtype) for i, size in enumerate((shape, shape, shape[-1:])))
    assert cpu_norm.rms_norm_supports(x, weight, 1e-3) is None
    assert cpu_norm.add_rms_norm_supports(x, delta, weight, 1e-3) is None
    torch.testing.assert_close(cpu_norm.rms_norm(x, weight, 1e-3), norm.rms_norm.reference(x, weight, 1e-3))
    total, normed = cpu_norm.add_rms_norm(x, delta, weight, 1e-3)
    assert torch.equal(total, x + delta)
    torch.testing.assert_close(normed, norm.rms_norm.reference(total, weight, 1e-3))
    assert cpu_norm.residual_sum_supports(x, delta) is None
    assert torch.equal(cpu_norm.residual_sum(x, delta), x + delta)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (64, 96), (3, 50, 77)])
@pytest.mark.parametrize("across", [False, True])
def test_gradients_of_norms_equal_those_in_float64(shape, across):
    x, delta, grad, grad_total = (draw(*shape, seed=seed, dtype=torch.float32) for seed in range(4))
    x = lying(x, across) if x.ndim == 2 else x
    weight = draw(shape[-1], dtype=torch.float32)
    tensors = [each.requires_grad_() for each in (x, delta, weight)]
    exact = [each.detach().double().requires_grad_() for each in tensors]
    assert cpu_norm.rms_norm_supports(x, weight, 1e-3) is None
    assert cpu_norm.add_rms_norm_supports(x, delta, weight, 1e-3) is None
    found = [cpu_norm.rms_norm(x, weight, 1e-3)], [norm.rms_norm.reference(exact[0], exact[2], 1e-3)]
    both = cpu_norm.add_rms_norm(*tensors, 1e-3), norm.add_rms_norm.reference(*exact, 1e-3)
    for (got, want), upstream, of in ((found, [grad], (0, 2)), (both, [grad_total, grad], (0, 1, 2))):
        slopes = torch.autograd.grad(got, [tensors[i] for i in of], upstream)
        wanted = torch.autograd.grad(want, [exact[i] for i in of], [each.double() for each in upstream])
        for one, other in zip((*got, *slopes), (*want, *wanted), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert "float32" in str(cpu_norm.rms_norm_supports(exact[0], exact[2], 1e-3))
    alone = torch.autograd.grad(cpu_norm.add_rms_norm(*tensors, 1e-3)[0].sum(), x)[0]
    assert torch.equal(alone, torch.ones_like(alone)), "what is only added up has no other gradient"


@torch.no_grad()
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (3, 33), (0, 8), (70, 96)])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_two_norms_stand_side_by_side(rows, dim, dtype):
    first, second = (draw(rows, dim, seed=i, dtype=dtype) for i in range(2))
    weights = draw(dim, seed=2, dtype=dtype), draw(dim, seed=3, dtype=dtype)
    assert cpu_norm.paired_norms_supports(first, second, weights, 1e-3) is None
    got = cpu_norm.paired_norms(first, second, weights, 1e-3)
    torch.testing.assert_close(got, norm.paired_norms.reference(first, second, weights, 1e-3))
    assert "one dtype" in str(cpu_norm.paired_norms_supports(first, second.double(), weights, 1e-3))


def test_sums_of_tensors_that_are_not_alike_are_refused_with_the_reason():
    assert "not alike" in str(cpu_norm.residual_sum_supports(draw(2, 8), draw(8)))
    assert "no backward" in str(cpu_norm.residual_sum_supports(draw(2, 8), draw(2, 8).requires_grad_()))


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("lies", ["apart", "as one", "behind others"])
def test_weights_of_norms_may_lie_as_they_like(lies, with_gradients):
    x, delta = (draw(5, 32, seed=i, dtype=torch.float32).requires_grad_(with_gradients) for i in range(2))
    memory = draw(64, seed=2, dtype=torch.float32)
    weight = {"apart": memory[::2], "as one": memory[:1].expand(32), "behind others": memory[3:35]}[lies]
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-3), norm.rms_norm.reference(x, weight, 1e-3))
    found, wanted = (each(x, delta, weight, 1e-3) for each in (norm.add_rms_norm, norm.add_rms_norm.reference))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_kernels_read_nothing_behind_tensors_that_are_too_small(with_gradients):
    """Their references say what is wrong with such shapes, or take them."""
    x, other = (draw(8, 32, seed=i, dtype=torch.float32).requires_grad_(with_gradients) for i in range(2))
    small, few, right = (draw(size, dtype=torch.float32) for size in (16, 3, 32))
    assert "vector of 32" in str(cpu_norm.rms_norm_supports(x, small, 1e-3))
    assert "vector of 32" in str(cpu_norm.add_rms_norm_supports(x, other, small, 1e-3))
    assert "not alike" in str(cpu_norm.add_rms_norm_supports(x, other[:1], right, 1e-3))
    with torch.no_grad():
        assert "vector of 32" in str(cpu_norm.paired_norms_supports(x, other, (right, small), 1e-3))
        assert "not alike" in str(cpu_norm.paired_norms_supports(x, other[:4], (right, right), 1e-3))
        assert "vector of 8" in str(cpu_moe.weighted_silu_mul_supports(x, few))
        assert "vector of 8" in str(cpu_moe.weighted_silu_mul_backward_supports(x[:, :16].contiguous(), x, few))
        assert "shape (8, 16)" in str(
            cpu_products.add_product_supports(torch.zeros(8, 32), x, draw(16, 32, dtype=torch.float32))
        )
    assert "not alike" in str(cpu_moe.silu_mul_supports(x, other[:1]))


ROUTERS = [
    {"score": "sigmoid", "num_groups": 1, "topk_groups": 1},
    {"score": "softmax", "num_groups": 1, "topk_groups": 1},
    {"score": "sigmoid", "num_groups": 4, "topk_groups": 2},
    {"score": "softmax", "num_groups": 8, "topk_groups": 3},
]


def routed_alike(got: moe.Routed, want: moe.Routed) -> None:
    """Whatever the order within a row."""
    (ids, order), (wanted, its_order) = got.expert_ids.sort(-1), want.expert_ids.sort(-1)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(got.scores, want.scores)
    real = ids >= 0
    torch.testing.assert_close(got.weights.gather(1, order)[real], want.weights.gather(1, its_order)[real])
    assert not got.weights.gather(1, order)[~real].any()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("options", ROUTERS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(BF16, BF16), (BF16, torch.float32), (torch.float32, torch.float32)])
def test_routers_choose_and_weigh_as_the_reference(tokens, options, normalize, rows, dtype):
    x, weight = draw(tokens, 72, dtype=rows), draw(16, 72, seed=1, dtype=dtype) / 8
    bias = draw(16, seed=2, dtype=torch.float32) / 8 if options["score"] == "sigmoid" else None
    options = {**options, "topk": 5, "normalize": normalize, "scale": 2.5}
    assert cpu_moe.route_supports(x, weight, bias, **options) is None
    want = moe.route.reference(x, weight, bias, **options)
    routed_alike(cpu_moe.route(x, weight, bias, **options), want)
    for activation in (
        moe.Activation(3),
        moe.Activation(4, torch.arange(tokens) % 4 + 1),
        moe.Activation(4, None, torch.full((tokens,), 0.9)),
        moe.Activation(5, torch.full((tokens,), 4), torch.full((tokens,), 0.8)),
    ):
        assert cpu_moe.route_supports(x, weight, bias, **options, activation=activation) is None
        want = moe.route.reference(x, weight, bias, **options, activation=activation)
        routed_alike(cpu_moe.route(x, weight, bias, **options, activation=activation), want)
    ids = torch.where(torch.arange(5) == 2, -1, want.expert_ids[:, :1].clamp_min(0) + torch.zeros(5, dtype=torch.long))
    replayed = {**options, "given": ids, "may_be_nobody": True}
    assert cpu_moe.route_supports(x, weight, bias, **replayed) is None
    routed_alike(cpu_moe.route(x, weight, bias, **replayed), moe.route.reference(x, weight, bias, **replayed))


@torch.no_grad()
def test_routers_of_no_numbers_choose_experts_that_exist():
    x, weight = torch.full((2, 64), torch.nan, dtype=BF16), draw(8, 64)
    routed = cpu_moe.route(
        x, weight, None, score="softmax", topk=3, num_groups=4, topk_groups=2, normalize=True, scale=1.0
    )
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in routed.expert_ids.tolist())


def mixed_in_float64(x, ids, weights, gate_up, down, shared, residual) -> Tensor:
    def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    (gate_up, down), x = map(wide, (gate_up, down)), x.double()
    total = torch.zeros_like(x) if residual is None else residual.double()
    for t, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            if e >= 0:
                total[t] += weights[t, j].double() * feed_forward(x[t], *gate_up[e], down[e])
    return total if shared is None else total + feed_forward(x, *map(wide, shared))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("alone", [False, True])
def test_experts_equal_a_loop_over_tokens(tokens, packing, alone):
    experts, topk, dim, width = 7, 3, 192, 64
    x, weights = draw(tokens, dim), torch.rand(tokens, topk)
    ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
    ids[-1, 1] = -1
    gate_up, down = pack(draw(experts, 2, width, dim) / 8, packing), pack(draw(experts, dim, width) / 8, packing)
    shared, residual = None, None
    if not alone:
        shared = tuple(pack(draw(*shape, seed=3) / 8, packing) for shape in ((128, dim), (128, dim), (dim, 128)))
        residual = draw(tokens, dim, seed=4)
    args, options = (x, ids, weights, gate_up, down), {"shared": shared, "residual": residual}
    assert cpu_moe.mix_experts_supports(*args, **options) is None
    want = mixed_in_float64(*args, **options)
    got = cpu_moe.mix_experts(*args, **options)
    assert distance(got, want) < 2 * ROUNDED[BF16]
    some = [0, tokens // 2, tokens - 1]
    for t in some:  # in any company
        one = {name: None if each is None else each[t : t + 1] for name, each in (("residual", residual),)}
        alone_got = cpu_moe.mix_experts(
            x[t : t + 1], ids[t : t + 1], weights[t : t + 1], gate_up, down, shared=shared, **one
        )
        assert torch.equal(alone_got[0], got[t])
    if packing is not None:
        got = cpu_moe.mix_experts(
            x.float(), *args[1:], shared=shared, residual=None if residual is None else residual.float()
        )
        assert got.dtype == torch.float32 and distance(got, want) < 3e-4


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("alone", [False, True])
def test_experts_in_float32_equal_a_loop_over_tokens(tokens, alone):
    experts, topk, dim, width = 5, 2, 80, 48

    def weight(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float32) / 8

    x, weights, ids = weight(tokens, dim), torch.rand(tokens, topk), torch.randint(0, experts, (tokens, topk))
    ids[-1, 1] = -1
    shared = None if alone else (weight(64, dim), weight(64, dim), weight(dim, 64))
    args = x, ids, weights, weight(experts, 2, width, dim), weight(experts, dim, width)
    options = {"shared": shared, "residual": None if alone else weight(tokens, dim)}
    assert cpu_moe.mix_experts_supports(*args, **options) is None
    assert distance(cpu_moe.mix_experts(*args, **options), mixed_in_float64(*args, **options)) < 1e-6


def test_experts_refuse_what_has_no_kernel():
    x, ids, weights = draw(2, 64), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    gate_up, down = draw(3, 2, 32, 64), draw(3, 64, 32)
    supports = cpu_moe.mix_experts_supports
    assert "no backward" in str(supports(x, ids, weights, gate_up, down))
    with torch.no_grad():
        assert supports(x, ids, weights, gate_up, down) is None
        assert supports(x.float(), ids, weights, gate_up.float(), down.float()) is None
        assert "with rows alike" in str(supports(x.float(), ids, weights, gate_up, down))
        mixed = (draw(32, 64), FORMATS["int8"].pack(draw(32, 64)), draw(64, 32))
        assert "gate is dense and whose up is int8" in str(supports(x, ids, weights, gate_up, down, shared=mixed))
        assert "residual" in str(supports(x, ids, weights, gate_up, down, residual=x.float()))


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = draw(tokens, half, dtype=torch.float32) * 3
    return angle.cos(), angle.sin()


def paged(
    lengths: list[int], contexts: list[int], row: LatentRow | KVRow, dtype: torch.dtype = BF16, block: int = 4
) -> LayerCache:
    """A cache of random rows in blocks out of order; what belongs to nobody is NaN."""
    needs = [-(-context // block) for context in contexts]
    order = torch.randperm(sum(needs) + 2, generator=torch.Generator().manual_seed(0)).tolist()
    tables, slots = torch.zeros(len(contexts), max(needs), dtype=torch.long), []
    rows = torch.full((len(order) * block, row.width), torch.nan, dtype=dtype)
    for s, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        own = [order.pop() for _ in range(needs[s])]
        tables[s] = torch.tensor(own + own[:1] * (max(needs) - len(own)))
        for b in own:
            rows[b * block : (b + 1) * block] = draw(block, row.width, seed=b, dtype=dtype)
        slots += [own[p // block] * block + p % block for p in range(context - length, context)]
    lens = torch.tensor(contexts)
    return LayerCache(rows, torch.tensor(slots), tables, lens, np.array(contexts), block, row)


STEPS = [([1], [1]), ([1, 1], [70, 33]), ([3, 1], [9, 64]), ([40, 2, 1], [40, 100, 7])]


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "contexts"), STEPS)
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        *((row, BF16) for row in (LatentRow(64, 32), LatentRow(32, 32, index=16), KVRow(2, 32))),
        *((row, BF16) for row in (LatentRow(32, 16), LatentRow(45, 6), KVRow(2, 20))),
        *((row, torch.float32) for row in (LatentRow(32, 16), LatentRow(48, 16, index=16), KVRow(2, 48))),
        *((row, torch.float32) for row in (LatentRow(23, 2), KVRow(2, 20))),
    ],
)
def test_attention_over_the_cache_equals_the_reference_in_float64(lengths, contexts, heads, row, dtype):
    heads *= 2 if isinstance(row, KVRow) else 1
    view, segments = paged(lengths, contexts, row, dtype), segments_of(lengths)
    width = row.latent + row.rope if isinstance(row, LatentRow) else row.head_dim
    q = draw(sum(lengths), heads, width, dtype=dtype)
    assert cpu_attention.cached_attention_supports(q, view, segments, scale=0.2) is None
    exact = LayerCache(
        view.rows.double(), view.slots, view.block_tables, view.context_lens, view.contexts, view.block_size, row
    )
    want = attention.cached_attention.reference(q.double(), exact, segments, scale=0.2)
    assert distance(cpu_attention.cached_attention(q, view, segments, scale=0.2), want) < 2 * ROUNDED[dtype]


@torch.no_grad()
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("heads", [2, 4, 16])
@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        (LatentRow(64, 32), BF16),
        (LatentRow(32, 16), torch.float32),
        (KVRow(2, 32), BF16),
        (KVRow(2, 20), torch.float32),
    ],
)
def test_a_query_reads_nothing_of_the_tokens_behind_it(row, dtype, heads, poison):
    """As drafts are: what they make of themselves, numbers or none, is theirs."""
    lengths, wrong, right = [3, 2, 4], [2, 4, 7, 8], [0, 1, 3, 5, 6]
    view, segments = paged(lengths, [9, 33, 40], row, dtype), segments_of(lengths)
    width = row.latent + row.rope if isinstance(row, LatentRow) else row.head_dim
    q = draw(sum(lengths), heads, width, dtype=dtype)
    want = cpu_attention.cached_attention(q, view, segments, scale=0.2)
    view.rows[view.slots[wrong]] = poison
    found = cpu_attention.cached_attention(q, view, segments, scale=0.2)
    assert torch.equal(found[right], want[right]) and not found[wrong].isfinite().all(-1).any()


def test_attention_refuses_what_has_no_kernel():
    q, segments = draw(1, 2, 48), segments_of([1])
    supports = cpu_attention.cached_attention_supports
    assert supports(q, paged([1], [3], LatentRow(32, 16)), segments, scale=1.0) is None
    assert "without an indexer" in str(supports(q, paged([1], [3], LatentRow(32, 16, fp8=True)), segments, scale=1.0))
    view = paged([1], [3], LatentRow(128, 32))
    q = draw(1, 2, 160)
    assert supports(q, view, segments, scale=1.0) is None
    assert "one dtype, not torch.float32 and torch.bfloat16" in str(supports(q.float(), view, segments, scale=1.0))


@pytest.mark.parametrize("lengths", [[2], [1, 5, 70, 3], [200, 64, 65], [16] * 5])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "value_width"), [(1, 1, 16, 16), (4, 4, 48, 32), (6, 2, 32, 48)]
)
def test_attention_without_a_cache_and_its_gradients_equal_those_in_float64(
    lengths, heads, key_heads, width, value_width
):
    tokens, segments = sum(lengths), segments_of(lengths)
    q = draw(tokens, heads, width, dtype=torch.float32).requires_grad_()
    both = draw(tokens, key_heads, width + value_width, seed=1, dtype=torch.float32)
    k, v = (each.detach().requires_grad_() for each in both.split([width, value_width], -1))  # views, as layers have
    tensors = [q, k, v]
    assert cpu_varlen.varlen_attention_supports(*tensors, segments, scale=0.3) is None
    got = cpu_varlen.varlen_attention(*tensors, segments, scale=0.3)
    wide_ones = [each.detach().double().requires_grad_() for each in tensors]
    want = attention.varlen_attention.reference(*wide_ones, segments, scale=0.3)
    assert distance(got, want) < ROUNDED[torch.float32]
    upstream = draw(tokens, heads, value_width, seed=2, dtype=torch.float32)
    pairs = torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(want, wide_ones, upstream.double())
    assert all(distance(one, other) < 1e-5 for one, other in zip(*pairs, strict=True))
    last = segments_of(lengths[-1:])  # in any company
    alone = cpu_varlen.varlen_attention(*(each[-lengths[-1] :] for each in tensors), last, scale=0.3)
    assert torch.equal(alone, got[-lengths[-1] :])


def test_attention_without_a_cache_shows_what_is_no_number_where_it_is_seen_and_refuses_what_it_does_not_take():
    q, k, v = (draw(9, 2, 32, seed=i, dtype=torch.float32) for i in range(3))
    k[6, 1, 3] = torch.nan
    segments = segments_of([5, 4])
    got = cpu_varlen.varlen_attention(q, k, v, segments, scale=1.0)
    assert got[6:, 1].isnan().all() and got[6:, 0].isfinite().all() and got[:6].isfinite().all()
    supports = cpu_varlen.varlen_attention_supports
    assert "multiple of 16 numbers side by side, not 24" in str(supports(q[..., :24], k, v, segments, scale=1.0))
    assert "float32, not torch.bfloat16" in str(supports(q, k.bfloat16(), v, segments, scale=1.0))
    assert "within sequences" in str(supports(q, k, v, segments, scale=1.0, keys=segments))


def same_with_gradients(ours: Callable[..., Any], formula: Callable[..., Any], *tensors: Tensor) -> None:
    """Results and gradients, of results weighed anyhow, against a formula in float64."""
    found = []
    for function, each in ((ours, tensors), (formula, [t.double() for t in tensors])):
        leaves = [t.detach().clone().requires_grad_() for t in each]
        made = function(*leaves)
        made = made if isinstance(made, tuple) else (made,)
        weights = [draw(*m.shape, seed=9, dtype=torch.float32).to(m.dtype) for m in made]
        total = sum((m * w).sum() for m, w in zip(made, weights, strict=True))
        found.append([*made, *torch.autograd.grad(total, leaves)])
    assert all(distance(*pair) < ROUNDED[torch.float32] for pair in zip(*found, strict=True))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


@pytest.mark.parametrize(
    ("tokens", "heads", "nope", "rope", "v"), [(1, 1, 16, 8, 16), (5, 3, 16, 8, 32), (1200, 2, 4, 2, 8)]
)
def test_queries_keys_and_values_of_training_and_their_gradients_equal_those_in_float64(tokens, heads, nope, rope, v):
    angles = draw(tokens, rope // 2, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()

    def query(x: Tensor) -> Tensor:  # rows that lie apart
        return x[:, 4:].unflatten(1, (heads, -1))

    wide_rows = draw(tokens, heads * (nope + rope) + 4, dtype=torch.float32)
    assert cpu_latent_training.rotate_query_supports(query(wide_rows), cos, sin, nope) is None
    same_with_gradients(
        lambda x: cpu_latent_training.rotate_query(query(x), cos, sin, nope),
        lambda x: torch.cat((query(x)[..., :nope], turned(query(x)[..., nope:], cos, sin)), -1),
        wide_rows,
    )
    kv, weight = draw(tokens, 24 + rope, dtype=torch.float32), draw(24, seed=1, dtype=torch.float32)
    assert cpu_latent_training.latent_and_key_supports(kv, weight, cos, sin, 1e-5) is None
    same_with_gradients(
        lambda kv, weight: cpu_latent_training.latent_and_key(kv, weight, cos, sin, 1e-5),
        lambda kv, weight: (
            kv[:, :24] * (kv[:, :24].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
            turned(kv[:, None, 24:], cos, sin),
        ),
        kv,
        weight,
    )
    both, key = (draw(*shape, dtype=torch.float32) for shape in ((tokens, heads, nope + v), (tokens, 1, rope)))
    assert cpu_latent_training.keys_and_values_supports(both, key, nope) is None
    same_with_gradients(
        lambda both, key: cpu_latent_training.keys_and_values(both, key, nope),
        lambda both, key: (torch.cat((both[..., :nope], key.expand(-1, heads, -1)), -1), both[..., nope:]),
        both,
        key,
    )
    assert "float32" in str(cpu_latent_training.rotate_query_supports(query(wide_rows.bfloat16()), cos, sin, nope))
    assert "not by angles of shape" in str(
        cpu_latent_training.rotate_query_supports(query(wide_rows), cos, sin, nope + 2)
    )
    assert "side by side" in str(cpu_latent_training.latent_and_key_supports(kv, torch.ones(48)[::2], cos, sin, 1e-5))
    assert "no key" in str(
        cpu_latent_training.keys_and_values_supports(torch.ones(3, 2, 24), torch.ones(2, 1, 8), nope)
    )
    assert "contiguous" in str(
        cpu_latent_training.keys_and_values_supports(torch.ones(2, 3, 25)[..., 1:], torch.ones(2, 1, 8), nope)
    )


@torch.no_grad()
@pytest.mark.parametrize(("tokens", "topk", "dim"), [(0, 2, 8), (1, 1, 5), (7, 3, 96), (900, 2, 33)])
def test_copies_of_tokens_are_summed_by_gathering_them(tokens, topk, dim):
    y = draw(tokens * topk, dim, dtype=torch.float32)
    inverse = torch.randperm(tokens * topk, generator=torch.Generator().manual_seed(0))
    assert cpu_moe.sum_copies_supports(y, inverse, topk) is None
    got, want = cpu_moe.sum_copies(y, inverse, topk), y.double()[inverse].view(tokens, topk, dim).sum(1)
    assert got.shape == want.shape and (not tokens or distance(got, want) < ROUNDED[torch.float32])


@torch.no_grad()
@pytest.mark.parametrize("dtype", NUMBERS)
def test_embeddings_are_the_rows_of_their_tokens_and_zeros_where_there_is_none(dtype):
    weight, ids = draw(11, 41, dtype=dtype), torch.tensor([3, 10, 0, 3])
    assert cpu_embed.embed_supports(ids, weight) is None
    assert torch.equal(cpu_embed.embed(ids, weight), weight[ids])
    assert not cpu_embed.embed(torch.tensor([11, -1]), weight).any()
    assert "128 tokens" in str(cpu_embed.embed_supports(torch.zeros(129, dtype=torch.long), weight))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_angles_are_those_of_the_reference(scale):
    positions, theta = torch.tensor([0, 1, 77, 163_839]), rope.inverse_frequencies(64, 10000.0)
    assert cpu_rope.rope_angles_supports(positions, theta, scale) is None
    got, want = cpu_rope.rope_angles(positions, theta, scale), rope.rope_angles.reference(positions, theta, scale)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert "up to 128 positions" in str(cpu_rope.rope_angles_supports(torch.arange(129), theta))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 19])
@pytest.mark.parametrize("kept", [96, 64])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_rows_are_normed_turned_and_written_as_the_reference_does(tokens, kept, dtype):
    row, weight = LatentRow(kept, 32), draw(96, seed=1, dtype=dtype)
    kv, (cos, sin) = draw(tokens, 128, seed=2, dtype=dtype), angles(tokens, 16)
    views = [paged([tokens], [tokens + 3], row, dtype) for _ in range(2)]
    assert cpu_latent.write_latent_supports(kv, views[0], weight, cos, sin, eps=1e-6) is None
    cpu_latent.write_latent(kv, views[0], weight, cos, sin, eps=1e-6)
    cache.write_latent.reference(kv, views[1], weight, cos, sin, eps=1e-6)
    torch.testing.assert_close(views[0].rows, views[1].rows, equal_nan=True)
    assert "index keys" in str(
        cpu_latent.write_latent_supports(kv, views[0], weight, cos, sin, eps=1e-6, index_key=draw(tokens, 8))
    )


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 8, 21])
@pytest.mark.parametrize(
    ("nope", "taken", "dtype"),
    [
        *((16, 96, BF16), (40, 96, BF16), (64, 64, BF16), (33, 48, BF16), (7, 5, BF16)),
        *((16, 80, torch.float32), (33, 48, torch.float32), (7, 5, torch.float32)),
    ],
)
def test_queries_and_values_move_between_heads_and_latents_as_in_float64(tokens, nope, taken, dtype):
    heads, v, rope = 3, 24, 16
    up = (
        draw(heads, nope + v, 96, dtype=dtype) / 8
    )  # the matrices are views of one projection, and may be cut to a narrower rank
    w_uk, w_uv = up[:, :nope, :taken], up[:, nope:, :taken]
    q, (cos, sin) = draw(tokens, heads, nope + rope, dtype=dtype), angles(tokens, rope // 2)
    assert cpu_latent.absorb_query_supports(q, w_uk, cos, sin) is None
    want = latent.absorb_query.reference(q.double(), w_uk.double(), cos.double(), sin.double())
    assert distance(cpu_latent.absorb_query(q, w_uk, cos, sin), want) < ROUNDED[dtype]
    mixed = draw(tokens, heads, taken, dtype=dtype)
    assert cpu_latent.project_values_supports(mixed, w_uv) is None
    want = latent.project_values.reference(mixed.double(), w_uv.double())
    assert distance(cpu_latent.project_values(mixed, w_uv), want) < ROUNDED[dtype]


@torch.no_grad()
@given(st.integers(1, 12), st.integers(1, 80), st.integers(1, 9), st.integers(1, 200), st.sampled_from(PACKINGS))
def test_products_of_any_shape_are_right(rows, features, blocks, width, packing):
    """In memory behind which nothing may be read."""
    width = 32 * blocks if str(packing).startswith("int4") else width
    x, weight = draw(rows, width), pack(draw(features, width, seed=1), packing)
    want = x.double() @ wide(weight).T
    assert distance(cpu_linear.linear(x, weight), want) < 3 * ROUNDED[BF16]
    if packing is None:
        assert distance(cpu_linear.linear(x.float(), weight.float()), want) < 2 * ROUNDED[torch.float32]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 10])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(("dim", "width"), [(96, 32), (160, 96), (50, 21)])
def test_experts_of_narrow_models_equal_a_loop_over_tokens(tokens, packing, dim, width):
    if str(packing).startswith("int4") and dim % 32:
        pytest.skip("no group of int4 divides it")
    x, weights, ids = draw(tokens, dim), torch.rand(tokens, 2), torch.randint(0, 4, (tokens, 2))
    shapes = (4, 2, width, dim), (4, dim, width), (width, dim), (width, dim), (dim, width)
    gate_up, down, *shared = (pack(draw(*shape, seed=i) / 6, packing) for i, shape in enumerate(shapes))
    options = {"shared": tuple(shared), "residual": draw(tokens, dim, seed=9)}
    assert cpu_moe.mix_experts_supports(x, ids, weights, gate_up, down, **options) is None
    got = cpu_moe.mix_experts(x, ids, weights, gate_up, down, **options)
    assert distance(got, mixed_in_float64(x, ids, weights, gate_up, down, **options)) < 2 * ROUNDED[BF16]


@torch.no_grad()
def test_experts_of_which_some_share_scales_by_other_groups_are_refused():
    x, ids, weights = draw(1, 64), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    gate_up, down = pack(draw(2, 2, 64, 64), "int4"), pack(draw(2, 64, 64), "int4")
    one = pack(draw(64, 64), "int4")
    narrow = Packed(one.data, torch.ones(64, 2, dtype=BF16), None, "int4")
    assert cpu_moe.mix_experts_supports(x, ids, weights, gate_up, down, shared=(one, one, one)) is None
    reason = cpu_moe.mix_experts_supports(x, ids, weights, gate_up, down, shared=(narrow, narrow, one))
    assert "int4 groups of 32 and of 64 numbers" in str(reason)


@torch.no_grad()
@pytest.mark.parametrize("dtype", NUMBERS)
def test_ops_call_the_kernels_by_themselves_and_threads_change_nothing(dtype):
    x, weight = draw(5, 512, dtype=dtype), draw(640, 512, seed=1, dtype=dtype)
    assert linear.linear.refusals([x, weight], {}) == {"cpu": None}
    before, one = torch.get_num_threads(), linear.linear(x, weight)
    try:
        torch.set_num_threads(2)
        assert torch.equal(linear.linear(x, weight), one)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("dtype", NUMBERS)
def test_a_recording_does_again_what_was_done_with_what_its_inputs_hold_now(dtype):
    x, weight, scale = draw(3, 64, dtype=dtype), draw(64, 64, seed=1, dtype=dtype), draw(64, seed=2, dtype=dtype)
    rows = torch.zeros(2, 64, dtype=dtype)

    def step() -> Tensor:
        hidden = linear.linear(norm.rms_norm(x, scale, 1e-6), weight)
        hidden = torch.tanh(hidden).view(3, 2, 32).flatten(1) + 1  # of PyTorch's own
        rows.index_copy_(0, torch.tensor([1]), hidden[:1])
        return linear.linear(hidden, weight)

    with recording() as made:
        result = step()
    first = result.clone()
    assert torch.equal(first, step())
    x.copy_(draw(3, 64, seed=9, dtype=dtype))
    made.replay()
    replayed, written = result.clone(), rows.clone()
    assert torch.equal(replayed, step()) and torch.equal(written, rows) and not torch.equal(replayed, first)


@pytest.mark.parametrize(
    "ask", [lambda x: x.sum().item(), lambda x: torch.equal(x, x + 1), lambda x: bool(x.sum() > 0)]
)
def test_a_step_that_asks_for_a_number_is_not_recorded(ask):
    with pytest.raises(RuntimeError, match="asks for a number"), recording():
        ask(draw(3))
    with recording():
        pass


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.promote_types(x.dtype, torch.float64),
        lambda x: torch.result_type(x, 1.0),
        lambda x: torch.can_cast(x.dtype, torch.float64),
    ],
)
def test_a_step_that_asks_for_types_is_recorded(ask):
    x = draw(3)
    with recording() as made:
        ask(x)
        result = x + 1
    x.add_(1)
    made.replay()
    assert torch.equal(result, x + 1)


def test_a_machine_without_a_compiler_or_the_instructions_says_so_and_one_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ImportError, match=r"there is no C\+\+ compiler: install one of g\+\+"):
        build.load("AVX2")
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: what is this' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(ImportError, match="cannot compile the kernels: kernels.cpp:1: error: what is this"):
        build.load("AVX2")
    assert list((tmp_path / "kogia").iterdir()) == []
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(ImportError, match="the kernels cannot be compiled"):
        build.load("AVX2")
    monkeypatch.setattr(build, "_processor_flags", lambda: {"sse2"})
    with pytest.raises(ImportError, match="no AVX2"):
        build.level.__wrapped__()


def test_a_damaged_file_of_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "kogia" / f"cpu-{build._key('AVX2')}.so"
    path.parent.mkdir()
    path.write_text("not a library")
    with pytest.raises(ImportError, match="do not load: .*delete .*cpu-"):
        build.load("AVX2")
