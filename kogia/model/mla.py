"""Multi-head latent attention (DeepSeek-V2 section 2.1 and appendix C).

    c_q  = RMSNorm(W_DQ h)           q_i = [W_UQ_i c_q ; RoPE(W_QR_i c_q)]
    c_kv = RMSNorm(W_DKV h)          k_i = [W_UK_i c_kv ; RoPE(W_KR h)]        v_i = W_UV_i c_kv
    o_i  = softmax(q_i . k_i * scale) v_i,    scale = (nope + rope)^-0.5 * mscale^2

Only c_kv and the one shared rotary key are cached. Two forms of the same function:

*expanded* (training, no cache): build k_i and v_i for every head and run ordinary attention.
*absorbed* (with a cache): W_UK moves to the query and W_UV behind the sum, so attention runs on the latents themselves
as multi-query attention with one key [c_kv ; k_rope] and value c_kv (section 2.1.2):
    score = (W_UK_i^T q_nope_i) . c_kv + q_rope_i . k_rope;      o_i = W_UV_i sum_j p_j c_kv_j
The rotary part is decoupled because a rotation between W_UQ and W_UK would block that move.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kogia.model.config import MLAConfig
from kogia.model.indexer import Indexer
from kogia.model.layers import RMSNorm, StepContext
from kogia.model.linear import Linear, project
from kogia.ops.attention import paged_attention, varlen_attention
from kogia.ops.cache import LatentRow, LayerCache, write_latent
from kogia.ops.latent import absorb_query, keys_and_values, latent_and_key, project_values, rotate_query
from kogia.ops.linear import linear
from kogia.ops.packed import Packed, joined
from kogia.ops.prefill import Prefill, absorbed_part, prefill_of
from kogia.ops.rope import yarn_mscale
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors, indexer_loss


def softmax_scale(config: MLAConfig) -> float:
    """(nope + rope)^-0.5, times YaRN's mscale squared when the context is extended (never the latent width)."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


