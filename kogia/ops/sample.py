"""Choosing the next token.

With z = logits / temperature, the filters keep: top-k, the k largest z; top-p, then the smallest set of most likely
tokens whose probability reaches p; min-p, then those with probability at least min_p times the largest. A token is
drawn from the renormalised rest by inverting the cumulative distribution at ONE uniform number per row.

That number is a hash of (seed, position), not the state of a generator: what a sequence samples does not depend on the
other rows of the batch, on chunking, on preemption or on speculation.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.dispatch import op

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; int64 products wrap as unsigned ones do
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@op(cuda=("kogia.ops.triton.sample",), invariant_cuda=("kogia.ops.triton.sample",), cpu=("kogia.ops.cpu.sample",))
def counter_uniforms(seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Number `position` of the splitmix64 stream that starts at `seed`, as float64 in [0, 1) with 53 bits."""
    x = seeds + (positions + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def filter_logits(
    scaled: Float[Tensor, "rows vocab"],
    top_k: Int[Tensor, " rows"] | None = None,
    top_p: Float[Tensor, " rows"] | None = None,
    min_p: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows vocab"]:
    """`scaled` with what the filters drop set to -inf. None skips a filter; so do top_k 0, top_p 1 and min_p 0 in a
    row. The most likely token always stays; of equally likely ones the lower id counts as more likely."""
    if top_k is not None or top_p is not None:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranks = torch.arange(scaled.shape[1], device=scaled.device)
            limits = torch.where(top_k > 0, top_k, scaled.shape[1])
            ordered = ordered.masked_fill(ranks >= limits[:, None], float("-inf"))
        if top_p is not None:
            probs = ordered.softmax(-1)
            before = probs.cumsum(-1, dtype=torch.float64) - probs
            beyond = (before >= top_p[:, None]) & (top_p < 1)[:, None]
            beyond[:, 0] = False
            ordered = ordered.masked_fill(beyond, float("-inf"))
        scaled = torch.empty_like(ordered).scatter_(-1, order, ordered)
    if min_p is not None:
        floor = scaled.amax(-1) + min_p.log()  # log 0 = -inf keeps everything
        scaled = scaled.masked_fill(scaled < floor[:, None], float("-inf"))
    return scaled


@op(cuda=("kogia.ops.triton.sample",), invariant_cuda=("kogia.ops.triton.sample",), cpu=("kogia.ops.cpu.sample",))
def sample(
    logits: Float[Tensor, "rows vocab"],
    temperature: Float[Tensor, " rows"],
    uniforms: Float[Tensor, " rows"] | None,
    top_k: Int[Tensor, " rows"] | None = None,
    top_p: Float[Tensor, " rows"] | None = None,
    min_p: Float[Tensor, " rows"] | None = None,
    filtered: Int[Tensor, " some"] | None = None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """(token, log-probability in nats) per row; rows of temperature 0, or all when `uniforms` is None, are greedy.

    The log-probability is that of the token under softmax(logits / temperature) with NO filter (temperature 0 counts
    as 1 there): the behaviour log-probability of policy-gradient training, equal to `Transformer.logprobs`.
    Sorting is what sampling costs: `filtered` names the rows that have a filter on, all of them when it is None.
    """
    greedy = temperature == 0
    scaled = _scaled(logits, temperature)
    if uniforms is None:
        tokens = scaled.argmax(-1)
    else:
        kept = scaled
        if any(x is not None for x in (top_k, top_p, min_p)):
            kept = _filter_some(scaled, (top_k, top_p, min_p), filtered)
        tokens = torch.where(greedy, scaled.argmax(-1), _invert(kept, uniforms))
    logprobs = scaled.gather(-1, tokens[:, None]).squeeze(-1) - scaled.logsumexp(-1)
    return tokens, logprobs


def _invert(filtered: Tensor, uniforms: Tensor) -> Tensor:
    """First token whose cumulative probability exceeds the uniform; never one of probability zero."""
    cumulative = filtered.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = uniforms[:, None].double() * cumulative[:, -1:]  # u <= 1 - 2^-53, so this stays below the total
    return torch.searchsorted(cumulative, points, right=True).squeeze(-1).clamp_(max=filtered.shape[1] - 1)


def _filter_some(scaled: Tensor, filters: tuple[Tensor | None, ...], rows: Tensor | None) -> Tensor:
    if rows is None:
        return filter_logits(scaled, *filters)
    return scaled.index_copy(0, rows, filter_logits(scaled[rows], *(None if x is None else x[rows] for x in filters)))


def token_logprobs(
    logits: Float[Tensor, "rows vocab"],
    temperature: Float[Tensor, " rows"],
    token_ids: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """What `sample` returns as the log-probability of a token, for given tokens."""
    scaled = _scaled(logits, temperature)
    return scaled.gather(-1, token_ids[:, None]).squeeze(-1) - scaled.logsumexp(-1)


def most_likely(
    logits: Float[Tensor, "rows vocab"], temperature: Float[Tensor, " rows"], count: int
) -> tuple[Int[Tensor, "rows count"], Float[Tensor, "rows count"]]:
    """(ids, log-probabilities as `sample` has them) of the most likely tokens of each row, the best first."""
    scaled = _scaled(logits, temperature)
    values, ids = scaled.topk(count, -1)
    return ids, values - scaled.logsumexp(-1, keepdim=True)


def _scaled(logits: Float[Tensor, "rows vocab"], temperature: Float[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
    """Temperature 0 counts as 1."""
    return logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
