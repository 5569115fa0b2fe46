"""The loss of a chunk of logits and its gradient: two passes over a row, the second of which writes over it."""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import LAUNCH, PDL, kernel, next_power_of_2, refusal, wait_for_inputs


@kernel
def _loss_gradient(
    logits, targets, counted, logprobs, entropy, vocab,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row, with the running maximum and sums of the online softmax."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * vocab
    n = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, expected = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        value = tl.load(at + start + n, start + n < vocab, float("-inf")).to(tl.float32)
        new = tl.maximum(best, value)
        # a column without a number yet has exp(-inf - -inf) = NaN: its sums stay 0
        shrink = tl.where(best == float("-inf"), 0.0, tl.exp(best - new))
        there = value > float("-inf")
        weight = tl.where(there, tl.exp(value - new), 0.0)
        total = total * shrink + weight
        expected = expected * shrink + tl.where(there, weight * value, 0.0)
        best = new
    top = tl.max(best, 0)
    shrink = tl.where(best == float("-inf"), 0.0, tl.exp(best - top))
    whole = tl.sum(total * shrink, 0)
    lse = top + tl.log(whole)
    target = tl.load(targets + row)
    tl.store(logprobs + row, tl.load(at + target).to(tl.float32) - lse)
    tl.store(entropy + row, lse - tl.sum(expected * shrink, 0) / whole)
    factor = 1.0
    if MASKED:
        factor = tl.load(counted + row).to(tl.float32)
    tl.debug_barrier()  # the target's logit is read before it is written over
    for start in range(0, vocab, BLOCK):
        inside = start + n < vocab
        value = tl.load(at + start + n, inside, float("-inf")).to(tl.float32)
        gradient = (tl.exp(value - lse) - tl.where(start + n == target, 1.0, 0.0)) * factor
        tl.store(at + start + n, gradient.to(logits.dtype.element_ty), inside)


def loss_gradient(logits: Tensor, targets: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient takes the place of the logits."""
    rows, vocab = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs)
    mask = targets if counted is None else counted.view(torch.uint8)
    _loss_gradient[(rows,)](
        logits, targets, mask, logprobs, entropy, vocab, MASKED=counted is not None,
        BLOCK=min(4096, next_power_of_2(vocab)), PDL=PDL, num_warps=8, **LAUNCH,
    )  # fmt: skip
    return logprobs, entropy, logits


def loss_gradient_supports(logits: Tensor, targets: Tensor, counted: Tensor | None = None) -> str | None:
    reason = refusal(logits) or refusal(targets, dtypes=(torch.int64,))
    return reason or (None if counted is None else refusal(counted, dtypes=(torch.bool,)))
