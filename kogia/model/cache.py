"""The paged cache that serving and rollout share: fixed-size blocks of rows, one row per token and layer.

A row holds the normed latent and the rotated shared key for MLA (DeepSeek-V2 section 2.1.3; kogia.ops.cache_rows), or
the keys and then the values of all key/value heads for GQA. A sequence owns a list of blocks (its block table); token
`t` of it lives in slot `block_table[t // block_size] * block_size + t % block_size`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from kogia.model.config import MLAConfig, ModelConfig
from kogia.ops.cache_rows import LatentRow


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Storage for every layer, the MTP layers last."""

    rows: Shaped[Tensor, "layers slots row"]
    """Numbers in the cache's dtype, or bytes where latent rows are FP8."""
    block_size: int
    row: LatentRow | None = None
    """Layout of a latent row; None for grouped-query attention."""

    @property
    def num_blocks(self) -> int:
        return self.rows.shape[1] // self.block_size


def latent_row(config: ModelConfig, *, fp8: bool = False, rank: int | None = None) -> LatentRow | None:
    """How rows of this model are stored; `rank` keeps only that many numbers of the latent."""
    a = config.attention
    if not isinstance(a, MLAConfig):
        if fp8 or rank is not None:
            raise ValueError("an FP8 cache and latent ranks need latent attention; this model has key and value heads")
        return None
    if rank is not None and not 1 <= rank <= a.kv_lora_rank:
        raise ValueError(f"latent rank {rank}: must lie in 1..kv_lora_rank = {a.kv_lora_rank}")
    index = a.indexer.head_dim if a.indexer is not None else 0
    return LatentRow(rank or a.kv_lora_rank, a.qk_rope_head_dim, index, fp8)


def build_cache(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    row: LatentRow | None = None,
) -> PagedCache:
    """Allocate `num_blocks` zeroed blocks of `block_size` tokens for every decoder and MTP layer.

    `row` is the layout of latent rows, by default the dense one of full rank.
    """
    row = row or latent_row(config)
    shape = (config.num_cache_layers, num_blocks * block_size, row.width if row else config.attention.cache_row)
    dtype = torch.uint8 if row is not None and row.fp8 else dtype
    return PagedCache(torch.zeros(shape, dtype=dtype, device=device), block_size, row)


@dataclass(frozen=True, slots=True)
class StepCache:
    """What one engine step tells the attention layers about the cache. Built by `engine.runner`."""

    pool: PagedCache
    slots: Int[Tensor, " tokens"]
    """Where each new token's row is written."""
    block_tables: Int[Tensor, "seqs blocks"]
    """Blocks of each sequence, padded with any valid block."""
    context_lens: Int[Tensor, " seqs"]
    """Visible tokens of each sequence, this step's included."""
    max_context: int
    """The largest of `context_lens`, known on the host."""
    ranks: Int[Tensor, " tokens"] | None = None
    """How many numbers of the latents each new token's query reads; None: all that are stored."""
    mass: Float[Tensor, " slots"] | None = None
    """Where one layer's attention is added up, row by row, for pruning."""
    layers: tuple["StepCache", ...] = ()
    """What each layer sees instead, where layers keep different rows (engine.pruning)."""

    def at(self, layer: int) -> "StepCache":
        return self.layers[layer] if self.layers else self
