"""RMSNorm, alone and behind a residual sum."""

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import LAUNCH, PDL, kernel, next_power_of_2, refusal, wait_for_inputs


@kernel
def _norm(x, delta, weight, total, out, eps, dim, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < dim
    wait_for_inputs(PDL)
    factor = tl.load(weight + cols, inside, 0.0)
    value = tl.load(x + row * dim + cols, inside, 0.0)
    if ADD:
        value = value + tl.load(delta + row * dim + cols, inside, 0.0)  # rounded to the dtype, as the reference is
        tl.store(total + row * dim + cols, value, inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    normed = (wide * scale).to(value.dtype) * factor
    tl.store(out + row * dim + cols, normed, inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One program a row."""
    out = torch.empty_like(x)
    _launch(x, x, weight, x, out, eps, add=False)
    return out


def rms_norm_supports(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal(x, weight)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """One program a row: read x and delta once, write the sum and its norm."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _launch(x, delta, weight, total, out, eps, add=True)
    return total, out


def add_rms_norm_supports(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> str | None:
    return refusal(x, delta, weight)


def _launch(x: Tensor, delta: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, *, add: bool) -> None:
    dim = x.shape[-1]
    block = next_power_of_2(dim)
    warps = max(1, min(16, block // 256))
    grid = (x.numel() // dim,)
    _norm[grid](x, delta, weight, total, out, eps, dim, ADD=add, BLOCK=block, PDL=PDL, num_warps=warps, **LAUNCH)
