import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kogia.ops.attention import gather_context, paged_attention, varlen_attention
from kogia.ops.cache import KVRow, LatentRow, LayerCache
from kogia.ops.mass import attention_mass
from kogia.ops.segments import segments_of


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int = 0) -> Tensor:
    """One sequence, one query and one head at a time; query i stands at position first + i."""
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    rows = []
    for i in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            seen = slice(0, first + i + 1)
            weights = torch.softmax(k[seen, h // group] @ q[i, h] * scale, 0)
            heads.append(weights @ v[seen, h // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else out


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_varlen(lengths, kv_heads, group, qk, width):
    tokens = sum(lengths)
    q, k = draw(tokens, kv_heads * group, qk).requires_grad_(), draw(tokens, kv_heads, qk, seed=1).requires_grad_()
    v, upstream = draw(tokens, kv_heads, width, seed=2).requires_grad_(), draw(tokens, kv_heads * group, width, seed=3)
    want = torch.cat(
        [attend(q[a:b], k[a:b], v[a:b], 0.3) for a, b in zip(ends(lengths)[:-1], ends(lengths)[1:], strict=True)]
    )
    got = varlen_attention(q, k, v, segments_of(lengths), scale=0.3)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), upstream),
        torch.autograd.grad(want, (q, k, v), upstream),
        rtol=1e-8,
        atol=1e-8,
    )


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    qk=st.integers(1, 5),
    width=st.integers(1, 5),
)
@settings(max_examples=40)
def test_packed_attention_is_the_loop_over_sequences(lengths, kv_heads, group, qk, width):
    check_varlen(lengths, kv_heads, group, qk, width)


