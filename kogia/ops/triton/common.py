"""What the kernels' wrappers share."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run as Python on the CPU: for tests, in float32, because the interpreter's products of halves are wrong."""
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16)
PDL = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
"""Programmatic dependent launch, on Hopper and later: a kernel may be put on the device while the one before it ends,
and waits there for its inputs. In a graph of hundreds of short kernels that is a tenth of the time."""
LAUNCH = {"launch_pdl": True} if PDL else {}
"""Options of every launch. A kernel that is launched so must call `wait_for_inputs`."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` of the function itself, where a test run has wrapped it for checking types."""
    return triton.jit(inspect.unwrap(function), **ONE_FOR_ALL)


ONE_FOR_ALL = {
    "do_not_specialize": ("num_tokens", "num_pairs", "num_rows", "num_parts", "table_width"),
    "do_not_specialize_on_alignment": (
        "tables", "context_lens", "cu_seqlens", "slots", "seeds", "positions", "temperature", "uniforms", "top_k",
        "top_p", "min_p", "num_blocks", "block_expert",
    ),
}  # fmt: skip
"""Arguments of these names differ from step to step, in what they count or in where they begin: without this each
would make kernels of its own, some of them when a request waits."""


@kernel
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernel before this one is done; then the next may be put on the device. Before it nothing may be read
    or written: even a weight may just have been computed, as the dense form of a packed one is.

    Were the next one let on before the wait, a row of kernels would stand waiting there, and their programs would take
    the places among which those of the kernel that runs should be spread. With int4 weights at batch 1 an H200 gave 350
    tokens/s so, and 467 where one kernel at a time waits."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def cdiv(count: int, size: int) -> int:
    """Parts of `size` that `count` takes. Triton's own, made for kernels as well, takes a host 4 us."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is no less; likewise."""
    return 1 << max(0, count - 1).bit_length()


def refusal(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why a kernel cannot take these tensors, or None: one dtype of `dtypes`, contiguous, not empty, no gradients."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            return f"it takes contiguous tensors, not strides {tensor.stride()} of shape {tuple(tensor.shape)}"
    return rows_refusal(*tensors, dtypes=dtypes)


def rows_refusal(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """The same for tensors of which only the last axis must lie side by side."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.dtype not in dtypes:
            return f"it takes tensors of one of {dtypes}, not {tensor.dtype} beside {first.dtype}"
        if tensor.stride(-1) != 1 or not tensor.numel():
            return f"it takes rows of numbers side by side, not {tuple(tensor.shape)} with strides {tensor.stride()}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no backward"
    return None


def trained_refusal(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why a kernel that has a backward cannot take these tensors, or None: plain ones of one dtype, the numbers of a
    row side by side."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses what it does by itself"
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype or tensor.dtype not in dtypes:
            return f"it takes tensors of one of {dtypes}, not {tensor.dtype} beside {first.dtype}"
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
        if tensor.stride(-1) != 1:
            return f"it takes rows of numbers side by side, not strides {tensor.stride()}"
    return None


def training_refusal() -> str | None:
    """Why a kernel that is for steps of training alone is not for this call, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses what it does by itself"
    return None if torch.is_grad_enabled() else "it is for training"


def odd_width(least: int, **widths: int) -> str | None:
    """Why these widths will not do: a kernel has them as whole tiles."""
    for name, width in widths.items():
        if width & (width - 1) or width < least:
            return f"it takes widths that are powers of two from {least}; {name} has {width}"
    return None


def counters(device: torch.device, size: int) -> Tensor:
    """int32 zeros that stay where they are, at least `size`. Who uses one leaves it at zero; one stream at a time."""
    assert size <= _MOST_COUNTERS, f"{size} counters: there are {_MOST_COUNTERS}"
    if device not in _COUNTERS:
        _COUNTERS[device] = torch.zeros(_MOST_COUNTERS, dtype=torch.int32, device=device)
    return _COUNTERS[device]


_MOST_COUNTERS = 1 << 16
_COUNTERS: dict[torch.device, Tensor] = {}
