import pytest
import torch

from kogia.ops.norm import rms_norm


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(6, 7), (1, 5), (2, 3, 4), (0, 4)])
def test_values_and_gradients_are_those_of_the_plain_formula(shape):
    torch.manual_seed(0)
    x, weight, upstream = draw(*shape), draw(shape[-1]), torch.randn(*shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, 1e-5), plain(x, weight, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(ours, (x, weight), upstream)
    want = torch.autograd.grad(theirs, (x, weight), upstream)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_numerical_differentiation_agrees():
    torch.manual_seed(1)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (draw(3, 5), draw(5)))


def test_a_row_of_zeros_stays_zero_and_has_a_finite_gradient():
    x, weight = torch.zeros(1, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    out = rms_norm(x, weight, 1e-6)
    out.sum().backward()
    assert out.eq(0).all()
    torch.testing.assert_close(x.grad, torch.full((1, 8), 1e3))  # 1 / sqrt(eps)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_inputs_keep_their_dtype_and_float32_statistics(weight_dtype):
    torch.manual_seed(2)
    x, weight = draw(4, 512, dtype=torch.bfloat16), draw(512, dtype=weight_dtype)
    out = rms_norm(x, weight, 1e-6)
    out.float().square().sum().backward()
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, weight_dtype)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = plain(wide_x, wide_weight, 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.01)  # two roundings to 8 bits
    expected.square().sum().backward()
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=0.02, atol=0.1)
    torch.testing.assert_close(x.grad.double(), wide_x.grad, rtol=0.02, atol=0.1)


def test_large_bfloat16_values_do_not_overflow_the_mean_of_squares():
    x = torch.full((1, 64), 1e30, dtype=torch.bfloat16)
    assert not rms_norm(x * 1e-15, torch.ones(64), 1e-6).sub(1).abs().gt(0.01).any()


def test_non_contiguous_gradients_and_inputs_are_handled():
    torch.manual_seed(3)
    base, weight = draw(5, 6), draw(6)
    x = base.T.contiguous().T
    got = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(0).expand(2, -1).sum(), weight)
    want = torch.autograd.grad(plain(x, weight, 1e-6).sum(0).expand(2, -1).sum(), weight)
    torch.testing.assert_close(got, want)