@pytest.mark.parametrize(
    "lengths", [[300, 1, 2, 1, 40, 3], [1] * 30 + [290], [270, 130, 8, 9]], ids=["mixed", "singles", "powers"]
)
def test_very_uneven_lengths_take_several_buckets_and_change_nothing(lengths):
    segments = segments_of(lengths)
    buckets = segments.buckets
    assert len(buckets) > 1
    assert sum(b.num_seqs * b.width for b in buckets) < 2 * sum(lengths)
    seqs = torch.cat([b.seqs for b in buckets]).sort().values
    rows = torch.cat([b.rows for b in buckets]).sort().values
    assert seqs.tolist() == list(range(len(lengths)))
    assert rows.tolist() == list(range(sum(lengths)))
    tokens = sum(lengths)
    q, k, v = (draw(tokens, 2, 3, seed=s).requires_grad_() for s in range(3))
    got = varlen_attention(q, k, v, segments, scale=0.5)
    want = torch.cat(
        [  # dense float64 formula, quicker than the loop at this size
            torch.einsum(
                "hqk,khv->qhv",
                (torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * 0.5)
                .masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf"))
                .softmax(-1),
                v[a:b],
            )
            for a, b in zip(ends(lengths)[:-1].tolist(), ends(lengths)[1:].tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(got, want)
    upstream = draw(tokens, 2, 3, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream)
    )


def test_padding_never_leaks_between_sequences():
    lengths = [5, 3]
    q, k, v = (draw(8, 2, 4, seed=s) for s in range(3))
    before = varlen_attention(q, k, v, segments_of(lengths), scale=0.5)
    k[5:], v[5:] = 1e6, float("nan")
    after = varlen_attention(q, k, v, segments_of(lengths), scale=0.5)
    torch.testing.assert_close(after[:5], before[:5], rtol=0, atol=0)


def test_bfloat16_is_close_to_float64():
    q, k, v = (draw(20, 4, 8, seed=s).bfloat16() for s in range(3))
    got = varlen_attention(q, k[:, :2], v[:, :2, :6], segments_of([12, 8]), scale=0.35)
    assert got.dtype == torch.bfloat16
    wide = [t.double() for t in (q, k[:, :2], v[:, :2, :6])]
    want = torch.cat([attend(*(t[a:b] for t in wide), 0.35) for a, b in ((0, 12), (12, 20))])
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


@st.composite
def steps(draw_):
    """(context, new) per sequence: whole prompts, prefill chunks, single decodes and verify rows in one step."""
    pairs = []
    for _ in range(draw_(st.integers(1, 5))):
        new = draw_(st.sampled_from([1, 1, 2, 3, 7, 13]))
        pairs.append((new + draw_(st.integers(0, 14)), new))
    return pairs


def layer_cache(rows: Tensor, tables: list[list[int]], pairs, block_size: int, row, slack: int = 0) -> LayerCache:
    """As one that has been written to; the host's bounds may lie `slack` above the contexts."""
    contexts = np.array([context for context, _ in pairs])
    nothing = torch.empty(0, dtype=torch.long)
    return LayerCache(
        rows, nothing, torch.tensor(tables), torch.from_numpy(contexts), contexts + slack, block_size, row
    )


def paged(pairs, block_size, kv_heads, group, qk, width, *, shared, poison, seed=0, slack=0):
    """Run paged attention on shuffled blocks, and the loop on the same keys and values."""
    generator = torch.Generator().manual_seed(seed)
    blocks_of = [-(-context // block_size) for context, _ in pairs]
    num_blocks, widest = sum(blocks_of) + 2, max(blocks_of)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    row = LatentRow(width, qk - width) if shared else KVRow(kv_heads, qk)
    offset = 0 if shared else kv_heads * qk
    rows = torch.full((num_blocks * block_size, row.width), 1e3 if poison else 0.0, dtype=torch.float64)
    tables, queries, want = [], [], []
    for s, (context, new) in enumerate(pairs):
        table = [free.pop() for _ in range(blocks_of[s])]
        slots = torch.tensor([table[t // block_size] * block_size + t % block_size for t in range(context)])
        rows[slots] = draw(context, row.width, seed=10 + s)
        tables.append(table + [free[0]] * (widest + 1 - len(table)))  # padded with any valid block
        queries.append(draw(new, kv_heads * group, qk, seed=50 + s))
        k = rows[slots, : kv_heads * qk].view(context, kv_heads, qk)
        v = rows[slots, offset : offset + kv_heads * width].view(context, kv_heads, width)
        want.append(attend(queries[-1], k, v, 0.4, first=context - new))
    cache = layer_cache(rows, tables, pairs, block_size, row, slack)
    got = paged_attention(torch.cat(queries), cache, segments_of([new for _, new in pairs]), scale=0.4)
    return got, torch.cat(want)


@given(pairs=steps(), block_size=st.sampled_from([1, 3, 4, 16]), kv_heads=st.integers(1, 2), group=st.integers(1, 3))
@settings(max_examples=40)
def test_paged_attention_is_the_loop_for_any_mix_of_prefill_decode_and_verify(pairs, block_size, kv_heads, group):
    got, want = paged(pairs, block_size, kv_heads, group, 3, 3, shared=False, poison=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # scores are kept in float32


@given(pairs=steps(), block_size=st.sampled_from([2, 5]))
@settings(max_examples=20)
def test_values_may_be_the_first_part_of_the_key(pairs, block_size):
    got, want = paged(pairs, block_size, 1, 4, 6, 4, shared=True, poison=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_long_prefill_beside_many_decodes_takes_several_buckets():
    pairs = [(40, 1)] * 12 + [(300, 290)] + [(9, 3)] * 2
    got, want = paged(pairs, 16, 1, 2, 3, 3, shared=False, poison=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_decode_only_steps_take_the_path_of_width_one():
    pairs = [(1, 1), (17, 1), (5, 1)]
    assert [(b.width, b.slots, b.rows) for b in segments_of([1, 1, 1]).buckets] == [(1, None, None)]
    got, want = paged(pairs, 4, 2, 2, 3, 3, shared=False, poison=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", [[(9, 4), (3, 1), (7, 7)], [(6, 1), (3, 1)], [(40, 1)] * 12 + [(300, 290), (9, 3)]])
def test_mass_is_the_attention_that_a_row_got_from_real_queries(pairs):
    """The weights themselves are what attention gives when the values are unit vectors. Unused rows are NaN."""
    blocks_of, size = [-(-context // 4) for context, _ in pairs], 4
    tables = torch.randperm(sum(blocks_of) + 1, generator=torch.Generator().manual_seed(1)).tolist()
    rows = torch.full((len(tables) * size, 5), float("nan"), dtype=torch.float64)
    mass, want = torch.ones(len(rows)), torch.ones(len(rows), dtype=torch.float64)
    own = [[tables.pop() for _ in range(count)] for count in blocks_of]
    queries = [draw(new, 3, 5, seed=s) for s, (_, new) in enumerate(pairs)]
    for table, q, (context, new) in zip(own, queries, pairs, strict=True):
        slots = (torch.tensor(table)[:, None] * size + torch.arange(size)).flatten()[:context]
        rows[slots] = draw(context, 5, seed=context)
        weights = attend(q, rows[slots][:, None], torch.eye(context).double()[:, None], 0.4, first=context - new)
        want[slots] += weights.mean(1).sum(0)
    padded = [t + own[0][:1] * (max(blocks_of) - len(t)) for t in own]
    cache = layer_cache(rows, padded, pairs, size, LatentRow(4, 1))
    attention_mass(torch.cat(queries), cache, segments_of([new for _, new in pairs]), mass, scale=0.4)
    torch.testing.assert_close(mass.double(), want, rtol=1e-5, atol=1e-5)


def test_bounds_above_the_contexts_change_nothing():
    got, want = paged([(9, 2), (3, 2), (30, 1)], 4, 1, 3, 6, 4, shared=True, poison=True, slack=5)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gathered_context_follows_the_block_table():
    rows = torch.arange(12.0)[:, None] * torch.tensor([1.0, 100.0])
    context = gather_context(rows, torch.tensor([[2, 0], [1, 1]]), 3)
    assert context[..., 0].tolist() == [[6, 7, 8, 0, 1, 2], [3, 4, 5, 3, 4, 5]]
    assert torch.equal(context[..., 1], context[..., 0] * 100)
