"""Products in FP8 for training: the reference beside float64, and when weights are rounded anew."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kogia.ops import blockwise
from kogia.ops.blockwise import (
    Rows,
    WeightForms,
    fp8_experts,
    fp8_linears,
    grouped_product,
    quantize_both,
    quantize_columns,
    quantize_routed_columns,
    quantize_rows,
    quantize_weight,
    routed_outer,
    rows_product,
)
from kogia.ops.moe import mix_experts


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want.double()).norm() / want.double().norm()).detach())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_rows_err_by_a_sixteenth_of_a_number_and_are_filled_up_with_zeros(rows, width, powers, seed):
    x = drawn(rows, width, seed=seed) * torch.exp(3 * drawn(rows, 1, seed=seed + 1))
    made = quantize_rows(x, power_of_two=powers)
    assert made.codes.shape == (rows, -(-width // 128) * 128)
    assert made.scale.shape == (made.codes.shape[1] // 128, rows) and made.scale.is_contiguous()
    back = made.dense()
    assert not back[:, width:].any()
    bound = x.abs() / 16 + made.scale.T.repeat_interleave(128, 1)[:, :width] * 2**-10
    assert bool(((back[:, :width] - x).abs() <= bound * 1.001).all())
    if powers:
        assert bool((torch.frexp(made.scale).mantissa == 0.5).all())


def test_columns_are_the_rows_of_the_transpose_and_both_come_of_one_call():
    x = drawn(200, 300)
    rows, columns = quantize_both(x, power_of_two=True)
    assert same(columns, quantize_columns(x)) and same(columns, quantize_rows(x.T))
    assert same(rows, quantize_rows(x, power_of_two=True))


def same(a: Rows, b: Rows) -> bool:
    return torch.equal(a.codes.float(), b.codes.float()) and torch.equal(a.scale, b.scale)


def test_both_forms_of_a_weight_have_the_same_numbers():
    weight = drawn(3, 200, 300)
    forms = quantize_weight(weight)
    assert torch.equal(forms.forward.dense()[..., :300], forms.backward.dense()[..., :200].transpose(1, 2))
    assert forms.forward.codes.shape == (3, 200, 384) and forms.backward.codes.shape == (3, 300, 256)
    assert forms.forward.scale.shape == (3, 2, 4), "three groups, in fours"
    assert error(forms.forward.dense()[..., :300], weight) < 0.03


def test_a_product_is_that_of_the_numbers_its_operands_stand_for():
    x, weight = drawn(50, 300), drawn(70, 300, seed=1)
    rows, blocks = quantize_rows(x), quantize_weight(weight).forward
    exact = rows.dense().double() @ blocks.dense().double().T
    assert error(rows_product(rows, blocks, torch.float32), exact) < 1e-6
    assert error(rows_product(rows, blocks, torch.bfloat16), exact) < 4e-3


@pytest.mark.parametrize("counts", [[3, 0, 40, 1], [0, 0, 0, 0], [44, 0, 0, 0]], ids=str)
def test_rows_are_multiplied_with_the_matrix_of_their_expert_and_nobodys_are_zero(counts):
    rows, blocks = quantize_rows(drawn(44, 150)), quantize_weight(drawn(4, 30, 150, seed=1)).forward
    got = grouped_product(rows, blocks, torch.tensor(counts), torch.float32)
    owner = torch.arange(4).repeat_interleave(torch.tensor(counts))
    want = torch.einsum("ri,roi->ro", rows.dense()[: len(owner)], blocks.dense()[owner])
    torch.testing.assert_close(got[: len(owner)], want)
    assert not got[len(owner) :].any()


@pytest.mark.parametrize("fp8_gradient", [False, True])
@pytest.mark.parametrize("widths", [(96, 48), (256, 384)], ids=str)
def test_gradients_of_a_layer_are_near_those_in_double_precision(widths, fp8_gradient):
    x, weight, dy = drawn(3, 70, widths[1]), drawn(*widths, seed=1), drawn(3, 70, widths[0], seed=2)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    (y,) = fp8_linears(leaves[0], leaves[1:], [WeightForms()], fp8_gradient=fp8_gradient)
    y.backward(dy)
    exact = [x.double() @ weight.double().T, dy.double() @ weight.double()]
    exact.append(dy.double().flatten(0, 1).T @ x.double().flatten(0, 1))
    for got, want, bound in zip((y, leaves[0].grad, leaves[1].grad), exact, (0.05, 0.05, 0.05), strict=True):
        assert got is not None and got.shape == want.shape and error(got, want) < bound
    rounded = error(leaves[1].grad, exact[2])  # pyright: ignore[reportArgumentType]
    assert (rounded > 1e-3) == fp8_gradient, "otherwise it is the product of what was never rounded"


@pytest.mark.parametrize("fp8_gradient", [False, True])
def test_several_weights_of_one_input_are_as_each_by_itself_and_its_gradients_are_added_up(fp8_gradient, monkeypatch):
    rounded: list[Tensor] = []
    name = "quantize_both" if fp8_gradient else "quantize_rows"
    real = getattr(blockwise, name)
    monkeypatch.setattr(blockwise, name, lambda x, **how: rounded.append(x) or real(x, **how))
    x, weights = drawn(2, 70, 96).requires_grad_(), [drawn(n, 96, seed=n).requires_grad_() for n in (48, 128, 16)]
    dy = [drawn(2, 70, len(w), seed=1 + len(w)) for w in weights]
    together = fp8_linears(x, weights, [WeightForms() for _ in weights], fp8_gradient=fp8_gradient)
    assert len(rounded) == 1, "x, for all of them"
    got = torch.autograd.grad(together, (x, *weights), dy)
    dx = torch.zeros_like(x)
    for y, weight, of_y, of_weight in zip(together, weights, dy, got[1:], strict=True):
        (alone,) = fp8_linears(x, [weight], [WeightForms()], fp8_gradient=fp8_gradient)
        part, want = torch.autograd.grad(alone, (x, weight), of_y)
        dx += part
        assert torch.equal(y, alone) and torch.equal(of_weight, want)
    torch.testing.assert_close(got[0], dx)


def test_a_layer_keeps_a_byte_a_number_and_nothing_where_its_weight_is_frozen():
    kept: list[Tensor] = []
    weight = drawn(128, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linears(drawn(128, 256).requires_grad_(), [weight], [WeightForms()], fp8_gradient=True)
        assert [(t.dtype, t.numel()) for t in kept] == [(torch.float8_e4m3fn, 128 * 256), (torch.float32, 256)]
        kept.clear()
        frozen = weight.detach()
        (y,) = fp8_linears(drawn(128, 256).requires_grad_(), [frozen], [WeightForms()], fp8_gradient=True)
    assert not kept
    y.sum().backward()


@pytest.mark.parametrize("counts", [[3, 0, 140, 1], [0, 0, 0, 0], [150, 0, 0, 0]], ids=str)
def test_gradients_of_experts_are_products_of_their_own_rows_which_begin_a_group_of_their_own(counts):
    routed, tokens = sum(counts) + 2, 40
    a, b = drawn(routed, 48), drawn(tokens, 96, seed=1)
    places = torch.randint(tokens, (routed,), generator=torch.Generator().manual_seed(2))
    a[sum(counts) :] = 0  # of nobody's rows one of the two is zero
    left, right = (quantize_routed_columns(x, p, torch.tensor(counts)) for x, p in ((a, None), (b, places)))
    got = routed_outer(left, right, torch.float32)
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    want = torch.stack([a[i:j].double().T @ b[places[i:j]].double() for i, j in itertools.pairwise(ends)])
    assert got.shape == (4, 48, 96)
    for count, ours, theirs in zip(counts, got, want, strict=True):
        assert error(ours, theirs) < 0.06 if count else not ours.any()
    sizes = [-(-n // 128) for n in counts[:-1]] + [-(-(counts[-1] + 2) // 128)]
    assert left.firsts.tolist() == [0, *itertools.accumulate(sizes)]


@pytest.mark.parametrize("fp8_gradient", [False, True])
def test_gradients_of_experts_are_near_those_in_double_precision(fp8_gradient):
    tokens, dim, width = 60, 96, 48
    x, gate_up, down = drawn(tokens, dim), drawn(4, 2, width, dim, seed=1) / 10, drawn(4, dim, width, seed=2) / 10
    weights = torch.rand(tokens, 2, generator=torch.Generator().manual_seed(3))
    ids = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(i))[:2] for i in range(tokens)])
    ids[5, 1] = -1  # nobody; and the last expert has no token
    dy = drawn(tokens, dim, seed=4)
    exact = [t.double().requires_grad_() for t in (x, weights, gate_up, down)]
    want = mix_experts(exact[0], ids, *exact[1:])
    want.backward(dy.double())
    leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
    operands, forms = (leaves[0], ids, *leaves[1:]), (WeightForms(), WeightForms())
    got = fp8_experts(*operands, forms, fp8_gradient=fp8_gradient, power_of_two=True)
    got.backward(dy)
    assert error(got, want) < 0.08
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and error(ours.grad, theirs.grad) < 0.1
    assert not leaves[2].grad[3].any() and not leaves[3].grad[3].any()  # pyright: ignore[reportOptionalSubscript]


def test_a_weight_is_rounded_once_for_each_of_its_values(monkeypatch):
    rounded = []
    real = blockwise.quantize_weight
    monkeypatch.setattr(blockwise, "quantize_weight", lambda w: rounded.append(1) or real(w))
    weight, forms = torch.nn.Parameter(drawn(32, 48)), WeightForms()
    first = forms.of(weight)
    assert forms.of(weight) is first and len(rounded) == 1
    with torch.no_grad():
        weight.mul_(2)
    assert error(forms.of(weight).forward.dense()[:, :48], weight.detach()) < 0.03 and len(rounded) == 2
    copied = copy.deepcopy(forms)
    assert copied.of(torch.nn.Parameter(drawn(16, 16))).forward.codes.shape == (16, 128)
    assert forms.of(weight).forward.codes.shape == (32, 128) and len(rounded) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_through_every_product(bad):
    x, weight = drawn(130, 140), drawn(32, 140, seed=1).requires_grad_()
    x[3, 5] = bad
    (y,) = fp8_linears(x.requires_grad_(), [weight], [WeightForms()], fp8_gradient=True)
    assert not y[3].isfinite().any() and bool(y[4:].isfinite().all())
    y.nan_to_num().sum().backward()
    assert weight.grad is not None and not weight.grad[:, 5].isfinite().any()
