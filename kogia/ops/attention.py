"""Causal attention over packed sequences, and over the paged cache.

Without a cache, every sequence attends within itself. With a cache, sequence s has `context_lens[s]` visible tokens of
which the last `cu_seqlens[s+1] - cu_seqlens[s]` are this step's, so row i of them sees keys up to its own position.
Sequences of similar length are padded together (padding below a factor of two) and handed to dense kernels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class _ToGrid(torch.autograd.Function):
    """Copy packed rows into a zeroed grid. Slots are unique, so the backward is a plain gather, no accumulation."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros((num_slots, *x.shape[1:])).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _FromGrid(torch.autograd.Function):
    """Read packed rows back out of a grid; the transpose of `_ToGrid`."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad.new_zeros((ctx.num_slots, *grad.shape[1:])).index_copy_(0, ctx.saved_tensors[0], grad), None


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Sequences of similar length laid out as a [seqs, width] grid."""

    seqs: Tensor | None  # which sequences; None when the bucket holds them all, in order
    rows: Tensor | None  # their packed rows; None likewise
    slots: Tensor  # grid slot of each row
    num_seqs: int
    width: int


def buckets_by_length(cu_seqlens: Int[Tensor, " seqs_plus_1"], max_seqlen: int) -> list[_Bucket]:
    """Group sequences whose lengths share a power of two. One bucket, without copies, when all lengths are alike."""
    starts = cu_seqlens[:-1]
    lengths = cu_seqlens[1:] - starts
    num_tokens = int(cu_seqlens[-1])
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=num_tokens)
    offset = torch.arange(num_tokens, device=lengths.device) - starts[owner]
    if len(lengths) * max_seqlen <= 1.25 * num_tokens + 256:
        return [_Bucket(None, None, owner * max_seqlen + offset, len(lengths), max_seqlen)]
    powers = torch.ceil(torch.log2(lengths.clamp(min=1).double())).long()
    buckets = []
    for power in powers.unique().tolist():
        seqs = (powers == power).nonzero().flatten()
        rank = torch.full_like(lengths, -1)
        rank[seqs] = torch.arange(len(seqs), device=seqs.device)
        rows = (rank[owner] >= 0).nonzero().flatten()
        width = int(lengths[seqs].max())
        buckets.append(_Bucket(seqs, rows, rank[owner[rows]] * width + offset[rows], len(seqs), width))
    return buckets


def varlen_attention(
    q: Float[Tensor, "tokens heads qk"],
    k: Float[Tensor, "tokens kv_heads qk"],
    v: Float[Tensor, "tokens kv_heads v"],
    buckets: list[_Bucket],
    scale: float,
) -> Float[Tensor, "tokens heads v"]:
    """Causal softmax(q k^T * scale) v inside each sequence; query heads share key/value heads in equal groups.

    `buckets` comes from `buckets_by_length`, made once per forward and used by every layer.
    """
    heads, qk_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    if v_dim < qk_dim:  # the fused CPU and flash kernels want equal widths; zero columns of v change nothing
        v = F.pad(v, (0, qk_dim - v_dim))
    out = None if buckets[0].rows is None else q.new_zeros(q.shape[0], heads, v_dim)
    for bucket in buckets:
        grid = []
        for x in (q, k, v):
            picked = x if bucket.rows is None else _FromGrid.apply(x, bucket.rows)
            padded = _ToGrid.apply(picked, bucket.slots, bucket.num_seqs * bucket.width)
            grid.append(padded.view(bucket.num_seqs, bucket.width, *x.shape[1:]).transpose(1, 2))  # pyright: ignore
        attended = F.scaled_dot_product_attention(
            *grid, is_causal=True, scale=scale, enable_gqa=k.shape[1] != heads
        ).transpose(1, 2)
        flat = attended.reshape(bucket.num_seqs * bucket.width, heads, attended.shape[-1])
        rows: Tensor = _FromGrid.apply(flat, bucket.slots)[..., :v_dim]  # pyright: ignore
        out = rows if out is None else out.index_copy(0, bucket.rows, rows)  # pyright: ignore
    assert out is not None
    return out


def gather_context(
    rows: Float[Tensor, "slots row"], block_tables: Int[Tensor, "seqs blocks"], block_size: int, max_context: int
) -> Float[Tensor, "seqs context row"]:
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
    rows: Float[Tensor, "slots row"],
    block_tables: Int[Tensor, "seqs blocks"],
    context_lens: Int[Tensor, " seqs"],
    cu_seqlens: Int[Tensor, " seqs_plus_1"],
    buckets: list[_Bucket],
    *,
    block_size: int,
    max_context: int,
    num_kv_heads: int,
    value_offset: int,
    value_dim: int,
    scale: float,
) -> Float[Tensor, "tokens heads value"]:
    """Attend to cached rows. A row holds `num_kv_heads` keys at its start and values from `value_offset` on.

    GQA: keys then values, value_offset = kv_heads * head_dim. Absorbed MLA (DeepSeek-V2 section 2.1.2) is the case of
    one key/value head whose value is the first `kv_lora_rank` numbers of the key itself: value_offset = 0.
    """
    heads, qk_dim = q.shape[1:]
    group = heads // num_kv_heads
    q_lens = cu_seqlens[1:] - cu_seqlens[:-1]
    out = q.new_empty(q.shape[0], heads, value_dim)
    for bucket in buckets:
        some = bucket.seqs is not None
        tables, contexts = (
            (block_tables[bucket.seqs], context_lens[bucket.seqs]) if some else (block_tables, context_lens)
        )
        lens = q_lens[bucket.seqs] if some else q_lens
        longest = int(contexts.max()) if some else max_context
        context = gather_context(rows, tables, block_size, longest)
        num_seqs, num_keys = context.shape[:2]
        keys = context[..., : num_kv_heads * qk_dim].unflatten(-1, (num_kv_heads, qk_dim)).transpose(1, 2)
        values = context[..., value_offset : value_offset + num_kv_heads * value_dim]
        values = values.unflatten(-1, (num_kv_heads, value_dim)).transpose(1, 2)
        visible = _visible(lens, contexts, bucket.width, num_keys)[:, None]
        picked = q[bucket.rows] if some else q
        if bucket.width > 1:
            picked = q.new_zeros(num_seqs * bucket.width, heads, qk_dim).index_copy_(0, bucket.slots, picked)
        grid = picked.view(num_seqs, bucket.width, heads, qk_dim)
        if num_kv_heads > 1:
            mixed = F.scaled_dot_product_attention(
                grid.transpose(1, 2), keys, values, attn_mask=visible, scale=scale, enable_gqa=group > 1
            ).transpose(1, 2)
        else:  # one key head: all query heads are rows of a single product, and no key is copied for them
            flat = grid.reshape(num_seqs, bucket.width * heads, qk_dim)
            scores = (flat @ keys[:, 0].transpose(-1, -2)).float().mul_(scale)
            scores = scores.view(num_seqs, bucket.width, heads, num_keys)
            scores.masked_fill_(~visible[:, 0, :, None], float("-inf"))
            mixed = scores.softmax(-1).to(values.dtype).flatten(1, 2) @ values[:, 0]
        flat = mixed.reshape(num_seqs * bucket.width, heads, value_dim)
        picked = flat if bucket.width == 1 else flat.index_select(0, bucket.slots)
        if bucket.rows is None:
            return picked
        out.index_copy_(0, bucket.rows, picked)
    return out
