"""What the wrappers share: calling a kernel, describing weights to it, and saying why it cannot take something."""

import ctypes
import struct

import torch
from torch import Tensor

from kogia.ops.cpu.build import library
from kogia.ops.cpu.record import active
from kogia.ops.packed import Packed

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As the kernels know them."""
HALF, INT8, INT4, FULL = 0, 1, 2, 3
_DENSE = {torch.bfloat16: HALF, torch.float32: FULL}
NO_WEIGHT = (0, 0, 0, 0, 0)


class Kernel:
    """A function of the library. It takes one struct, whose fields are 8 bytes each: "q" for integers and addresses,
    "d" for floats."""

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        self.function = getattr(library(), name)
        self.function.argtypes, self.function.restype = [ctypes.c_char_p], None
        self._pack = struct.Struct(fields).pack

    def __call__(self, *values: float) -> None:
        arguments = self._pack(*values)
        self.function(arguments)
        for recording in active:  # another thread may end its own at any moment
            recording.add_kernel(self.function, arguments)


def address(tensor: Tensor | None) -> int:
    """0 for what is not there."""
    return 0 if tensor is None else tensor.data_ptr()


def weight_fields(weight: Tensor | Packed) -> tuple[int, int, int, int, int]:
    """A weight as kernels take it: addresses of data, scales and zeros, format, columns that share a scale."""
    if isinstance(weight, Tensor):
        return weight.data_ptr(), 0, 0, _DENSE[weight.dtype], 0
    data, scale = weight.data, weight.scale
    if weight.format == "int8":
        return data.data_ptr(), scale.data_ptr(), 0, INT8, 0
    return data.data_ptr(), scale.data_ptr(), address(weight.zero), INT4, 2 * data.shape[-1] // scale.shape[-1]


def weight_width(weight: Tensor | Packed) -> int:
    """Numbers of a row."""
    if isinstance(weight, Tensor):
        return weight.shape[-1]
    return weight.data.shape[-1] * (2 if weight.format == "int4" else 1)


def weight_refusal(weight: Tensor | Packed, x: Tensor) -> str | None:
    """Why products of rows like `x` with this weight cannot be taken, or None."""
    if isinstance(weight, Tensor):
        if weight.dtype not in _DENSE or x.dtype != weight.dtype:
            return f"it takes dense weights in bfloat16 or float32 with rows alike, not {weight.dtype} with {x.dtype}"
        whole = weight.is_contiguous()
    elif weight.format in ("int8", "int4"):
        whole = weight.data.is_contiguous() and weight.scale.is_contiguous()
        whole = whole and (weight.zero is None or weight.zero.is_contiguous())
        group = weight_fields(weight)[-1]
        if group and group != 32 and group % 64:
            return f"it takes int4 groups of 32 or of a multiple of 64 numbers, not {group}"
    else:
        return f"it takes dense, int8 and int4 weights, not {weight.format}"
    if not whole:
        return "it takes contiguous weights"
    return None


def alike_refusal(first: Tensor, *others: Tensor) -> str | None:
    """Why a kernel that takes one dtype cannot take these tensors, or None."""
    for tensor in others:
        if tensor.dtype != first.dtype:
            return f"it takes tensors of one dtype, not {first.dtype} and {tensor.dtype}"
    return refusal(first, *others)


def plain_refusal(*tensors: Tensor) -> str | None:
    """Why a kernel that has a backward, in float32, cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            return f"it takes float32, not {tensor.dtype}"
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
    return None


def vector_refusal(vector: Tensor, length: int) -> str | None:
    """Why a kernel that reads so many numbers from the first one on cannot take a tensor, or None."""
    if vector.shape != (length,):
        return f"it takes a vector of {length} numbers, not shape {tuple(vector.shape)}"
    return None if vector.is_contiguous() else f"it takes numbers side by side, not {vector.stride(0)} apart"


def refusal(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> str | None:
    """Why a kernel cannot take these tensors, or None: of `dtypes`, contiguous, no gradients."""
    for tensor in tensors:
        if tensor.dtype not in dtypes:
            return f"it takes tensors of one of {dtypes}, not {tensor.dtype}"
        if not tensor.is_contiguous():
            return f"it takes contiguous tensors, not strides {tensor.stride()} of shape {tuple(tensor.shape)}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "it has no backward"
    return None
