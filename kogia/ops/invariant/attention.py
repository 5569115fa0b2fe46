"""Attention over the cache, a query by itself, over pieces of its context in order (Milakov and Gimelshein, 2018).

    m' = max(m, max s);   l' = l e^(m - m') + sum e^(s - m');   o' = o e^(m - m') + e^(s - m') v

Pieces begin at multiples of `KEYS`, wherever a chunk of the prompt ended. A piece that a query sees nothing of changes
nothing: m' = m, and it adds zeros. So how far the longest context of the batch reaches does not matter.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kogia.ops.cache import KVRow, LayerCache
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors

KEYS = 64
"""Keys of a piece."""
WIDTHS = 16
"""Vectors are padded with zeros to a multiple of this: products of equal shapes then are aligned alike as well."""
FEW = 32
"""Sequences that run more queries than this share the copy of their context; others take one for each query."""


def cached_attention(
    q: Float[Tensor, "tokens heads qk"],
    cache: LayerCache,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
) -> Float[Tensor, "tokens heads value"]:
    """In float32."""
    visible = cache.context_lens[segments.owner] - segments.device_lengths[segments.owner] + segments.offsets + 1
    parts = _parts(segments.lengths)
    if len(parts) == 1 and len(parts[0][1]) == segments.num_tokens:
        return _attend(q, cache, segments.owner, visible, int(cache.contexts.max()), scale)
    mixed, order = [], []
    for rows, owner in parts:
        at, whose = torch.from_numpy(rows).to(q.device), torch.from_numpy(owner).to(q.device)
        mixed.append(_attend(q[at], cache, whose, visible[at], int(cache.contexts[owner].max()), scale))
        order.append(at)
    out = torch.cat(mixed)
    return torch.empty_like(out).index_copy_(0, torch.cat(order), out)


def _parts(lengths: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(packed rows, their sequences): those of all short sequences, then of every long one, which is named once."""
    ends, is_short = np.cumsum(lengths), lengths <= FEW
    rows = np.flatnonzero(np.repeat(is_short, lengths))
    parts = [(rows, np.searchsorted(ends, rows, side="right"))] if len(rows) else []
    long = np.flatnonzero(~is_short)
    return [*parts, *((np.arange(ends[s] - lengths[s], ends[s]), np.array([s])) for s in long)]


def cached_attention_supports(
    q: Tensor, cache: LayerCache, segments: Segments, *, scale: float, index: IndexVectors | None = None
) -> str | None:
    return "sparse attention has no batch-invariant form" if index is not None else None


def _attend(
    q: Float[Tensor, "queries heads qk"],
    cache: LayerCache,
    owner: Int[Tensor, " contexts"],
    visible: Int[Tensor, " queries"],
    longest: int,
    scale: float,
) -> Float[Tensor, "queries heads value"]:
    """`owner` is the sequence of each query, or the one of all of them."""
    row, dtype = cache.row, q.dtype
    groups, width = (row.num_heads, row.head_dim) if isinstance(row, KVRow) else (1, row.latent)
    q = _widened(q.float()).unflatten(1, (groups, -1))
    top = q.new_full((*q.shape[:3], 1), float("-inf"))
    total, mixed = torch.zeros_like(top), torch.zeros_like(q)
    for start in range(0, longest, KEYS):
        keys, values = _piece(cache, owner, start, dtype)
        hidden = torch.arange(start, start + KEYS, device=q.device) >= visible[:, None]
        scores = _product(q, keys.transpose(2, 3)) * scale
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        kept, weights = (top - higher).exp(), (scores - higher).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        mixed = mixed * kept + _product(weights, values)
        top = higher
    return (mixed / total)[..., :width].flatten(1, 2).to(dtype)


def _product(
    a: Float[Tensor, "queries groups heads in"], b: Float[Tensor, "contexts groups in out"]
) -> Float[Tensor, "queries groups heads out"]:
    """One product of [heads, in] and [in, out] for every query and group; a single context is not copied."""
    if len(a) == len(b):
        return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return torch.stack([torch.bmm(x.contiguous(), y.expand(len(a), -1, -1)) for x, y in zip(a.unbind(1), b[0])], 1)


def _piece(
    cache: LayerCache, owner: Int[Tensor, " contexts"], start: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "contexts groups KEYS width"], Float[Tensor, "contexts groups KEYS width"]]:
    """Keys and values `start` to `start + KEYS` of each context; behind its blocks any of its own."""
    at = torch.arange(start, start + KEYS, device=owner.device)
    block = (at // cache.block_size).clamp_max(cache.block_tables.shape[1] - 1)
    slots = cache.block_tables[owner][:, block] * cache.block_size + at % cache.block_size
    rows = cache.rows.index_select(0, slots.flatten()).view(*slots.shape, -1)
    row = cache.row
    if not isinstance(row, KVRow):
        wide = _widened(row.unpack(rows, dtype).float()[..., : row.latent + row.rope])[:, None]
        return wide, wide  # the value is the beginning of the key
    keys, values = rows.float().unflatten(-1, (2, row.num_heads, -1)).transpose(1, 3).unbind(2)
    return _widened(keys), _widened(values)


def _widened(x: Float[Tensor, "... width"]) -> Float[Tensor, "... wider"]:
    missing = -x.shape[-1] % WIDTHS
    return (F.pad(x, (0, missing)) if missing else x).contiguous()
