"""Causal attention over packed sequences, and over the paged cache.

Without a cache, every sequence attends within itself. With a cache, sequence s has `context_lens[s]` visible tokens of
which the last `lengths[s]` are this step's, so row i of them sees keys up to its own position.
Either may be sparse: a lightning indexer then picks the keys of every query (kogia.ops.sparse).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kogia.ops.cache import KVRow, LatentRow, LayerCache
from kogia.ops.dispatch import op
from kogia.ops.segments import Bucket, Segments
from kogia.ops.sparse import IndexVectors, best_keys, index_scores, keep_topk


@op(cuda=("kogia.ops.triton.prefill",), cpu=("kogia.ops.cpu.varlen",))
def varlen_attention(
    q: Float[Tensor, "tokens heads qk"],
    k: Float[Tensor, "keys kv_heads qk"],
    v: Float[Tensor, "keys kv_heads v"],
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
    keys: Segments | None = None,
) -> Float[Tensor, "tokens heads v"]:
    """Causal softmax(q k^T * scale) v inside each sequence; query heads share key/value heads in equal groups.

    With `keys`, k and v are laid out by those: a sequence's last keys are its queries' own, earlier ones a context.
    """
    if keys is not None:
        assert index is None, "sparse attention with a context is the cache's"
        return _with_context(q, k, v, segments, keys, scale)
    heads, qk_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    if v_dim < qk_dim and q.device.type == "cpu":  # the fused kernel wants equal widths; zero columns change nothing
        v = F.pad(v, (0, qk_dim - v_dim))
    out = None if segments.buckets[0].rows is None else q.new_zeros(q.shape[0], heads, v_dim)
    for bucket in segments.buckets:
        grid = [bucket.to_grid(x).transpose(1, 2) for x in (q, k, v)]
        mask = None
        if index is not None and bucket.width > index.topk:
            mask = selected_keys(index, bucket)[:, None]
        with _kernels(q):
            attended = F.scaled_dot_product_attention(
                *grid, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != heads
            )
        rows = bucket.from_grid(attended.transpose(1, 2))[..., :v_dim]
        out = rows if out is None else out.index_copy(0, bucket.rows, rows)  # pyright: ignore
    assert out is not None
    return out


def _kernels(q: Tensor) -> AbstractContextManager[Any]:
    """Which kernel PyTorch tries first: cuDNN's takes keys and values of unlike widths, as latent attention's are."""
    return sdpa_kernel(_PREFERRED, set_priority=True) if q.device.type == "cuda" else nullcontext()


_PREFERRED = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def _with_context(q: Tensor, k: Tensor, v: Tensor, segments: Segments, keys: Segments, scale: float) -> Tensor:
    """One sequence at a time."""
    parts = zip(q.split(segments.lengths.tolist()), *(x.split(keys.lengths.tolist()) for x in (k, v)), strict=True)
    out = []
    for one in parts:
        grid = [x.transpose(0, 1)[None] for x in one]
        queries, visible = one[0].shape[0], one[1].shape[0]
        mask = torch.ones(queries, visible, dtype=torch.bool, device=q.device).tril(visible - queries)
        attended = F.scaled_dot_product_attention(
            *grid, attn_mask=mask, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


@torch.no_grad()
def selected_keys(index: IndexVectors, bucket: Bucket) -> Bool[Tensor, "seqs width width"]:
    """The keys each query of a bucket may attend to: causal, and among the `topk` best index scores."""
    q, k, weights = (bucket.to_grid(x) for x in (index.q, index.k, index.weights))
    causal = torch.ones(bucket.width, bucket.width, dtype=torch.bool, device=q.device).tril()
    return keep_topk(index_scores(q, k, weights), causal, index.topk)


def gather_context(
    rows: Shaped[Tensor, "slots row"], block_tables: Int[Tensor, "seqs blocks"], block_size: int
) -> Shaped[Tensor, "seqs context row"]:
    """Copy each sequence's cached rows out of its blocks."""
    num_seqs, num_blocks = block_tables.shape
    blocks = rows.view(-1, block_size * rows.shape[1]).index_select(0, block_tables.reshape(-1))
    return blocks.view(num_seqs, num_blocks * block_size, rows.shape[1])


def _visible(q_lens: Tensor, context_lens: Tensor, width: int, keys: int) -> Tensor:
    """[seqs, width, keys] mask: query i of a sequence stands at position context_len - q_len + i."""
    positions = (context_lens - q_lens)[:, None] + torch.arange(width, device=q_lens.device)
    return torch.arange(keys, device=q_lens.device) <= positions[..., None]


def paged_attention(
    q: Float[Tensor, "tokens heads qk"],
    cache: LayerCache,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
) -> Float[Tensor, "tokens heads value"]:
    """Attend to cached rows, this step's included, which must have been written.

    GQA reads keys and values of the row's heads. Absorbed MLA (DeepSeek-V2 section 2.1.2) is the case of one key/value
    head whose value is the first `latent` numbers of the key itself. With an `index`, every row ends in an index key,
    and a query attends to `index.topk` rows at most.
    """
    attend = cached_attention if cache.attend is None else cache.attend
    return attend(q, cache, segments, scale=scale, index=index)


