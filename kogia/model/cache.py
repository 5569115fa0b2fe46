"""The paged cache that serving and rollout share: fixed-size blocks of rows, one row per token and layer.

A row holds the normed latent and the rotated shared key for MLA (DeepSeek-V2 section 2.1.3), or the keys and then the
values of all key/value heads for GQA (kogia.ops.cache). A sequence owns a list of blocks (its block table); token `t`
of it lives in slot `block_table[t // block_size] * block_size + t % block_size`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from kogia.model.config import MLAConfig, ModelConfig
from kogia.ops.cache import KVRow, LatentRow, LayerCache


@dataclass(frozen=True, slots=True, eq=False)
class StepCache:
    """What one engine step tells the attention layers about the cache: one `LayerCache` each, the MTP layers last."""

    layers: tuple[LayerCache, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PagedCache:
    """Storage for every layer, the MTP layers last."""

    rows: Shaped[Tensor, "layers slots row"]
    """Numbers in the cache's dtype, or bytes where latent rows are FP8. Behind the blocks stands one more, nobody's:
    what must go somewhere and will not be read is written there."""
    block_size: int
    row: LatentRow | KVRow
    expands: bool = False
    """Sequences that run many tokens attend to keys and values taken out of their rows: faster on a GPU."""

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences may own."""
        return self.rows.shape[1] // self.block_size - 1

    @property
    def spare_slot(self) -> int:
        """A slot of nobody's block."""
        return self.num_blocks * self.block_size

    def step(
        self,
        slots: Int[Tensor, " tokens"],
        block_tables: Int[Tensor, "seqs blocks"],
        context_lens: Int[Tensor, " seqs"],
        contexts: Int[np.ndarray, " seqs"],
    ) -> StepCache:
        """The same view for every layer; the arguments are those of `LayerCache`."""
        shared = (slots, block_tables, context_lens, contexts, self.block_size, self.row, {}, self.expands)
        return StepCache(tuple(LayerCache(rows, *shared) for rows in self.rows.unbind()))


def cache_row(config: ModelConfig, *, fp8: bool = False, rank: int | None = None) -> LatentRow | KVRow:
    """How rows of this model are stored; `rank` keeps only that many numbers of the latent."""
    a = config.attention
    if not isinstance(a, MLAConfig):
        if fp8 or rank is not None:
            raise ValueError("an FP8 cache and latent ranks need latent attention; this model has key and value heads")
        return KVRow(a.num_kv_heads, a.head_dim)
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
    row: LatentRow | KVRow | None = None,
) -> PagedCache:
    """Allocate `num_blocks` zeroed blocks of `block_size` tokens for every decoder and MTP layer, and nobody's.

    `row` is the layout of the rows, by default the dense one of full rank.
    """
    row = row or cache_row(config)
    shape = (config.num_cache_layers, (num_blocks + 1) * block_size, row.width)
    dtype = torch.uint8 if isinstance(row, LatentRow) and row.fp8 else dtype
    expands = isinstance(row, KVRow) or (not row.index and row == cache_row(config, fp8=row.fp8))
    expands = expands and torch.device(device).type == "cuda"
    return PagedCache(torch.zeros(shape, dtype=dtype, device=device), block_size, row, expands)
