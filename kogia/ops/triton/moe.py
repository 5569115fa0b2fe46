"""The mixture of experts for few tokens: weights are read once, tokens are indexed where they lie.

    route      scores in float32, bias, groups, top-k and gates: the last tile of a block of tokens to arrive chooses
    order      copies of tokens by expert, in blocks of rows that share one expert's weights
    gate_up    rows of a block times the gate and up matrices of its expert, and silu(gate) * up of the two
    down       that times the expert's down matrix
    sum        the weighted sum over a token's copies, on top of the residual stream

Shared experts ride along as further experts that every token has chosen with weight 1. For many tokens the products
are bound by arithmetic, and `order`, which has all copies in one tile, would not fit: this backend leaves them to
PyTorch's grouped_mm (kogia.ops.aten), and experts in FP8 to kogia.ops.w8a8. Where the former is as fast as this has not
been measured.
"""

# Inside kernels, types are Triton's:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton.language as tl
from torch import Tensor

from kogia.ops import fp8
from kogia.ops.moe import Activation, Routed, SharedExperts
from kogia.ops.packed import Packed
from kogia.ops.triton.common import (
    LAUNCH,
    PDL,
    cdiv,
    counters,
    kernel,
    next_power_of_2,
    refusal,
    rows_refusal,
    wait_for_inputs,
)
from kogia.ops.triton.packed import (
    add_product,
    block_starts,
    columns,
    either,
    group_scales,
    kind,
    layout,
    load_rows,
    matrix,
    operand,
    rows_of,
    scaled,
    weight_refusal,
)

MOST_TOKENS = 512
"""More are left to the sorted products of kogia.ops.aten."""
_SINGLE = 1 << 24
"""Up to so many numbers of router weights are read again for each token."""
PAIRWISE = 2
"""Up to here a block of rows is one copy of one token, and nothing is sorted: experts are hardly ever shared."""


