"""Sampling without filters in one pass for the sums and one for the draw, a program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import DTYPES, LAUNCH, PDL, kernel, let_next_start, rows_refusal, wait_for_inputs


@kernel
def _sample(
    logits, temperature, uniforms, tokens, logprobs, vocab, row_stride,
    DRAW: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * row_stride
    t = tl.load(temperature + row)
    greedy = t == 0
    inverse = 1.0 / tl.where(greedy, 1.0, t)
    n = tl.arange(0, BLOCK)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(at + start + n, start + n < vocab, float("-inf")).to(tl.float32) * inverse
        top = tl.max(z, 0)
        token = tl.where(top > best, start + tl.argmax(z, 0), token)
        new = tl.maximum(best, top)
        total = total * tl.exp(best - new) + tl.sum(tl.exp(z - new), 0)
        best = new
    if DRAW:
        target = tl.load(uniforms + row) * total.to(tl.float64)
        before = tl.zeros((), tl.float64)
        drawn = tl.zeros((), tl.int32)
        for start in range(0, vocab, BLOCK):
            z = tl.load(at + start + n, start + n < vocab, float("-inf")).to(tl.float32) * inverse
            reached = before + tl.cumsum(tl.exp(z - best).to(tl.float64), 0)
            drawn += tl.sum(((reached <= target) & (start + n < vocab)).to(tl.int32), 0)
            before = tl.max(reached, 0)
        token = tl.where(greedy, token, tl.minimum(drawn, vocab - 1))
    z = tl.load(at + token).to(tl.float32) * inverse
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, z - best - tl.log(total))


def sample(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _sample[(rows,)](
        logits, temperature, temperature if uniforms is None else uniforms, tokens, logprobs, vocab, logits.stride(0),
        DRAW=uniforms is not None, BLOCK=min(8192, triton.next_power_of_2(vocab)), PDL=PDL, num_warps=16, **LAUNCH,
    )  # fmt: skip
    return tokens, logprobs


def sample_supports(
    logits: Tensor,
    temperature: Tensor,
    uniforms: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    filtered: Tensor | None = None,
) -> str | None:
    if any(x is not None for x in (top_k, top_p, min_p)):
        return "filters sort, which the reference does"
    return rows_refusal(logits, dtypes=(*DTYPES, torch.float32))
