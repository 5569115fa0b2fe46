"""Weights in large pages are tensors like any other."""

import copy

import pytest
import torch

from kogia.ops.cpu import pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (1024, 1024), (3, 1000, 1001), (0, 7)])
def test_memory_in_large_pages_holds_what_is_put_there_and_copies_are_ordinary(dtype, shape):
    made = pages.empty(torch.Size(shape), dtype, "cpu")
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous() and made.device.type == "cpu"
    values = torch.randint(0, 3, shape).to(dtype)
    made.copy_(values)
    for other in (copy.deepcopy(made), torch.nn.Parameter(made, False), made):
        assert torch.equal(other.float(), values.float())


def test_nothing_has_pages_on_the_meta_device():
    assert pages.empty(torch.Size((4096, 4096)), torch.float32, "meta").is_meta