@kernel
def _route(
    x, gate, bias, limits, thresholds, scores, ids, weights, arrived, num_tokens, scale, dim,
    LIMITED: tl.constexpr, THRESHOLD: tl.constexpr, TRAINED: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr,
    BIASED: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    tb, eb = tl.program_id(0), tl.program_id(1)
    t = tb * BLOCK_T + tl.arange(0, BLOCK_T)
    e = eb * BLOCK_E + tl.arange(0, BLOCK_E)
    there, known = t < num_tokens, e < E
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < dim
        if DOT:
            a = tl.load(x + t[:, None].to(tl.int64) * dim + k[None, :], there[:, None] & inside[None, :], 0.0)
            w = tl.load(gate + e[None, :] * dim + k[:, None], known[None, :] & inside[:, None], 0.0)
            acc = tl.dot(a, w, acc)
        else:  # one token
            a = tl.load(x + tb.to(tl.int64) * dim + k, inside, 0.0).to(tl.float32)
            w = tl.load(gate + e[:, None] * dim + k[None, :], known[:, None] & inside[None, :], 0.0).to(tl.float32)
            acc += tl.sum(w * a[None, :], 1)[None, :]
    at = scores + t[:, None].to(tl.int64) * E + e[None, :]
    tl.store(at, acc, there[:, None] & known[None, :])
    tl.debug_barrier()
    if tl.atomic_add(arrived + tb, 1, sem="acq_rel") != tl.num_programs(1) - 1:
        return
    tl.store(arrived + tb, 0)
    a = tl.arange(0, PADDED)
    real = a < E
    at = scores + t[:, None].to(tl.int64) * E + a[None, :]
    inside = there[:, None] & real[None, :]
    logit = tl.load(at, inside, float("-inf"), cache_modifier=".cg")
    if SIGMOID:
        s = 1.0 / (1.0 + tl.exp(-logit))
    else:
        s = tl.exp(logit - tl.max(logit, 1)[:, None])
        s = s / tl.sum(s, 1)[:, None]
    tl.store(at, s, inside)
    choice = s
    if BIASED:
        choice = choice + tl.load(bias + a, real, 0.0)[None, :]
    # NaN compares with nothing: left in, the largest could be a place beyond the last expert
    choice = tl.where(real[None, :] & (choice == choice), choice, float("-inf"))
    if GROUPS > 1:
        group = a // (E // GROUPS)
        g = tl.arange(0, GROUPS)
        member = (group[:, None] == g[None, :]) & real[:, None]
        spread = tl.where(member[None, :, :], choice[:, :, None], float("-inf"))  # [tokens, experts, groups]
        best = tl.max(spread, 1)
        value = best
        if BIASED:
            where = tl.argmax(spread, 1)
            others = tl.where(a[None, :, None] == where[:, None, :], float("-inf"), spread)
            second = tl.max(others, 1)
            value = best + tl.where(second == float("-inf"), 0.0, second)
        closed = tl.full((BLOCK_T, PADDED), 1, tl.int32)
        for _ in tl.static_range(KEPT):
            chosen = tl.argmax(value, 1)
            closed = tl.where(group[None, :] == chosen[:, None], 0, closed)
            value = tl.where(g[None, :] == chosen[:, None], float("-inf"), value)
        choice = tl.where(closed == 1, float("-inf"), choice)
    total = tl.zeros((BLOCK_T,), tl.float32)
    best = tl.zeros((BLOCK_T,), tl.float32)
    limit = tl.full((BLOCK_T,), K, tl.int64)
    if LIMITED:
        limit = tl.load(limits + t, there, 0)
    for i in tl.static_range(max(K, TRAINED)):
        chosen = tl.argmax(choice, 1)
        mine = a[None, :] == chosen[:, None]
        weight = tl.sum(tl.where(mine, s, 0.0), 1)
        choice = tl.where(mine, float("-inf"), choice)
        if i < TRAINED:
            total += weight
        if i < K:
            if LIMITED:
                weight = tl.where(i < limit, weight, 0.0)
                chosen = tl.where(i < limit, chosen, -1)
            best = tl.maximum(best, weight)
            tl.store(ids + t.to(tl.int64) * K + i, chosen.to(tl.int64), there)
            tl.store(weights + t.to(tl.int64) * K + i, weight, there)
    if THRESHOLD:
        floor = best * tl.load(thresholds + t, there, 0.0)
        for i in tl.static_range(K):
            at_weight = weights + t.to(tl.int64) * K + i
            dropped = tl.load(at_weight, there, 0.0) < floor
            tl.store(at_weight, tl.zeros((BLOCK_T,), tl.float32), there & dropped)
            tl.store(ids + t.to(tl.int64) * K + i, tl.full((BLOCK_T,), -1, tl.int64), there & dropped)
    factor = tl.zeros((BLOCK_T,), tl.float32) + scale
    if NORMALIZE:
        factor = factor / (total + 1e-20)
    for i in tl.static_range(K):
        at_weight = weights + t.to(tl.int64) * K + i
        tl.store(at_weight, tl.load(at_weight, there, 0.0) * factor, there)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
    given: Tensor | None = None,
    may_be_nobody: bool = False,
    activation: Activation | None = None,
) -> Routed:
    """One launch. Of equally good experts the lower number is chosen."""
    tokens, experts = x.shape[0], weight.shape[0]
    limits, thresholds = (None, None) if activation is None else (activation.limits, activation.thresholds)
    trained, topk = topk, topk if activation is None else activation.most
    scores = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, topk, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=x.device)
    single = tokens * weight.numel() <= _SINGLE  # a program a token and a few experts, else tiles of 16 tokens
    block_t, block_e, block_k, warps = (1, 1 if tokens <= 8 else 4, 2048, 1) if single else (16, 16, 256, 4)
    blocks = cdiv(tokens, block_t)
    _route[(blocks, cdiv(experts, block_e))](
        x, weight, bias if bias is not None else scores, limits if limits is not None else ids,
        thresholds if thresholds is not None else scores, scores, ids, weights, counters(x.device, blocks), tokens,
        scale, x.shape[1], LIMITED=limits is not None, THRESHOLD=thresholds is not None, TRAINED=trained,
        E=experts, K=topk, GROUPS=num_groups, KEPT=topk_groups, SIGMOID=score == "sigmoid",
        BIASED=bias is not None, NORMALIZE=normalize, BLOCK_T=block_t, BLOCK_E=block_e,
        BLOCK_K=min(block_k, next_power_of_2(x.shape[1])),
        PADDED=next_power_of_2(experts), DOT=block_t > 1, PDL=PDL, num_warps=warps, **LAUNCH,
    )  # fmt: skip
    return Routed(ids, weights, scores)