@op(
    cuda=("kogia.ops.triton.hopper", "kogia.ops.triton.attention", "kogia.ops.triton.kv"),
    invariant=("kogia.ops.invariant.attention",),
    cpu=("kogia.ops.cpu.attention",),
)
def cached_attention(
    q: Float[Tensor, "tokens heads qk"],
    cache: LayerCache,
    segments: Segments,
    *,
    scale: float,
    index: IndexVectors | None = None,
) -> Float[Tensor, "tokens heads value"]:
    """`paged_attention` itself, whatever `cache.attend` says."""
    out = None
    for bucket in segments.buckets:
        context, visible = bucket_context(q, cache, segments, bucket)
        if index is not None and context.shape[1] > index.topk:
            context, visible, _ = narrow(context, visible, index, bucket)
        mixed = bucket.from_grid(_attend(bucket.to_grid(q), context, visible, cache.row, scale))
        if bucket.rows is None:
            return mixed
        out = q.new_empty(q.shape[0], *mixed.shape[1:]) if out is None else out
        out.index_copy_(0, bucket.rows, mixed)
    assert out is not None
    return out


def bucket_context(
    q: Float[Tensor, "tokens heads qk"], cache: LayerCache, segments: Segments, bucket: Bucket
) -> tuple[Float[Tensor, "seqs keys row"], Bool[Tensor, "seqs width keys"]]:
    """The rows that a bucket's sequences may see, as numbers, and which of them each query does."""
    tables, visible = _bucket_view(cache, segments, bucket)
    context = gather_context(cache.rows, tables, cache.block_size)
    return context if isinstance(cache.row, KVRow) else cache.row.unpack(context, q.dtype), visible


def _bucket_view(
    cache: LayerCache, segments: Segments, bucket: Bucket
) -> tuple[Int[Tensor, "seqs blocks"], Bool[Tensor, "seqs width keys"]]:
    """A bucket's block tables, cut to its longest context, and what its queries see: the same for every layer."""
    if bucket not in cache.shared:
        tables, contexts, lens = cache.block_tables, cache.context_lens, segments.device_lengths
        if bucket.seqs is not None:
            tables, contexts, lens = (x[bucket.seqs] for x in (tables, contexts, lens))
        tables = tables[:, : -(-int(cache.contexts[bucket.members].max()) // cache.block_size)]
        keys = tables.shape[1] * cache.block_size
        cache.shared[bucket] = tables, _visible(lens, contexts, bucket.width, keys)
    return cache.shared[bucket]


def narrow(
    context: Tensor, visible: Tensor, index: IndexVectors, bucket: Bucket
) -> tuple[Float[Tensor, "seqs keys row"], Bool[Tensor, "seqs width keys"], Int[Tensor, "seqs keys"] | None]:
    """Leave each query its selected keys: one query per sequence gathers them, several share a masked context.

    Third, which keys were gathered.
    """
    keys = context[..., -index.k.shape[-1] :]
    scores = index_scores(bucket.to_grid(index.q), keys, bucket.to_grid(index.weights))
    if bucket.width > 1:
        return context, keep_topk(scores, visible, index.topk), None
    best = best_keys(scores, visible, index.topk)[:, 0]
    chosen = context.gather(1, best[..., None].expand(-1, -1, context.shape[-1]))
    return chosen, visible.gather(2, best[:, None]), best


def shared_key_weights(
    q: Float[Tensor, "seqs width heads qk"],
    context: Float[Tensor, "seqs keys row"],
    visible: Bool[Tensor, "seqs width keys"],
    scale: float,
) -> Float[Tensor, "seqs width heads keys"]:
    """Attention probabilities over one shared key head: all query heads are rows of a single product."""
    scores = (q.flatten(1, 2) @ context[..., : q.shape[-1]].transpose(1, 2)).float().mul_(scale)
    return scores.unflatten(1, (-1, q.shape[2])).masked_fill_(~visible[:, :, None], float("-inf")).softmax(-1)


def _attend(
    q: Float[Tensor, "seqs width heads qk"],
    context: Float[Tensor, "seqs keys row"],
    visible: Bool[Tensor, "seqs width keys"],
    row: LatentRow | KVRow,
    scale: float,
) -> Float[Tensor, "seqs width heads value"]:
    heads = q.shape[2]
    if isinstance(row, LatentRow) or row.num_heads == 1:
        values = context[..., : row.latent] if isinstance(row, LatentRow) else context[..., row.head_dim :]
        weights = shared_key_weights(q, context, visible, scale)
        return (weights.to(values.dtype).flatten(1, 2) @ values).unflatten(1, (-1, heads))
    keys, values = context.unflatten(-1, (2 * row.num_heads, row.head_dim)).transpose(1, 2).chunk(2, 1)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=visible[:, None], scale=scale, enable_gqa=heads != row.num_heads
    )
    return mixed.transpose(1, 2)
