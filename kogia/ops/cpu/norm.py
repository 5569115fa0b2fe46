"""RMSNorm, alone and behind a residual sum; rounded where the reference is."""

import torch
from torch import Tensor

from kogia.ops.cpu.common import DTYPES, Kernel, alike_refusal

_norm = Kernel("kogia_norm", "8q d q")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), 0, weight.data_ptr(), 0, out.data_ptr(),
        x.numel() // dim, dim, eps, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return alike_refusal(x, weight)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = torch.empty_like(x), torch.empty_like(x)
    dim = x.shape[-1]
    _norm(
        DTYPES[x.dtype], x.data_ptr(), delta.data_ptr(), weight.data_ptr(), total.data_ptr(), out.data_ptr(),
        x.numel() // dim, dim, eps, torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def add_rms_norm_supports(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> str | None:
    return alike_refusal(x, delta, weight)