class MLA(nn.Module):
    def __init__(self, dim: int, config: MLAConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        heads, rank = config.num_heads, config.kv_lora_rank
        self.q_rank = q_rank = config.query_rank(layer)
        if q_rank is None:
            self.q_proj = Linear(dim, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(dim, q_rank)
            self.q_a_layernorm = RMSNorm(q_rank, config.norm_eps)
            self.q_b_proj = Linear(q_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(dim, rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(rank, config.norm_eps)
        self.kv_b_proj = Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, dim)
        self.indexer = None
        if config.indexer is not None:
            assert q_rank is not None, "ModelConfig checks this"
            self.indexer = Indexer(dim, q_rank, config.qk_rope_head_dim, config.indexer)
        self._up: tuple[int, Tensor, Tensor] | None = None
        self._copy: Tensor | None = None
        """W_UK and W_UV made dense, where they are packed."""
        self._joint: Tensor | Packed | None = None
        """The projections that read x, below each other: on a GPU one product is faster than two small ones."""

    def forward(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        c = self.config
        if self._joint is not None and step.cache is not None:
            first, kv = linear(x, self._joint).split([len(self._joint) - kv_width(c), kv_width(c)], -1)
        else:
            first, kv = project(x, self.q_proj if self.q_rank is None else self.q_a_proj, self.kv_a_proj_with_mqa)
        q_latent = x if self.q_rank is None else self.q_a_layernorm(first.contiguous())
        q = (first if self.q_rank is None else self.q_b_proj(q_latent)).unflatten(-1, (c.num_heads, c.qk_head_dim))
        index = None if self.indexer is None else self.indexer(x, q_latent, step)
        if step.cache is None:
            mixed = self._expanded(q, kv, step, index)
        else:
            mixed = self._cached(q, kv, step, step.cache.layers[self.layer], index)
        return self.o_proj(mixed.flatten(1))

    def _expanded(
        self, q: Tensor, kv: Tensor, step: StepContext, index: IndexVectors | None
    ) -> Float[Tensor, "tokens heads v"]:
        c = self.config
        norm = self.kv_a_layernorm
        latent, k_rope = latent_and_key(kv, norm.weight, step.cos, step.sin, norm.eps)
        q = rotate_query(q, step.cos, step.sin, c.qk_nope_head_dim)
        k, v = self._keys_and_values(up_to_rank(latent, step.latent_ranks), k_rope)
        if index is not None and step.routing is not None and step.routing.losses:
            step.routing.add_indexer_loss(self.layer, indexer_loss(q, k, index, step.segments, self.scale))
        return varlen_attention(q, k, v, step.segments, scale=self.scale, index=index)

    def _keys_and_values(
        self, latent: Float[Tensor, "keys rank"], k_rope: Float[Tensor, "keys 1 rope"]
    ) -> tuple[Float[Tensor, "keys heads qk"], Float[Tensor, "keys heads v"]]:
        """Those of every head, from normed latents and the rotated shared key."""
        c = self.config
        both = self.kv_b_proj(latent).view(-1, c.num_heads, c.qk_nope_head_dim + c.v_head_dim)
        return keys_and_values(both, k_rope, c.qk_nope_head_dim)

    def _cached(
        self, q: Tensor, kv: Tensor, step: StepContext, cache: LayerCache, index: IndexVectors | None
    ) -> Float[Tensor, "tokens heads v"]:
        """Write this step's rows, then attend: absorbed, and the sequences that run many tokens expanded."""
        norm = self.kv_a_layernorm
        keys = None if index is None else index.k
        write_latent(kv, cache, norm.weight, step.cos, step.sin, eps=norm.eps, index_key=keys)
        prefill = prefill_of(cache, step.segments)
        if prefill is None:
            return self._absorbed(q, step.cos, step.sin, cache, step.segments, index)
        rows = prefill.num_rows
        expanded = self._prefilled(q[rows:], step.cos[rows:], step.sin[rows:], cache, prefill)
        if not rows:
            return expanded
        head = absorbed_part(cache, step.segments, prefill)
        return torch.cat((self._absorbed(q[:rows], step.cos[:rows], step.sin[:rows], *head, None), expanded))

    def _absorbed(
        self,
        q: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache,
        segments: Segments,
        index: IndexVectors | None,
    ) -> Float[Tensor, "tokens heads v"]:
        row = cache.row
        assert isinstance(row, LatentRow), "a latent layer has latent rows"
        w_uk, w_uv = self._up_matrices()
        if row.latent < self.config.kv_lora_rank:
            w_uk, w_uv = w_uk[..., : row.latent], w_uv[..., : row.latent]
        q = absorb_query(q, w_uk, cos, sin)
        mixed = paged_attention(q, cache, segments, scale=self.scale, index=index)
        return project_values(mixed, w_uv)

    def _prefilled(
        self, q: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, prefill: Prefill
    ) -> Float[Tensor, "tokens heads v"]:
        row, rank = cache.row, self.config.kv_lora_rank
        assert isinstance(row, LatentRow), "a latent layer has latent rows"
        latent, k_rope = row.unpack(cache.rows.index_select(0, prefill.slots), q.dtype).split([rank, row.rope], -1)
        k, v = self._keys_and_values(latent, k_rope[:, None])
        q = rotate_query(q, cos, sin, self.config.qk_nope_head_dim)
        return varlen_attention(q, k, v, prefill.segments, scale=self.scale, keys=prefill.keys)

    @torch.no_grad()
    def absorb(self) -> None:
        """Make W_UK and W_UV, [heads, nope or v, latent], ready for the absorbed form.

        Of a dense weight they are views, which follow it; of a packed one copies, to be made again when it changes,
        where they are: recorded graphs read them.
        """
        self._join()
        c, weight = self.config, self.kv_b_proj.weight
        up = self.kv_b_proj.dense_weight(self.kv_a_layernorm.weight.dtype).detach()
        if self.kv_b_proj.format is not None:
            up = self._copied(up)
        w_uk, w_uv = up.view(c.num_heads, -1, c.kv_lora_rank).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        self._up = weight.data_ptr(), w_uk, w_uv

    def _copied(self, up: Tensor) -> Tensor:
        """`up` where the last copy was: recorded graphs read it."""
        last = self._copy
        if last is None or last.shape != up.shape or last.dtype != up.dtype or last.device != up.device:
            self._copy = up
            return up
        return last.copy_(up)

    def _join(self) -> None:
        """Make or renew `_joint`, in place: recorded graphs read it."""
        first = (self.q_proj if self.q_rank is None else self.q_a_proj).operand()
        second = self.kv_a_proj_with_mqa.operand()
        self._joint = joined(first, second, self._joint) if first.device.type == "cuda" else None

    def _up_matrices(self) -> tuple[Tensor, Tensor]:
        if self._up is None or self._up[0] != self.kv_b_proj.weight.data_ptr():  # moved to another device, say
            self.absorb()
        assert self._up is not None
        return self._up[1:]


def kv_width(config: MLAConfig) -> int:
    """Numbers of the down-projection: latent and shared rotary key."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def up_to_rank(x: Float[Tensor, "tokens *heads rank"], ranks: Int[Tensor, " tokens"] | None) -> Tensor:
    """`x` with zeros past each token's rank; unchanged without ranks."""
    if ranks is None:
        return x
    used = torch.arange(x.shape[-1], device=x.device) < ranks[:, None]
    return x * (used if x.ndim == 2 else used[:, None])
