"""What a step sends to the device and gets back: every array as it was, in one copy."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kogia.engine.inputs import Bundle, Download, Staging, Upload

SHAPES = arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=7)
INTEGERS = arrays.arrays(np.int64, SHAPES, elements=st.integers(-(2**62), 2**62))
FLOATS = arrays.arrays(np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False))


@given(st.lists(st.one_of(INTEGERS, FLOATS), max_size=8))
def test_arrays_arrive_as_they_were_at_places_that_kernels_are_compiled_for(given):
    upload = Upload(Staging(torch.device("cpu")))
    for index, array in enumerate(given):
        upload.put(str(index), array)
    upload.send()
    for index, array in enumerate(given):
        found = upload[str(index)]
        assert found.dtype == (torch.float32 if array.dtype.kind == "f" else torch.int64)
        assert np.array_equal(found.numpy(), array)
        assert array.size == 0 or found.data_ptr() % 16 == 0
    assert upload.get("none") is None and "none" not in upload


def test_an_array_of_the_host_may_be_replaced_by_what_the_device_computed():
    upload = Upload(Staging(torch.device("cpu")))
    upload.put("positions", np.arange(3))
    upload.send()
    for name in ("positions", "seeds"):
        upload.replace(name, torch.tensor([7, 8, 9]))
    assert upload["positions"].tolist() == [7, 8, 9]
    assert upload.get("seeds") is None, "what was not sent is not asked for"


@given(st.lists(st.one_of(INTEGERS, FLOATS), min_size=1, max_size=5))
def test_tensors_come_back_as_they_were(given):
    tensors = {str(index): torch.from_numpy(array) for index, array in enumerate(given)}
    found = Download(Bundle(tensors)).wait()
    for index, array in enumerate(given):
        assert found[str(index)].dtype == array.dtype and np.array_equal(found[str(index)], array)