def route_supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    score: str,
    topk: int,
    num_groups: int,
    topk_groups: int,
    normalize: bool,
    scale: float,
    given: Tensor | None = None,
    may_be_nobody: bool = False,
    activation: Activation | None = None,
) -> str | None:
    if given is not None:
        return "it chooses; given experts are for the reference"
    if num_groups & (num_groups - 1):
        return f"it takes a power of two of groups, not {num_groups}"
    return refusal(x, weight)


@kernel
def _order(
    ids, rows, block_expert, num_blocks, num_pairs,
    K: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
    EXPERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e finds the copies of expert e. A copy is token * (K + SHARED) + choice; -1 fills a block up."""
    wait_for_inputs(PDL)
    e = tl.program_id(0)
    p = tl.arange(0, PADDED)
    token, choice = p // (K + SHARED), p % (K + SHARED)
    chosen = tl.load(ids + token * K + choice, (p < num_pairs) & (choice < K), -1).to(tl.int32)
    chosen = tl.where((p < num_pairs) & (choice >= K), E + choice - K, chosen)
    chosen = tl.where(chosen < 0, EXPERTS, chosen)
    counts = tl.histogram(chosen, 2 * EXPERTS)
    all_experts = tl.arange(0, 2 * EXPERTS)
    blocks = tl.where(all_experts < EXPERTS, (counts + BLOCK_M - 1) // BLOCK_M, 0)
    first = tl.sum(tl.where(all_experts < e, blocks, 0), 0)
    own = tl.sum(tl.where(all_experts == e, blocks, 0), 0)
    if e == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))
    mine = chosen == e
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(rows + first * BLOCK_M + rank, p, mine)
    count = tl.sum(mine.to(tl.int32), 0)
    fill = tl.arange(0, BLOCK_M)
    tl.store(rows + first * BLOCK_M + count + fill, tl.full((BLOCK_M,), -1, tl.int32), count + fill < own * BLOCK_M)
    for i in range(own):
        tl.store(block_expert + first + i, e)


@kernel
def _expert_of(ids, copy, K: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr):
    """The expert of a copy, which is token * (K + SHARED) + choice; -1 is nobody."""
    choice = copy % (K + SHARED)
    expert = E + choice - K
    if choice < K:
        expert = tl.load(ids + (copy // (K + SHARED)).to(tl.int64) * K + choice).to(tl.int32)
    return expert


@kernel
def _gate_up(
    x, ids, rows, block_expert, num_blocks, gate_up, shared_gate, shared_up, hidden, dim, width,
    K: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr, INTERPRET: tl.constexpr,
    PDL: tl.constexpr, SPLIT: tl.constexpr = 1,
):  # fmt: skip
    """hidden[copy] = silu(gate) * up of its expert. Where SPLIT is not 1, so many groups of warps share the depth, as
    in products with one matrix, and the scales of int4 are read one block ahead."""
    wait_for_inputs(PDL)
    block = tl.program_id(1)
    slot = tl.arange(0, BLOCK_M)
    if PAIRS:  # the block is one copy
        copy = tl.where(slot == 0, block, -1)
        expert = _expert_of(ids, block, K, E, SHARED)
        if expert < 0:
            return
    else:
        if block >= tl.load(num_blocks):
            return
        expert = tl.load(block_expert + block)
        copy = tl.load(rows + block * BLOCK_M + slot)
    token = (copy // (K + SHARED)).to(tl.int64)
    shared = expert >= E
    gate = matrix(either(gate_up, shared_gate, shared), tl.where(shared, expert - E, 2 * expert), width, FORMAT)
    up = matrix(either(gate_up, shared_up, shared), tl.where(shared, expert - E, 2 * expert + 1), width, FORMAT)
    both = tl.arange(0, 2 * BLOCK_N)  # rows of the gate, then the same of up
    n = tl.program_id(0) * BLOCK_N + both % BLOCK_N
    inside = n < width
    of_gate, of_up = rows_of(gate, n, FORMAT), rows_of(up, n, FORMAT)
    is_up = both >= BLOCK_N
    data, scale = tl.where(is_up, of_up[0], of_gate[0]), tl.where(is_up, of_up[1], of_gate[1])
    weight = data, scale, tl.where(is_up, of_up[2], of_gate[2])
    at = x + token * dim
    if SPLIT == 1:
        acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, dim, BLOCK_K):
            even, odd = load_rows(at, copy >= 0, start, dim, FORMAT, BLOCK_K, 1, INTERPRET)
            acc = add_product(acc, even, odd, weight, inside, start, dim, FORMAT, ZEROS, BLOCK_K, 1, INTERPRET)
    else:
        sums = tl.zeros((SPLIT, 2 * BLOCK_N, BLOCK_M), tl.float32)
        scales = group_scales(weight, inside, block_starts(0, SPLIT, BLOCK_K), dim, BLOCK_K, SPLIT)
        for block in range(0, tl.cdiv(dim, BLOCK_K), SPLIT):
            starts = block_starts(block, SPLIT, BLOCK_K)
            ahead = group_scales(weight, inside, starts + SPLIT * BLOCK_K, dim, BLOCK_K, SPLIT)
            even, odd = load_rows(at, copy >= 0, starts, dim, FORMAT, BLOCK_K, SPLIT, INTERPRET)
            sums = add_product(
                sums, even, odd, weight, inside, starts, dim, FORMAT, ZEROS, BLOCK_K, SPLIT, INTERPRET, scales
            )  # fmt: skip
            scales = ahead
        acc = tl.sum(sums, 0)
    acc = tl.reshape(scaled(acc, weight, inside, FORMAT), (2, BLOCK_N, BLOCK_M))
    g, u = tl.split(tl.permute(acc, (1, 2, 0)))
    g = g.to(hidden.dtype.element_ty).to(tl.float32)
    value = (g / (1.0 + tl.exp(-g))).to(hidden.dtype.element_ty) * u.to(hidden.dtype.element_ty)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    to = hidden + copy[None, :].to(tl.int64) * width + n[:, None]
    tl.store(to, value, (copy >= 0)[None, :] & (n < width)[:, None])


@kernel
def _down(
    hidden, ids, rows, block_expert, num_blocks, down, shared_down, y, dim, width,
    K: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr, INTERPRET: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y[copy] = down(hidden[copy]), not yet weighted."""
    wait_for_inputs(PDL)
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_M)
    if PAIRS:
        copy = tl.where(slot == 0, block, -1)
        expert = _expert_of(ids, block, K, E, SHARED)
        if expert < 0:
            return
    else:
        if block >= tl.load(num_blocks):
            return
        expert = tl.load(block_expert + block)
        copy = tl.load(rows + block * BLOCK_M + slot)
    shared = expert >= E
    weight = matrix(either(down, shared_down, shared), tl.where(shared, 0, expert), dim, FORMAT)
    weight = columns(weight, tl.where(shared, expert - E, 0), down, FORMAT)
    inside = n < dim
    weight = rows_of(weight, n, FORMAT)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, width, BLOCK_K):
        at = hidden + copy.to(tl.int64) * width
        even, odd = load_rows(at, copy >= 0, start, width, FORMAT, BLOCK_K, 1, INTERPRET)
        acc = add_product(acc, even, odd, weight, inside, start, width, FORMAT, ZEROS, BLOCK_K, 1, INTERPRET)
    acc = scaled(acc, weight, inside, FORMAT)
    to = y + copy[None, :].to(tl.int64) * dim + n[:, None]
    tl.store(to, acc.to(y.dtype.element_ty), (copy >= 0)[None, :] & inside[:, None])


