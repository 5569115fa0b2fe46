"""The paged cache that serving and rollout share: fixed-size blocks of rows, one row per token and layer.

A row holds the normed latent and the rotated shared key for MLA (DeepSeek-V2 section 2.1.3), or the keys and then the
values of all key/value heads for GQA. A sequence owns a list of blocks (its block table); token `t` of it lives in slot
`block_table[t // block_size] * block_size + t % block_size`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Storage for every layer, the MTP layers last."""

    rows: Float[Tensor, "layers slots row"]
    block_size: int

    @property
    def num_blocks(self) -> int:
        return self.rows.shape[1] // self.block_size


def build_cache(
    config: ModelConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device | str
) -> PagedCache:
    """Allocate `num_blocks` zeroed blocks of `block_size` tokens for every decoder and MTP layer."""
    shape = (config.num_cache_layers, num_blocks * block_size, config.attention.cache_row)
    return PagedCache(torch.zeros(shape, dtype=dtype, device=device), block_size)


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
