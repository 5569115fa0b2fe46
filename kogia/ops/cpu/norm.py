"""RMSNorm, alone, behind a residual sum and two side by side; rounded where the reference is."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import DTYPES, Kernel, alike_refusal

_norm = Kernel("kogia_norm", "9q d q")
_sum = Kernel("kogia_sum", "6q")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _normalise(x, weight, eps, out, x.shape[-1])
    return out


def _normalise(x: Tensor, weight: Tensor, eps: float, out: Tensor, out_row: int) -> None:
    """Into rows of `out` that are so far apart."""
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr(),
        x.numel() // dim, dim, out_row, eps, torch.get_num_threads(),
    )  # fmt: skip


def rms_norm_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return alike_refusal(x, weight)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), delta.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
        x.numel() // dim, dim, dim, eps, torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def add_rms_norm_supports(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> str | None:
    return alike_refusal(x, delta, weight)


def residual_sum(x: Tensor, delta: Tensor, *more: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _sum(
        DTYPES[x.dtype], x.data_ptr(), delta.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()
    )  # fmt: skip
    return out


def residual_sum_supports(x: Tensor, delta: Tensor, *more: Tensor) -> str | None:
    if more:
        return f"it adds two tensors, not {2 + len(more)}"
    return alike_refusal(x, delta) if x.shape == delta.shape else f"{x.shape} and {delta.shape} are not alike"


def paired_norms(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor], eps: float) -> Tensor:
    rows, dim = first.shape
    out = torch.empty(rows, 2 * dim, dtype=first.dtype)
    _normalise(first, weights[0], eps, out, 2 * dim)
    _normalise(second, weights[1], eps, out[:, dim:], 2 * dim)
    return out


def paired_norms_supports(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor], eps: float) -> str | None:
    return alike_refusal(first, second, *weights)
