"""DeepSeek sparse attention: a lightning indexer picks the keys every query attends to (DeepSeek-V3.2 section 2).

    I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])          over the index heads j; one shared key head
    S[t]    = the topk visible keys s with the largest I[t, s];    attention runs over S[t] alone

Of keys with equal scores the later ones are taken. Equal scores are common, as I is 0 where no index head has a
positive product. Left to a sort, ties would fall by the width of the grid, and a sequence would attend to other keys
in a batch than alone.

The selection has no gradient. The indexer learns by itself from the attention it must imitate (section 2.1):
    L_I = sum_t KL(p[t] || softmax over S[t] of I[t]),   p[t] = attention probabilities summed over heads, normalised
With topk at least as large as the sequences, S[t] is everything and L_I is the paper's dense warm-up loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kogia.ops.segments import Segments


@dataclass(frozen=True, slots=True)
class IndexVectors:
    """What the indexer computed for the tokens of a step; both scale factors are inside `weights`."""

    q: Float[Tensor, "tokens index_heads index_dim"]
    k: Float[Tensor, "tokens index_dim"]
    weights: Float[Tensor, "tokens index_heads"]
    topk: int


def index_scores(
    q: Float[Tensor, "*seqs queries index_heads index_dim"],
    k: Float[Tensor, "*seqs keys index_dim"],
    weights: Float[Tensor, "*seqs queries index_heads"],
) -> Float[Tensor, "*seqs queries keys"]:
    """I[t, s] in float32, one index head at a time: all heads at once would hold `index_heads` score matrices."""
    keys = k.float().transpose(-1, -2)
    scores = torch.zeros((), device=q.device)
    for head in range(q.shape[-2]):
        scores = scores + weights[..., head, None].float() * (q[..., head, :].float() @ keys).relu()
    return scores


@torch.no_grad()
def best_keys(
    scores: Float[Tensor, "*seqs queries keys"], allowed: Bool[Tensor, "*some queries keys"], topk: int
) -> Int[Tensor, "*seqs queries best"]:
    """Places of the best `topk` allowed keys of every query; of equal scores the later places.

    Where fewer are allowed, the rest are places of keys that are not.
    """
    # One integer per key, no two alike: above its place the bits of its score, which order as the scores do once those
    # of negative ones are turned round.
    bits = scores.float().masked_fill(scores == 0, 0.0).view(torch.int32)  # -0.0 equals 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    order = order | torch.arange(scores.shape[-1], device=scores.device)
    order = order.masked_fill(~allowed, torch.iinfo(torch.int64).min)
    return order.topk(min(topk, scores.shape[-1]), dim=-1).indices


def keep_topk(
    scores: Float[Tensor, "*seqs queries keys"], allowed: Bool[Tensor, "*some queries keys"], topk: int
) -> Bool[Tensor, "*seqs queries keys"]:
    """Which keys `best_keys` takes for every query; all allowed ones where they are fewer than `topk`."""
    best = best_keys(scores, allowed, topk)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & allowed


def indexer_loss(
    q: Float[Tensor, "tokens heads qk"],
    k: Float[Tensor, "tokens heads qk"],
    index: IndexVectors,
    segments: Segments,
    scale: float,
) -> Float[Tensor, ""]:
    """L_I summed over the tokens. `q` and `k` are the expanded attention's and get no gradient."""
    total = torch.zeros((), device=q.device)
    for bucket in segments.buckets:
        scores = index_scores(*(bucket.to_grid(x) for x in (index.q, index.k, index.weights)))
        causal = torch.ones(bucket.width, bucket.width, dtype=torch.bool, device=q.device).tril()
        with torch.no_grad():
            kept = keep_topk(scores, causal, index.topk)
            target = _attention_mass(bucket.to_grid(q.detach()), bucket.to_grid(k.detach()), kept, scale)
        logs = scores.masked_fill(~kept, float("-inf")).log_softmax(-1).masked_fill(~kept, 0.0)
        divergence = (torch.xlogy(target, target) - target * logs).sum(-1, keepdim=True)
        total = total + bucket.from_grid(divergence).sum()
    return total


def _attention_mass(q: Tensor, k: Tensor, kept: Tensor, scale: float) -> Float[Tensor, "seqs queries keys"]:
    """Attention probabilities over the kept keys, averaged over the heads: they sum to 1."""
    mass = torch.zeros((), device=q.device)
    for head in range(q.shape[2]):
        scores = (q[:, :, head] @ k[:, :, head].transpose(1, 2)).float() * scale
        mass = mass + scores.masked_fill(~kept, float("-inf")).softmax(-1)
    return mass / q.shape[2]
