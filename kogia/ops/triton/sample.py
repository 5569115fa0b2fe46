"""Sampling in one launch, a program a row: one pass for the sums and one for the draw; and in one the numbers to draw
with.

Filters keep the first tokens in the order of their logits, so that each is a threshold. It is found by halving the
range of the logits' bits, which are ordered as the numbers are, until one token is left between the ends: no sort, and
no more passes than 32. Of tokens at the threshold those with the lowest ids are kept, as in the reference.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops.triton.common import (
    DTYPES,
    LAUNCH,
    PDL,
    cdiv,
    kernel,
    next_power_of_2,
    refusal,
    rows_refusal,
    wait_for_inputs,
)


@kernel
def _uniforms(seeds, positions, out, num_rows, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < num_rows
    count = tl.load(positions + row, there, 0).to(tl.uint64, bitcast=True) + 1
    x = tl.load(seeds + row, there, 0).to(tl.uint64, bitcast=True) + count * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    tl.store(out + row, (x >> 11).to(tl.float64) * 1.1102230246251565e-16, there)  # 2**-53


def counter_uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """One launch."""
    found = torch.empty(len(seeds), dtype=torch.float64, device=seeds.device)
    _uniforms[(cdiv(len(seeds), 256),)](seeds, positions, found, len(seeds), BLOCK=256, PDL=PDL, num_warps=4, **LAUNCH)
    return found


def counter_uniforms_supports(seeds: Tensor, positions: Tensor) -> str | None:
    return refusal(seeds, positions, dtypes=(torch.int64,))


@kernel
def _sample(
    logits, temperature, uniforms, tokens, logprobs, vocab, row_stride,
    DRAW: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
    if DRAW:  # noqa: SIM102  (that is known when it is compiled)
        if greedy == 0:
            target = tl.load(uniforms + row) * total.to(tl.float64)
            before = tl.zeros((), tl.float64)
            drawn = tl.zeros((), tl.int32)
            for start in range(0, vocab, BLOCK):
                z = tl.load(at + start + n, start + n < vocab, float("-inf")).to(tl.float32) * inverse
                reached = before + tl.cumsum(tl.exp(z - best).to(tl.float64), 0)
                drawn += tl.sum(((reached <= target) & (start + n < vocab)).to(tl.int32), 0)
                before = tl.max(reached, 0)
            token = tl.minimum(drawn, vocab - 1)
    z = tl.load(at + token).to(tl.float32) * inverse
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, z - best - tl.log(total))


@kernel
def _scaled(at, n, vocab, inverse):
    """Logits over the temperature, with -inf behind the end and no negative zero, which is as likely as zero."""
    z = tl.load(at + n, n < vocab, float("-inf")).to(tl.float32) * inverse
    return tl.where(z == 0, 0.0, z)


@kernel
def _ordered(z):
    """int32 in the order of float32."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@kernel
