"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2 section 2, released inference code).

    q = W_q c_q                 [heads, dim] from the normed query latent
    k = LayerNorm(W_k h)        [dim], one head shared by all index heads; cached beside the latent
    w = W_w h * heads^-1/2 * dim^-1/2

Rotary positions stand on the FIRST `qk_rope_head_dim` numbers of q and k and pair x_i with x_{i + rope/2}, unlike the
main attention's, which stand last and pair neighbours. The released kernels also rotate q and k by a Hadamard matrix
before rounding to FP8; in full precision that leaves every product q . k unchanged, and it is left out here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kogia.model.config import IndexerConfig
from kogia.model.layers import StepContext
from kogia.model.linear import Linear
from kogia.ops.rope import rotate_half_split
from kogia.ops.sparse import IndexVectors


class Indexer(nn.Module):
    def __init__(self, dim: int, q_lora_rank: int, rope_dim: int, config: IndexerConfig) -> None:
        super().__init__()
        self.config, self.rope_dim, self.topk = config, rope_dim, config.topk
        self.wq_b = Linear(q_lora_rank, config.num_heads * config.head_dim)
        self.wk = Linear(dim, config.head_dim)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(dim, config.num_heads, bias=False)

    def forward(
        self, x: Float[Tensor, "tokens dim"], q_latent: Float[Tensor, "tokens q_rank"], step: StepContext
    ) -> IndexVectors:
        """Its input is detached: the language-model loss does not reach the indexer, nor L_I the model."""
        c = self.config
        x, q_latent = x.detach(), q_latent.detach()
        q = self._rotate(self.wq_b(q_latent).view(-1, c.num_heads, c.head_dim), step)
        norm = self.k_norm
        k = F.layer_norm(self.wk(x).float(), (c.head_dim,), norm.weight.float(), norm.bias.float(), norm.eps)
        k = self._rotate(k.to(x.dtype)[:, None], step)[:, 0]
        weights = F.linear(x.float(), self.weights_proj.weight.float()) * (c.num_heads * c.head_dim) ** -0.5
        return IndexVectors(q, k, weights, self.topk)

    def _rotate(self, x: Float[Tensor, "tokens heads dim"], step: StepContext) -> Float[Tensor, "tokens heads dim"]:
        turned = rotate_half_split(x[..., : self.rope_dim], step.cos, step.sin)
        return torch.cat((turned, x[..., self.rope_dim :]), -1)
