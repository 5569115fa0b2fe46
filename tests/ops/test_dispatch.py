"""Which implementation runs: the first backend that takes the arguments, the named one, or else the reference."""

import pytest
import torch

from kogia.ops.dispatch import (
    REFERENCE,
    all_ops,
    batch_invariant,
    is_batch_invariant,
    op,
    use_backend,
    which,
)
from kogia.ops.linear import grouped_linear, linear
from kogia.ops.packed import FORMATS


@pytest.fixture
def doubled(monkeypatch):
    """An op with a backend for even sizes, one that cannot be imported, and a reference."""
    monkeypatch.setattr("kogia.ops.dispatch.OPS", dict(all_ops()))

    @op(cpu=("absent_library.kernels.toys", "toy_ops.fast.toys"))
    def doubled(x: torch.Tensor, times: int = 1) -> tuple[str, torch.Tensor]:
        """Reference."""
        return "reference", x * 2 * times

    return doubled


def test_the_first_backend_that_takes_the_arguments_runs_and_the_reference_where_none_does(doubled):
    even, odd = torch.ones(4), torch.ones(3)
    assert doubled(even)[0] == "fast"
    assert doubled(even, times=3)[1].tolist() == [6.0] * 4
    assert doubled(odd)[0] == "reference"
    assert doubled.__doc__ == "Reference."


def test_refusals_name_their_reasons(doubled):
    refusals = doubled.refusals([torch.ones(3)], {})
    assert "absent_library" in refusals["kernels"]
    assert refusals["fast"] == "3 numbers are not even"
    assert doubled.refusals([torch.ones(4)], {})["fast"] is None


def test_a_named_backend_runs_or_says_why_not_and_the_choice_ends_with_the_block(doubled):
    with use_backend(REFERENCE, ["doubled"]):
        assert doubled(torch.ones(4))[0] == "reference"
    with use_backend("fast", ["doubled"]):
        assert doubled(torch.ones(4))[0] == "fast"
        with pytest.raises(ValueError, match="'fast' cannot run doubled here: 3 numbers are not even"):
            doubled(torch.ones(3))
    with use_backend("kernels", ["doubled"]), pytest.raises(ValueError, match="absent_library"):
        doubled(torch.ones(4))
    assert doubled(torch.ones(3))[0] == "reference"


def test_unknown_ops_and_backends_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"no op has a backend 'warp'; there are .*'aten'"), use_backend("warp"):
        pass
    with pytest.raises(
        ValueError, match=r"op 'rms_norm' has no backend 'aten'; it has \['reference', 'cpu', 'triton'\]"
    ):
        with use_backend("aten", ["rms_norm"]):
            pass
    with pytest.raises(ValueError, match="there is no op 'rsm_norm'; there are "), use_backend(REFERENCE, ["rsm_norm"]):
        pass


def test_which_lists_every_op_with_the_reference_last():
    table = which("cpu")
    assert {"paged_attention", "cached_attention"} & set(table) == {"cached_attention"}
    assert list(table["grouped_linear"]) == ["cpu", "aten", "reference"]
    assert table["grouped_linear"]["aten"] is table["grouped_linear"]["reference"] is None
    assert all(list(names)[-1] == REFERENCE for names in table.values())


def test_grouped_products_take_the_fused_kernel_where_strides_and_type_allow():
    x, counts = torch.randn(6, 8), torch.tensor([4, 2])
    assert grouped_linear.refusals([x, torch.randn(2, 12, 8), counts], {})["aten"] is None
    odd = grouped_linear.refusals([x[:, :7], torch.randn(2, 12, 7), counts], {})["aten"]
    assert "multiple of 16 bytes; 7 input numbers" in odd
    packed = FORMATS["fp8"].pack(torch.randn(2, 12, 8))
    assert "only those in use" in grouped_linear.refusals([x, packed, counts], {})["aten"]


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_rows_of_nobody_are_finite_and_change_no_gradient(backend):
    """Three rows behind the counts; memory is poisoned, since the fused kernel would leave theirs as it found it."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 8, requires_grad=True), torch.randn(3, 2, 4, 8, requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    for _ in range(4):
        poison = [torch.full((64,), float("nan")) for _ in range(16)]
        del poison
        with use_backend(backend, ["grouped_linear"]):
            y = grouped_linear(x, weight, counts)
        assert y.isfinite().all()
        grads = torch.autograd.grad(y[:5].square().sum(), (x, weight))
        want = torch.cat([x[:2] @ weight[0].flatten(0, 1).T, x[2:5] @ weight[2].flatten(0, 1).T])
        torch.testing.assert_close(y[:5], want)
        expected = torch.autograd.grad(want.square().sum(), (x, weight))
        for got, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_within_a_batch_invariant_block_the_invariant_form_runs_or_says_why_not(monkeypatch):
    monkeypatch.setattr("kogia.ops.dispatch.OPS", dict(all_ops()))

    @op(cpu=("toy_ops.fast.toys",), invariant=("toy_ops.fast.toys",))
    def doubled(x: torch.Tensor, times: int = 1) -> tuple[str, torch.Tensor]:
        """Reference."""
        return "reference", x * 2 * times

    @op(cpu=("toy_ops.fast.toys",))
    def tripled(x: torch.Tensor, times: int = 1) -> tuple[str, torch.Tensor]:
        """Its reference is invariant."""
        return "reference", x * 3 * times

    assert not is_batch_invariant()
    with batch_invariant():
        assert is_batch_invariant()
        assert doubled(torch.ones(4))[0] == "fast"
        with pytest.raises(ValueError, match="doubled cannot be batch-invariant here: 3 numbers are not even"):
            doubled(torch.ones(3))
        assert tripled(torch.ones(4))[0] == "reference"
    assert doubled(torch.ones(3))[0] == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_a_row_are_the_same_bits_in_blocks_of_any_company(dtype):
    torch.manual_seed(0)
    x, weight, stack = torch.randn(70, 40, dtype=dtype), torch.randn(24, 40, dtype=dtype), torch.randn(3, 24, 40)
    with batch_invariant():
        whole = linear(x, weight)
        for start, end in ((0, 1), (3, 5), (5, 40), (17, 70)):
            assert torch.equal(linear(x[start:end], weight), whole[start:end])
            counts = torch.tensor([1, 0, end - start])
            routed = torch.cat((x[60:61], x[start:end])).float()
            grouped = grouped_linear(routed, stack, counts)
            assert torch.equal(grouped[1:], linear(x[start:end].float(), stack[2]))
    torch.testing.assert_close(whole, linear(x, weight), rtol=1e-2, atol=1e-2)
