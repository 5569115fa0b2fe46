"""Attention over the paged cache: eight queries of a key head at once, over 32 keys after the other."""

import torch
from torch import Tensor

from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.cpu.common import DTYPES, Kernel, alike_refusal, refusal
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors

_attend = Kernel("kogia_cached_attention", "6q 4q 3q 3q d 2q")


def cached_attention(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> Tensor:
    """Read keys and values where they are; nothing of the cache is copied."""
    row, rows, tables = cache.row, cache.rows, cache.block_tables
    tokens, heads, width = q.shape
    if isinstance(row, LatentRow):
        key_heads, value_width, value_offset, value_stride = 1, row.latent, 0, 0
    else:
        key_heads, value_width = row.num_heads, row.head_dim
        value_offset, value_stride = row.num_heads * row.head_dim, row.head_dim
    out = torch.empty(tokens, heads, value_width, dtype=q.dtype)
    _attend(
        DTYPES[q.dtype], q.data_ptr(), heads, key_heads, width, value_width,
        rows.data_ptr(), rows.stride(0), value_offset, value_stride,
        tables.data_ptr(), tables.stride(0), cache.block_size, cache.context_lens.data_ptr(),
        segments.cu_seqlens.data_ptr(), segments.num_seqs, scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def cached_attention_supports(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> str | None:
    row = cache.row
    if index is not None or (isinstance(row, LatentRow) and row.fp8):
        return "it attends to dense rows, without an indexer"
    if cache.block_tables.stride(-1) != 1:
        return f"it takes block tables whose rows lie side by side, not strides {cache.block_tables.stride()}"
    whole = (cache.context_lens, segments.cu_seqlens)
    return alike_refusal(q, cache.rows) or refusal(*whole, dtypes=(torch.int64,))
