"""Packed weights as the operands of products: two below each other, and made dense for products without a kernel."""

import pytest
import torch
from torch import Tensor

from kogia.ops.linear import dequantize, grouped_linear
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