@kernel
def _sum(
    y, ids, weights, residual, out, dim,
    K: tl.constexpr, SHARED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K + SHARED):
        value = tl.load(y + (token * (K + SHARED) + choice) * dim + n, inside, 0.0).to(tl.float32)
        if choice < K:
            weight = tl.load(weights + token * K + choice)
            is_somebody = tl.load(ids + token * K + choice) >= 0  # a row of nobody was not written
            value = tl.where(is_somebody, weight * value, 0.0)
        total += value
    if ADD:
        total += tl.load(residual + token * dim + n, inside, 0.0).to(tl.float32)
    tl.store(out + token * dim + n, total.to(out.dtype.element_ty), inside)


def mix_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Four launches; for a few tokens three."""
    tokens, dim = x.shape
    topk, (experts, _, width) = expert_ids.shape[1], _data(gate_up).shape[:3]
    num_shared = 0 if shared is None else len(shared[0]) // width
    pairs, total = tokens * (topk + num_shared), experts + num_shared
    sg, su, sd = (gate_up, gate_up, down) if shared is None else shared
    hidden = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    add, other = residual is not None, x if residual is None else residual
    out = torch.empty_like(x)
    pairwise = tokens <= PAIRWISE
    padded = next_power_of_2(pairs)
    bm = _block_rows(1.0 if pairwise else padded / total)  # of no other number: as few kernels as can be
    shapes = {"K": topk, "E": experts, "SHARED": num_shared, "PAIRS": pairwise, "BLOCK_M": bm, "PDL": PDL, **LAUNCH}
    most = pairs if pairwise else min(total, pairs) + pairs // bm
    rows = block_expert = num_blocks = expert_ids
    if not pairwise:
        rows = torch.empty(most * bm, dtype=torch.int32, device=x.device)
        block_expert = torch.empty(most + 1, dtype=torch.int32, device=x.device)
        num_blocks = block_expert[most:]
        _order[(total,)](
            expert_ids, rows, block_expert, num_blocks, pairs, K=topk, E=experts, SHARED=num_shared, BLOCK_M=bm,
            PADDED=padded, EXPERTS=next_power_of_2(total),
            PDL=PDL, num_warps=4 if pairs <= 1024 else 8, **LAUNCH,
        )  # fmt: skip
    tile = _tile(gate_up, bm, pairwise)
    if pairwise and kind(gate_up)[0] == "int4":
        tile = INT4_PAIRWISE
    _gate_up[(cdiv(width, tile["BLOCK_N"]), most)](
        x, expert_ids, rows, block_expert, num_blocks, operand(gate_up), operand(sg), operand(su), hidden, dim, width,
        **layout(gate_up), **tile, **shapes,
    )  # fmt: skip
    y = torch.empty(pairs, dim, dtype=x.dtype, device=x.device)
    tile = _tile(down, bm, pairwise)
    _down[(cdiv(dim, tile["BLOCK_N"]), most)](
        hidden, expert_ids, rows, block_expert, num_blocks, operand(down), operand(sd), y, dim, width,
        **layout(down), **tile, **shapes,
    )  # fmt: skip
    _sum[(tokens, cdiv(dim, 1024))](
        y, expert_ids, weights, other, out, dim, K=topk, SHARED=num_shared, ADD=add, BLOCK=1024, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def _block_rows(mean: float) -> int:
    """Copies in a block, where an expert has at most so many on average."""
    return 8 if mean <= 4 else 16 if mean <= 16 else 32 if mean <= 32 else 64


INT4_PAIRWISE = {"BLOCK_N": 16, "SPLIT": 4, "num_warps": 4, "num_stages": 4}
"""Of `_gate_up`: with the depth in four parts, more warps convert codes at a time."""


def _tile(weight: Tensor | Packed, block_rows: int, pairwise: bool) -> dict[str, int]:
    """Output columns of a program, its warps, and the loads that run ahead: the fastest of those that were tried.

    Codes become operands in registers while a warp has no part in a product of four warps: two do it.
    """
    if isinstance(weight, Tensor):
        columns, warps, stages = (32, 2, 3) if pairwise else (64, 4, 3)
    elif block_rows <= 16:
        columns, warps, stages = 32, 2, 4 if pairwise else 3
    else:
        columns, warps, stages = 64, 2 if block_rows == 32 else 4, 3
    return {"BLOCK_N": columns, "num_warps": warps, "num_stages": stages}


def mix_experts_supports(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up: Tensor | Packed,
    down: Tensor | Packed,
    *,
    shared: SharedExperts | None = None,
    residual: Tensor | None = None,
) -> str | None:
    if x.shape[0] > MOST_TOKENS:
        return f"it is made for at most {MOST_TOKENS} tokens; grouped_mm takes more"
    width = _data(gate_up).shape[2]
    reason = refusal(x) or refusal(expert_ids, dtypes=(torch.int64,))
    reason = reason or weight_refusal(gate_up, x.dtype) or weight_refusal(down, x.dtype)
    if shared is None or reason:
        return reason
    gate, up, back = shared
    if len(gate) % width:
        return f"shared experts {len(gate)} wide are no whole number of experts of {width}"
    for name, own, other in (("gate", gate_up, gate), ("up", gate_up, up), ("down", down, back)):
        if (reason := weight_refusal(other, x.dtype)) or kind(own) != kind(other):
            return reason or f"it takes shared experts stored as the routed ones are; their {name} is {kind(other)}"
    if "fp8" in (kind(gate_up)[0], kind(down)[0]) and width % fp8.BLOCK:
        return f"FP8 blocks of experts {width} wide do not end where an expert of the shared ones does"
    return None


def _data(weight: Tensor | Packed) -> Tensor:
    return weight.data if isinstance(weight, Packed) else weight


@kernel
def _silu_mul(gate, up, out, width, gate_row, up_row, PDL: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    g = tl.load(gate + row * gate_row + n, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * up_row + n, inside, 0.0)
    tl.store(out + row * width + n, (g / (1.0 + tl.exp(-g))).to(u.dtype) * u, inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """One pass."""
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    block = min(2048, next_power_of_2(width))
    _silu_mul[(rows, cdiv(width, block))](
        gate, up, out, width, gate.stride(0), up.stride(0), PDL=PDL, BLOCK=block, num_warps=4, **LAUNCH
    )
    return out


def silu_mul_supports(gate: Tensor, up: Tensor) -> str | None:
    return rows_refusal(gate, up)


@kernel
def _gathered_sum(
    y, inverse, weights, first, second, out, dim,
    K: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < dim
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(inverse + token * K + choice).to(tl.int64)
        weight = tl.load(weights + token * K + choice).to(y.dtype.element_ty).to(tl.float32)
        total += weight * tl.load(y + row * dim + n, inside, 0.0).to(tl.float32)
    if ADDED > 0:
        total += tl.load(first + token * dim + n, inside, 0.0).to(tl.float32)
    if ADDED > 1:
        total += tl.load(second + token * dim + n, inside, 0.0).to(tl.float32)
    tl.store(out + token * dim + n, total.to(out.dtype.element_ty), inside)


def gathered_sum(y: Tensor, inverse: Tensor, weights: Tensor, *added: Tensor) -> Tensor:
    """One pass over the rows, in the order of the tokens."""
    (tokens, topk), dim = weights.shape, y.shape[1]
    out = torch.empty(tokens, dim, dtype=y.dtype, device=y.device)
    block = min(2048, next_power_of_2(dim))
    first, second = (*added, y, y)[:2]
    _gathered_sum[(tokens, cdiv(dim, block))](
        y, inverse, weights, first, second, out, dim, K=topk, ADDED=len(added), BLOCK=block, PDL=PDL,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return out


def gathered_sum_supports(y: Tensor, inverse: Tensor, weights: Tensor, *added: Tensor) -> str | None:
    if len(added) > 2:
        return f"it adds two tensors, not {len(added)}"
    return refusal(y, *added) or refusal(weights, dtypes=(torch.float32,)) or refusal(inverse, dtypes=(torch.int64,))
