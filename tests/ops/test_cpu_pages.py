"""Weights in large pages are tensors like any other."""

import copy
import ctypes
import os
import subprocess
import sys

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


FREED = """
import resource, sys, torch
from kogia.ops.cpu import pages
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    pages.keep_freed()

def step():
    held = [torch.ones(1_000_000) for _ in range(12)]

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_what_a_training_process_frees_it_keeps():
    faults = {}
    # a threshold that is given does not grow with what is freed, after which nothing might be given back
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    for kind in ("given back", "kept"):
        words = [sys.executable, "-c", FREED, kind]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
        faults[kind] = int(done.stdout)
    assert faults["kept"] < 100
    assert faults["kept"] < faults["given back"] / 10
