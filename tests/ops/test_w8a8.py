"""Many rows times packed FP8 weights, in FP8: beside loops in float64, and which calls are taken."""

import math

import pytest
import torch
from torch import Tensor

from kogia.ops.dispatch import batch_invariant, use_backend, which
from kogia.ops.linear import linear
from kogia.ops.moe import mix_experts
from kogia.ops.packed import FORMATS, Packed
from kogia.ops.w8a8 import products
from kogia.ops.w8a8.products import LEAST_ROWS, LEAST_TOKENS

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(*shape: int, seed: int = 0, format: str = "fp8") -> Packed:
    return FORMATS[format].pack(0.1 * drawn(*shape, seed=seed))


def nearest_code(x: float) -> float:
    """The nearest number of 3 bits behind the leading one, with exponents from -6: E4M3's, below 448."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(x))), -6) - 3)
    return round(x / step) * step  # of two as near, the even one


def rounded(row: list[float]) -> list[float]:
    found: list[float] = []
    for start in range(0, len(row), 128):
        group = row[start : start + 128]
        scale = max(map(abs, group)) / 448 or 1.0
        found += [nearest_code(x / scale) * scale for x in group]
    return found


def times(x: Tensor, weight: Packed) -> Tensor:
    """x W^T of the rounded rows, in float64."""
    rows = torch.tensor([rounded(row) for row in x.double().tolist()], dtype=torch.float64).view(len(x), x.shape[1])
    return rows @ weight.dense(torch.float64).T


def swiglu(x: Tensor, gate: Packed, up: Packed, down: Packed) -> Tensor:
    g = times(x, gate)
    return times(g * torch.sigmoid(g) * times(x, up), down)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 16, 128), (5, 144, 200), (3, 260, 64)], ids=str)
def test_rows_are_rounded_by_groups_of_128_and_multiplied_with_the_weight_as_it_is_stored(rows, width, depth, bias):
    x = drawn(rows, depth) * torch.exp(3 * drawn(rows, 1, seed=1))
    x[0, : min(128, depth)] = 0
    weight, added = packed(width, depth, seed=2), drawn(width, seed=3) if bias else None
    want = times(x, weight) + (0 if added is None else added)
    close(products.linear(x, weight, added), want, 1e-6)
    close(products.linear(x[None, :, None], weight, added)[0, :, 0], want, 1e-6)


def test_rounding_the_rows_costs_a_few_percent_of_what_a_product_of_random_numbers_is():
    x, weight = drawn(200, 512), packed(256, 512, seed=1)
    exact = x.double() @ weight.dense(torch.float64).T
    error = float((products.linear(x, weight) - exact).norm() / exact.norm())
    assert 0.01 < error < 0.04


EXPERT_IDS = {
    "some without rows": [[0, 3], [3, 0], [0, 3], [3, 4]],
    "nobody": [[-1, 2], [1, -1], [-1, -1], [4, 2]],
    "one for all": [[2], [2], [2], [2]],
}


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("case", EXPERT_IDS)
def test_experts_multiply_rounded_tokens_and_rounded_hidden_numbers(case, with_shared):
    ids = torch.tensor(EXPERT_IDS[case])
    tokens, dim, width = len(ids), 200, 128
    x, residual = drawn(tokens, dim), drawn(tokens, dim, seed=1)
    weights = drawn(*ids.shape, seed=2).abs()
    gate_up, down = packed(5, 2, width, dim, seed=3), packed(5, dim, width, seed=4)
    shared = (packed(160, dim, seed=5), packed(160, dim, seed=6), packed(dim, 160, seed=7)) if with_shared else None
    want = residual.double() + (0 if shared is None else swiglu(x, *shared))
    for t, choices in enumerate(ids.tolist()):
        for choice, expert in enumerate(choices):
            if expert >= 0:
                y = swiglu(x[t : t + 1], gate_up[expert][0], gate_up[expert][1], down[expert])
                want[t] += float(weights[t, choice]) * y[0]
    got = products.mix_experts(x, ids, weights, gate_up, down, shared=shared, residual=residual)
    close(got, want, 2e-3)  # a hidden number in float32 may round to another code than in float64
    if not with_shared:
        alone = products.mix_experts(x, ids, weights, gate_up, down)
        close(alone + residual, want, 2e-3)


def test_a_token_that_is_not_finite_leaves_the_others_alone():
    x, ids, weights = drawn(4, 128), torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1)
    gate_up, down = packed(2, 2, 128, 128), packed(2, 128, 128, seed=1)
    clean = products.mix_experts(x, ids, weights, gate_up, down)
    x[2, 5] = float("nan")
    got = products.mix_experts(x, ids, weights, gate_up, down)
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]]) and not got[2].isfinite().any()


def test_it_is_for_many_rows_from_the_crossover_on():
    weight, bias = packed(32, 128), torch.zeros(32, dtype=torch.bfloat16)
    x = torch.zeros(LEAST_ROWS, 128, dtype=torch.bfloat16)
    assert products.linear_supports(x, weight, bias) is None
    assert products.linear_supports(x.view(1, LEAST_ROWS, 128), weight) is None
    assert f"at least {LEAST_ROWS} rows, not {LEAST_ROWS - 1}" in str(products.linear_supports(x[1:], weight))
    gate_up, down = packed(2, 2, 128, 128), packed(2, 128, 128)
    tokens = torch.zeros(LEAST_TOKENS, 128, dtype=torch.bfloat16)
    ids, weights = torch.zeros(LEAST_TOKENS, 1, dtype=torch.int64), torch.ones(LEAST_TOKENS, 1)
    assert products.mix_experts_supports(tokens, ids, weights, gate_up, down) is None
    few = products.mix_experts_supports(tokens[1:], ids[1:], weights[1:], gate_up, down)
    assert f"at least {LEAST_TOKENS} tokens, not {LEAST_TOKENS - 1}" in str(few)


def test_it_says_what_it_cannot_take():
    x, weight = torch.zeros(LEAST_ROWS, 128, dtype=torch.bfloat16), packed(32, 128)
    refuses = products.linear_supports
    assert "dense weights are for cuBLAS" in str(refuses(x, weight.dense(torch.bfloat16)))
    assert "stored as fp8, not int8" in str(refuses(x, packed(32, 128, format="int8")))
    assert "one matrix, not a stack of (2,)" in str(refuses(x, packed(2, 32, 128)))
    assert "a multiple of 16 numbers, not 24" in str(refuses(x, packed(24, 128)))
    assert "not torch.float32" in str(refuses(x.float(), weight))
    assert "no backward" in str(refuses(x.clone().requires_grad_(), weight))
    turned = Packed(packed(128, 32).data.T, weight.scale, None, "fp8")
    assert "contiguous weights" in str(refuses(x, turned))
    tokens = torch.zeros(LEAST_TOKENS, 128, dtype=torch.bfloat16)
    ids, weights = torch.zeros(LEAST_TOKENS, 1, dtype=torch.int64), torch.ones(LEAST_TOKENS, 1)
    narrow = packed(2, 2, 96, 128), packed(2, 128, 96)
    assert "96 wide" in str(products.mix_experts_supports(tokens, ids, weights, *narrow))
    dense = drawn(2, 2, 128, 128), drawn(2, 128, 128)
    assert "grouped_mm" in str(products.mix_experts_supports(tokens, ids, weights, *dense))
    experts, shared = (packed(2, 2, 128, 128), packed(2, 128, 128)), (drawn(128, 128), packed(128, 128), dense[0][0, 0])
    found = products.mix_experts_supports(tokens, ids, weights, *experts, shared=shared)
    assert "stored as fp8, not torch.float32" in str(found)


def test_on_a_gpu_it_is_asked_first_and_batch_invariant_products_never_are_it():
    assert linear.backends("cuda")[0].name == mix_experts.backends("cuda")[0].name == "w8a8"
    assert which("cuda")["linear"]["w8a8"] is None
    for each in (linear, mix_experts):
        assert "w8a8" not in [b.name for kind in ("invariant", "invariant_cuda") for b in each.backends(kind)]


def test_batch_invariant_rows_are_not_rounded_whatever_their_number():
    x, weight = drawn(LEAST_ROWS, 64).bfloat16(), packed(32, 64)
    with batch_invariant():
        assert torch.equal(linear(x, weight)[:1], linear(x[:1], weight))


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [LEAST_ROWS, LEAST_ROWS + 2])
def test_on_hopper_many_rows_are_multiplied_in_fp8_and_the_result_is_that_of_the_reference(rows):
    def on_gpu(weight: Packed) -> Packed:
        return Packed(weight.data.cuda(), weight.scale.cuda(), None, "fp8")

    x, weight, bias = drawn(rows, 320).cuda().bfloat16(), on_gpu(packed(272, 320)), drawn(272).cuda().bfloat16()
    with use_backend("w8a8"), torch.no_grad():
        got = linear(x, weight, bias)
        with use_backend("reference", ["quantize_rows", "rows_product"]):
            close(got, linear(x, weight, bias).double(), 5e-3)
        ids = torch.randint(-1, 4, (rows, 2), device="cuda")
        weights = torch.rand(rows, 2, device="cuda")
        operands = on_gpu(packed(5, 2, 128, 320)), on_gpu(packed(5, 320, 128))
        shared = on_gpu(packed(256, 320)), on_gpu(packed(256, 320)), on_gpu(packed(320, 256))
        mixed = mix_experts(x, ids, weights, *operands, shared=shared, residual=x)
        with use_backend("reference", ["quantize_rows", "rows_product", "grouped_product", "silu_mul_rows"]):
            close(mixed, mix_experts(x, ids, weights, *operands, shared=shared, residual=x).double(), 0.02)
