"""DeepSeek sparse attention: a lightning indexer picks the keys every query attends to (DeepSeek-V3.2 section 2).

    I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s])          over the index heads j; one shared key head
    S[t]    = the topk visible keys s with the largest I[t, s];    attention runs over S[t] alone

The selection has no gradient. The indexer learns by itself from the attention it must imitate (section 2.1):
    L_I = sum_t KL(p[t] || softmax over S[t] of I[t]),   p[t] = attention probabilities summed over heads, normalised
With topk at least as large as the sequences, S[t] is everything and L_I is the paper's dense warm-up loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
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


def keep_topk(
    scores: Float[Tensor, "*seqs queries keys"], allowed: Bool[Tensor, "*some queries keys"], topk: int
) -> Bool[Tensor, "*seqs queries keys"]:
    """The best `topk` allowed keys of every query; all of them where fewer are allowed."""
    best = scores.masked_fill(~allowed, float("-inf")).topk(min(topk, scores.shape[-1]), dim=-1).indices
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