def _above(at, vocab, inverse, best, bar, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """(how many tokens' bits reach `bar`, and with MASS their mass relative to the best)."""
    count, mass = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        n = start + tl.arange(0, BLOCK)
        z = _scaled(at, n, vocab, inverse)
        reached = (_ordered(z) >= bar) & (n < vocab)
        count += reached.to(tl.int32)
        if MASS:
            mass += tl.where(reached, tl.exp(z - best), 0.0)
    return tl.sum(count, 0), tl.sum(mass.to(tl.float64), 0)


@kernel
def _threshold(at, vocab, inverse, best, low, reached, most, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Narrow the bits of the token that completes the first `most`, or with MASS those whose mass reaches `target`, to
    low <= bits < high, where one token is left or all are alike. `reached` tokens reach `low`.
    Returns (low, high, how many tokens reach high, their mass, of each one between the mass)."""
    high = _ordered(best).to(tl.int64) + 1
    above = tl.full((), 0, tl.int32)
    while (high - low > 1) & (reached - above > 1):
        middle = low + (high - low) // 2
        count, mass = _above(at, vocab, inverse, best, middle, MASS, BLOCK)
        enough = (mass >= target) if MASS else (count >= most)
        low, reached = tl.where(enough, middle, low), tl.where(enough, count, reached)
        high, above = tl.where(enough, high, middle), tl.where(enough, above, count)
    above, mass_above = _above(at, vocab, inverse, best, high, True, BLOCK)
    reached, mass = _above(at, vocab, inverse, best, low, True, BLOCK)
    return low, high, above, mass_above, (mass - mass_above) / tl.maximum(reached - above, 1)


@kernel
def _draw_filtered(
    at, vocab, inverse, best, total, uniform, top_k, top_p, min_p, BLOCK: tl.constexpr
):  # fmt: skip
    """The token that the uniform falls on among those that the filters keep."""
    low = tl.full((), -2147483648, tl.int64)
    high, above, ties, between = low, vocab, tl.full((), 0, tl.int32), tl.full((), 0, tl.float64)
    mass = total
    if (top_k > 0) & (top_k < vocab):
        low, high, above, mass, between = _threshold(
            at, vocab, inverse, best, low, vocab, top_k, total, False, BLOCK
        )  # fmt: skip
        ties = top_k - above
    if top_p < 1:
        target = top_p * (mass + ties * between)
        if mass >= target:
            low, high, above, mass, between = _threshold(
                at, vocab, inverse, best, high, above, top_k, target, True, BLOCK
            )  # fmt: skip
        ties = tl.maximum(tl.ceil((target - mass) / tl.maximum(between, 1e-300)).to(tl.int32), 1)
    floor = tl.where(min_p > 0, best + tl.log(tl.maximum(min_p, 1e-38)), float("-inf"))
    kept = tl.full((), 0, tl.float64)
    last, seen = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        n = start + tl.arange(0, BLOCK)
        weight, seen = _kept(at, n, vocab, inverse, best, low, high, ties, seen, floor)
        kept += tl.sum(weight, 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, n, 0), 0))
    is_filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    kept = tl.where(is_filtered, kept, total)  # a row without filters has the bits that it has where no row has any
    before, drawn, seen = tl.full((), 0, tl.float64), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, vocab, BLOCK):
        n = start + tl.arange(0, BLOCK)
        weight, seen = _kept(at, n, vocab, inverse, best, low, high, ties, seen, floor)
        reached = before + tl.cumsum(weight, 0)
        drawn += tl.sum(((reached <= uniform * kept) & (n < vocab)).to(tl.int32), 0)
        before = tl.max(reached, 0)
    return tl.minimum(drawn, last)


@kernel
def _kept(at, n, vocab, inverse, best, low, high, ties, seen, floor):
    """(weights relative to the best of the tokens that are kept, and 0; tokens at the threshold so far)."""
    z = _scaled(at, n, vocab, inverse)
    bits = _ordered(z).to(tl.int64)
    is_tie = (bits >= low) & (bits < high) & (n < vocab)
    place = seen + tl.cumsum(is_tie.to(tl.int32), 0)
    keep = ((bits >= high) | (is_tie & (place <= ties))) & (z >= floor) & (n < vocab)
    return tl.where(keep, tl.exp(z - best), 0.0).to(tl.float64), seen + tl.sum(is_tie.to(tl.int32), 0)


@kernel
def _sample_filtered(
    logits, temperature, uniforms, top_k, top_p, min_p, tokens, logprobs, vocab, row_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * row_stride
    t = tl.load(temperature + row)
    greedy = t == 0
    inverse = 1.0 / tl.where(greedy, 1.0, t)
    best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        n = start + tl.arange(0, BLOCK)
        z = _scaled(at, n, vocab, inverse)
        top = tl.max(z, 0)
        token = tl.where(top > best, start + tl.argmax(z, 0), token)
        new = tl.maximum(best, top)
        total = total * tl.exp(best - new) + tl.sum(tl.exp(z - new), 0)
        best = new
    if greedy == 0:
        token = _draw_filtered(
            at, vocab, inverse, best, total.to(tl.float64), tl.load(uniforms + row).to(tl.float64),
            tl.load(top_k + row).to(tl.int32), tl.load(top_p + row).to(tl.float64), tl.load(min_p + row), BLOCK,
        )  # fmt: skip
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
    block = min(8192, next_power_of_2(vocab))
    filters = (top_k, top_p, min_p)
    if uniforms is not None and any(each is not None for each in filters):
        off = ((0, torch.int64), (1.0, torch.float32), (0.0, torch.float32))
        given = [
            torch.full((rows,), value, dtype=dtype, device=logits.device) if each is None else each
            for each, (value, dtype) in zip(filters, off, strict=True)
        ]
        _sample_filtered[(rows,)](
            logits, temperature, uniforms, *given, tokens, logprobs, vocab, logits.stride(0),
            BLOCK=block, PDL=PDL, num_warps=16, **LAUNCH,
        )  # fmt: skip
        return tokens, logprobs
    _sample[(rows,)](
        logits, temperature, temperature if uniforms is None else uniforms, tokens, logprobs, vocab, logits.stride(0),
        DRAW=uniforms is not None, BLOCK=block, PDL=PDL, num_warps=16, **LAUNCH,
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
    return rows_refusal(logits, dtypes=(*DTYPES, torch.float32))
