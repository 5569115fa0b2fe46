"""Rotation of half-split pairs (Llama, Qwen) in one pass."""

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import LAUNCH, PDL, cdiv, kernel, odd_width, refusal, rows_refusal, wait_for_inputs


@kernel
def _rotate(
    x, cos, sin, out, num_tokens, heads, x_row, x_head,
    HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows are the heads of the tokens, one after the other."""
    wait_for_inputs(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = (row < num_tokens * heads)[:, None]
    token, head = (row // heads)[:, None].to(tl.int64), (row % heads)[:, None]
    half = tl.arange(0, HALF)[None, :]
    c, s = tl.load(cos + token * HALF + half, there, 0.0), tl.load(sin + token * HALF + half, there, 0.0)
    at = x + token * x_row + head * x_head + half
    first, second = tl.load(at, there, 0.0).to(tl.float32), tl.load(at + HALF, there, 0.0).to(tl.float32)
    to = out + row[:, None].to(tl.int64) * (2 * HALF) + half
    tl.store(to, (first * c - second * s).to(out.dtype.element_ty), there)
    tl.store(to + HALF, (first * s + second * c).to(out.dtype.element_ty), there)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One launch."""
    tokens, heads, width = x.shape
    out = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device)
    _rotate[(cdiv(tokens * heads, 8),)](
        x, cos, sin, out, tokens, heads, x.stride(0), x.stride(1), HALF=width // 2, BLOCK=8, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def rotate_half_split_supports(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return odd_width(2, rotated=x.shape[2]) or refusal(cos, sin, dtypes=(torch.float32,)) or rows_refusal(x)
