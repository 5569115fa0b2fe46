"""Causal attention over packed sequences, and over the paged cache.

Without a cache, every sequence attends within itself. With a cache, sequence s has `context_lens[s]` visible tokens of
which the last `cu_seqlens[s+1] - cu_seqlens[s]` are this step's, so row i of them sees keys up to its own position.
Either may be sparse: a lightning indexer then picks the keys of every query (kogia.ops.sparse).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kogia.ops.cache_rows import LatentRow
from kogia.ops.grid import Bucket
from kogia.ops.sparse import IndexVectors, index_scores, keep_topk


def varlen_attention(
    q: Float[Tensor, "tokens heads qk"],
    k: Float[Tensor, "tokens kv_heads qk"],
    v: Float[Tensor, "tokens kv_heads v"],
    buckets: list[Bucket],
    scale: float,
    index: IndexVectors | None = None,
) -> Float[Tensor, "tokens heads v"]:
    """Causal softmax(q k^T * scale) v inside each sequence; query heads share key/value heads in equal groups.

    `buckets` comes from `buckets_by_length`, made once per forward and used by every layer.
    """
    heads, qk_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    if v_dim < qk_dim:  # the fused CPU and flash kernels want equal widths; zero columns of v change nothing
        v = F.pad(v, (0, qk_dim - v_dim))
    out = None if buckets[0].rows is None else q.new_zeros(q.shape[0], heads, v_dim)
    for bucket in buckets:
        grid = [bucket.to_grid(x).transpose(1, 2) for x in (q, k, v)]
        mask = None
        if index is not None and bucket.width > index.topk:
            mask = selected_keys(index, bucket)[:, None]
        attended = F.scaled_dot_product_attention(
            *grid, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != heads
        )
        rows = bucket.from_grid(attended.transpose(1, 2))[..., :v_dim]
        out = rows if out is None else out.index_copy(0, bucket.rows, rows)  # pyright: ignore
    assert out is not None
    return out


@torch.no_grad()
def selected_keys(index: IndexVectors, bucket: Bucket) -> Bool[Tensor, "seqs width width"]:
    """The keys each query of a bucket may attend to: causal, and among the `topk` best index scores."""
    q, k, weights = (bucket.to_grid(x) for x in (index.q, index.k, index.weights))
    causal = torch.ones(bucket.width, bucket.width, dtype=torch.bool, device=q.device).tril()
    return keep_topk(index_scores(q, k, weights), causal, index.topk)


def gather_context(
    rows: Shaped[Tensor, "slots row"], block_tables: Int[Tensor, "seqs blocks"], block_size: int, max_context: int
) -> Shaped[Tensor, "seqs context row"]:
    """Copy each sequence's cached rows out of its blocks, up to the block that ends `max_context`."""
    num_blocks = -(-max_context // block_size)
    tables = block_tables[:, :num_blocks]
    blocks = rows.view(-1, block_size * rows.shape[1]).index_select(0, tables.reshape(-1))
    return blocks.view(tables.shape[0], num_blocks * block_size, rows.shape[1])


def _visible(q_lens: Tensor, context_lens: Tensor, width: int, keys: int) -> Tensor:
    """[seqs, width, keys] mask: query i of a sequence stands at position context_len - q_len + i."""
    positions = (context_lens - q_lens)[:, None] + torch.arange(width, device=q_lens.device)
    return torch.arange(keys, device=q_lens.device) <= positions[..., None]


def paged_attention(
    q: Float[Tensor, "tokens heads qk"],
    rows: Shaped[Tensor, "slots row"],
    block_tables: Int[Tensor, "seqs blocks"],
    context_lens: Int[Tensor, " seqs"],
    cu_seqlens: Int[Tensor, " seqs_plus_1"],
    buckets: list[Bucket],
    *,
    block_size: int,
    max_context: int,
    num_kv_heads: int,
    value_offset: int,
    value_dim: int,
    scale: float,
    row: LatentRow | None = None,
    index: IndexVectors | None = None,
    mass: Float[Tensor, " slots"] | None = None,
) -> Float[Tensor, "tokens heads value"]:
    """Attend to cached rows. A row holds `num_kv_heads` keys at its start and values from `value_offset` on.

    GQA: keys then values, value_offset = kv_heads * head_dim. Absorbed MLA (DeepSeek-V2 section 2.1.2) is the case of
    one key/value head whose value is the first `kv_lora_rank` numbers of the key itself: value_offset = 0. `row`
    says how such rows are stored. With an `index`, every row ends in an index key, and a query attends to `index.topk`
    rows at most. With `mass`, which takes one key/value head, the attention that each row gets is added to its own.
    """
    q_lens = cu_seqlens[1:] - cu_seqlens[:-1]
    out = q.new_empty(q.shape[0], q.shape[1], value_dim)
    for bucket in buckets:
        if bucket.seqs is None:
            tables, contexts, lens, longest = block_tables, context_lens, q_lens, max_context
        else:
            tables, contexts, lens = (x[bucket.seqs] for x in (block_tables, context_lens, q_lens))
            longest = int(contexts.max())
        context = gather_context(rows, tables, block_size, longest)
        context = context if row is None else row.unpack(context, q.dtype)
        visible = _visible(lens, contexts, bucket.width, context.shape[1])
        chosen = None
        if index is not None and context.shape[1] > index.topk:
            context, visible, chosen = _narrow(context, visible, index, bucket)
        mixed, weights = _attend(bucket.to_grid(q), context, visible, num_kv_heads, value_offset, value_dim, scale)
        if mass is not None:
            assert weights is not None, "attention mass is counted for one key head only"
            slots = _context_slots(tables, block_size, longest)
            _add_mass(mass, weights, lens, slots if chosen is None else slots.gather(1, chosen))
        del weights  # as large as the scores: not to be held while the next bucket is gathered
        picked = bucket.from_grid(mixed)
        if bucket.rows is None:
            return picked
        out.index_copy_(0, bucket.rows, picked)
    return out


def _narrow(
    context: Tensor, visible: Tensor, index: IndexVectors, bucket: Bucket
) -> tuple[Float[Tensor, "seqs keys row"], Bool[Tensor, "seqs width keys"], Int[Tensor, "seqs keys"] | None]:
    """Leave each query its selected keys: one query per sequence gathers them, several share a masked context.

    Third, which keys were gathered.
    """
    keys = context[..., -index.k.shape[-1] :]
    scores = index_scores(bucket.to_grid(index.q), keys, bucket.to_grid(index.weights))
    if bucket.width > 1:
        return context, keep_topk(scores, visible, index.topk), None
    best = scores.masked_fill(~visible, float("-inf")).topk(index.topk, dim=-1).indices[:, 0]
    narrow = context.gather(1, best[..., None].expand(-1, -1, context.shape[-1]))
    return narrow, visible.gather(2, best[:, None]), best


def _attend(
    q: Float[Tensor, "seqs width heads qk"],
    context: Float[Tensor, "seqs keys row"],
    visible: Bool[Tensor, "seqs width keys"],
    num_kv_heads: int,
    value_offset: int,
    value_dim: int,
    scale: float,
) -> tuple[Float[Tensor, "seqs width heads value"], Float[Tensor, "seqs width heads keys"] | None]:
    """The mixed values, and the weights behind them where there is one key head."""
    heads, qk_dim = q.shape[2:]
    values = context[..., value_offset : value_offset + num_kv_heads * value_dim]
    if num_kv_heads > 1:
        keys = context[..., : num_kv_heads * qk_dim].unflatten(-1, (num_kv_heads, qk_dim)).transpose(1, 2)
        values = values.unflatten(-1, (num_kv_heads, value_dim)).transpose(1, 2)
        shared = heads != num_kv_heads
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=visible[:, None], scale=scale, enable_gqa=shared
        )
        return mixed.transpose(1, 2), None
    # one key head: all query heads are rows of a single product, and no key is copied for them
    scores = (q.flatten(1, 2) @ context[..., :qk_dim].transpose(1, 2)).float().mul_(scale)
    weights = scores.unflatten(1, (-1, heads)).masked_fill_(~visible[:, :, None], float("-inf")).softmax(-1)
    del scores
    return (weights.to(values.dtype).flatten(1, 2) @ values).unflatten(1, (-1, heads)), weights


def _context_slots(tables: Tensor, block_size: int, max_context: int) -> Int[Tensor, "seqs context"]:
    """Where the rows of `gather_context` stand."""
    tables = tables[:, : -(-max_context // block_size), None]
    return (tables * block_size + torch.arange(block_size, device=tables.device)).flatten(1)


def _add_mass(
    mass: Float[Tensor, " slots"],
    weights: Float[Tensor, "seqs width heads keys"],
    q_lens: Int[Tensor, " seqs"],
    slots: Int[Tensor, "seqs keys"],
) -> None:
    """Add up what every row got: averaged over heads, summed over queries, without those that pad the grid."""
    padding = torch.arange(weights.shape[1], device=q_lens.device) >= q_lens[:, None]
    received = weights.mean(2).masked_fill(padding[..., None], 0.0).sum(1)
    mass.index_add_(0, slots.flatten(), received.flatten())  # behind a context's end this adds 0 to anyone's row
