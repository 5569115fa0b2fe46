"""Packed weights as the operands of products: two below each other, and made dense for products without a kernel."""

import pytest
import torch
from torch import Tensor

from kogia.ops.aten import linear as aten
from kogia.ops.linear import add_product, dequantize, grouped_linear, linears
from kogia.ops.packed import FORMATS, Packed, joined

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def weight(*shape: int, format: str, seed: int = 0, device: str = "cpu", **options: bool) -> Packed:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return FORMATS[format].pack(numbers.to(device), **options)


@pytest.mark.parametrize("options", [{"format": "fp8"}, {"format": "int8"}, {"format": "int4"},
                                     {"format": "int4", "asymmetric": True}], ids=str)  # fmt: skip
def test_two_packed_matrices_below_each_other_stand_for_what_the_two_stand_for(options):
    first, second = weight(256, 96, **options), weight(40, 96, seed=1, **options)
    both = joined(first, second)
    assert isinstance(both, Packed)
    assert torch.equal(both.dense(torch.float32), torch.cat([w.dense(torch.float32) for w in (first, second)]))
    again = joined(weight(256, 96, seed=2, **options), second, both)
    assert isinstance(again, Packed) and again.data.data_ptr() == both.data.data_ptr(), "written where it was"
    assert torch.equal(again.dense(torch.float32)[256:], second.dense(torch.float32))


def test_dense_matrices_are_joined_where_they_were_and_others_only_where_they_are_alike():
    first, second = torch.randn(3, 8), torch.randn(2, 8)
    both = joined(first, second)
    assert isinstance(both, Tensor) and torch.equal(both, torch.cat((first, second)))
    assert joined(second, first, both) is both and torch.equal(both, torch.cat((second, first)))
    assert joined(first, second.bfloat16()) is None
    assert joined(first, weight(2, 8, format="int8")) is None
    assert joined(weight(3, 64, format="int8"), weight(2, 64, format="int4")) is None
    assert joined(weight(3, 64, format="int4"), weight(2, 64, format="int4", asymmetric=True)) is None
    assert joined(weight(100, 64, format="fp8"), weight(2, 64, format="fp8")) is None, "a block would hold rows of both"


@gpu
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_on_a_gpu_packed_experts_of_many_rows_are_made_dense_all_at_once_and_nobody_waits(format):
    experts = weight(4, 2, 64, 128, format=format, device="cuda")
    x = torch.randn(50, 128, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([20, 0, 29, 1], device="cuda")
    want = grouped_linear.reference(x.float(), experts, counts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = grouped_linear(x, experts, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (got - want).norm() < 0.01 * want.norm()
    assert torch.equal(dequantize(experts, torch.bfloat16), experts.dense(torch.bfloat16))


@pytest.mark.parametrize("backend", [linears, aten.linears], ids=["reference", "aten"])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)], ids=str)
def test_products_of_one_input_and_their_gradients_are_those_in_float64(backend, frozen):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 20, generator=draw).requires_grad_()
    weights = [torch.randn(n, 20, generator=draw).requires_grad_(i not in frozen) for i, n in enumerate((5, 16, 1))]
    got = backend(x, weights)
    dy = [torch.randn(3, 7, 2 * y.shape[-1], generator=draw)[..., ::2] for y in got]  # numbers that lie apart
    torch.autograd.backward(got, dy)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    want = [torch.einsum("btd,od->bto", wide[0], weight) for weight in wide[1:]]
    torch.autograd.backward(want, [each.double() for each in dy])
    for i, (ours, theirs) in enumerate(zip((x, *weights), wide, strict=True)):
        if i - 1 in frozen:
            assert ours.grad is None
        else:
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_an_input_without_a_gradient_gets_none_from_its_products():
    weights = [torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)]
    x = torch.randn(5, 8)
    (aten.linears(x, weights)[0].sum() + aten.linears(x, weights)[1].sum()).backward()
    assert x.grad is None and weights[0].grad is not None
    torch.testing.assert_close(weights[0].grad, x.sum(0).expand(4, 8))


def test_products_are_made_together_in_training_of_several_alone():
    x, weight = torch.randn(5, 8), torch.randn(4, 8)
    assert "two weights at least" in str(aten.linears_supports(x, [weight]))
    assert aten.linears_supports(x, [weight, weight]) is None
    with torch.no_grad():
        assert "training" in str(aten.linears_supports(x, [weight, weight]))


def test_a_product_is_added_in_place_in_the_dtype_of_the_sum():
    draw = torch.Generator().manual_seed(0)
    total, a, b = (torch.randn(shape, generator=draw) for shape in ((6, 9), (6, 33), (9, 33)))
    want = total.double() + torch.einsum("ri,ci->rc", a.double(), b.double())
    assert add_product(total, a, b) is total
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
    assert "to float32" in str(aten.add_product_supports(total.bfloat16(), a.bfloat16(), b.bfloat16()))
    assert "not torch.float32" in str(aten.add_product_supports(total, a, b))


@gpu
@pytest.mark.parametrize("shape", [(130, 70, 1000), (8, 16, 8), (640, 2048, 5000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_halves_are_added_to_float32_without_rounding_in_between(shape, dtype):
    rows, columns, inner = shape
    a, b = torch.randn(inner, rows, dtype=dtype, device="cuda"), torch.randn(inner, columns, dtype=dtype, device="cuda")
    total = torch.randn(rows, columns, device="cuda")
    want = total.double() + a.T.double() @ b.double()
    assert aten.add_product_supports(total, a.T, b.T) is None
    assert add_product(total, a.T, b.T) is total
    assert float((total - want).norm() / want.norm()) < 1e-5


@gpu
def test_gradients_of_halves_that_cublas_adds_up_are_as_near_as_one_rounding_leaves_them():
    x = torch.randn(1000, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weights = [torch.randn(n, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (576, 1024)]
    dy = [torch.randn(1000, len(w), dtype=torch.bfloat16, device="cuda") for w in weights]
    got = torch.autograd.grad(linears(x, weights), (x, *weights), dy)
    want = [
        sum(of_y.double() @ weight.double() for of_y, weight in zip(dy, weights, strict=True)),
        *(of_y.double().T @ x.double() for of_y in dy),
    ]
    for ours, theirs in zip(got, want, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 4e-3  # pyright: ignore[reportAttributeAccessIssue]
