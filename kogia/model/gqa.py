"""Grouped-query attention (Llama, Qwen, DeepSeekMoE). Multi-head and multi-query attention are its two ends."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kogia.model.config import GQAConfig
from kogia.model.layers import RMSNorm, StepContext
from kogia.model.linear import Linear
from kogia.ops.attention import paged_attention, varlen_attention
from kogia.ops.cache import LayerCache, write_kv
from kogia.ops.prefill import absorbed_part, prefill_of
from kogia.ops.rope import rotate_half_split
from kogia.ops.segments import Segments


class GQA(nn.Module):
    def __init__(self, dim: int, config: GQAConfig, norm_eps: float, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, config.head_dim**-0.5
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(dim, config.num_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(dim, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(dim, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, dim)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, norm_eps)
            self.k_norm = RMSNorm(config.head_dim, norm_eps)

    def forward(self, x: Float[Tensor, "tokens dim"], step: StepContext) -> Float[Tensor, "tokens dim"]:
        c = self.config
        q = self.q_proj(x).view(-1, c.num_heads, c.head_dim)
        k = self.k_proj(x).view(-1, c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_half_split(part, step.cos, step.sin) for part in (q, k))
        v = self.v_proj(x).view(-1, c.num_kv_heads, c.head_dim)
        if step.cache is None:
            mixed = varlen_attention(q, k, v, step.segments, scale=self.scale)
        else:
            cache = step.cache.layers[self.layer]
            write_kv(k, v, cache)
            mixed = self._cached(q, cache, step.segments)
        return self.o_proj(mixed.flatten(1))

    def _cached(self, q: Tensor, cache: LayerCache, segments: Segments) -> Float[Tensor, "tokens heads dim"]:
        """Attend to the pages, and where sequences run many tokens to their keys and values laid out side by side."""
        prefill = prefill_of(cache, segments)
        if prefill is None:
            return paged_attention(q, cache, segments, scale=self.scale)
        rows, heads = prefill.num_rows, self.config.num_kv_heads
        stored = cache.rows.index_select(0, prefill.slots).unflatten(-1, (2 * heads, -1))
        keys, values = stored.split(heads, 1)
        many = varlen_attention(q[rows:], keys, values, prefill.segments, scale=self.scale, keys=prefill.keys)
        if not rows:
            return many
        few = paged_attention(q[:rows], *absorbed_part(cache, segments, prefill), scale=self.scale)
        return torch.cat((few, many))
