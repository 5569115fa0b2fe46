"""Small modules every part of the model shares."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kogia.model.cache import StepCache
from kogia.model.linear import Linear
from kogia.model.packed import PackedTokens
from kogia.ops.grid import Bucket, buckets_by_length
from kogia.ops.norm import rms_norm


@dataclass(frozen=True, slots=True)
class StepContext:
    """What one forward pass shares between its layers: computed once, passed as an argument."""

    batch: PackedTokens
    cos: Tensor
    sin: Tensor
    buckets: list[Bucket]
    cache: StepCache | None
    latent_ranks: Tensor | None = None
    """[tokens] how much of each token's latent is left; nested dropout, without a cache only."""


def step_context(
    batch: PackedTokens, cos: Tensor, sin: Tensor, cache: StepCache | None, latent_ranks: Tensor | None = None
) -> StepContext:
    """`latent_ranks` is per sequence."""
    if latent_ranks is not None:
        lengths = batch.cu_seqlens.diff()
        latent_ranks = torch.repeat_interleave(latent_ranks, lengths, output_size=batch.num_tokens)
    buckets = buckets_by_length(batch.cu_seqlens, batch.max_seqlen)
    return StepContext(batch, cos, sin, buckets, cache, latent_ranks)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Also the shared experts, fused into one of their total width."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, width)
        self.up_proj = Linear(dim, width)
        self.down_proj = Linear(width, dim)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
