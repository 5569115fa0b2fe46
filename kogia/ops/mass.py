"""How much attention cached rows receive: what pruning goes by (kogia.engine.pruning)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kogia.ops.attention import bucket_context, narrow, shared_key_weights
from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.dispatch import op
from kogia.ops.segments import Segments
from kogia.ops.sparse import IndexVectors


@op()
def attention_mass(
    q: Float[Tensor, "tokens heads qk"],
    cache: LayerCache,
    segments: Segments,
    mass: Float[Tensor, " slots"],
    *,
    scale: float,
    index: IndexVectors | None = None,
) -> None:
    """Add to `mass` what this step's queries give to each cached row: summed over queries, averaged over heads.

    The rest is as in `paged_attention`, of latent rows.
    """
    assert isinstance(cache.row, LatentRow), "attention mass is counted for one key head only"
    lengths = segments.device_lengths
    for bucket in segments.buckets:
        context, visible = bucket_context(q, cache, segments, bucket)
        tables, lens = cache.block_tables, lengths
        if bucket.seqs is not None:
            tables, lens = tables[bucket.seqs], lens[bucket.seqs]
        slots = _context_slots(tables, cache.block_size, context.shape[1])
        if index is not None and context.shape[1] > index.topk:
            context, visible, chosen = narrow(context, visible, index, bucket)
            slots = slots if chosen is None else slots.gather(1, chosen)
        weights = shared_key_weights(bucket.to_grid(q), context, visible, scale)
        padding = torch.arange(bucket.width, device=q.device) >= lens[:, None]
        received = weights.mean(2).masked_fill(padding[..., None], 0.0).sum(1)
        mass.index_add_(0, slots.flatten(), received.flatten())  # behind a context's end this adds 0 to anyone's row


def _context_slots(tables: Int[Tensor, "seqs blocks"], block_size: int, keys: int) -> Int[Tensor, "seqs keys"]:
    """Where the rows of `gather_context` stand."""
    tables = tables[:, : keys // block_size, None]
    return (tables * block_size + torch.arange(block_size, device=tables.device)).flatten(1)
