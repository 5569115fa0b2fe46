"""The indexer's scores, selection and loss against plain loops, and sparse attention against dense on what it keeps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kogia.ops.attention import paged_attention, selected_keys, varlen_attention
from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.mass import attention_mass
from kogia.ops.segments import segments_of
from kogia.ops.sparse import IndexVectors, best_keys, index_scores, indexer_loss, keep_topk

LENGTHS = [7, 1, 12, 30]
HEADS, DIM = 5, 6


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).float()


def some_index(tokens: int, topk: int) -> IndexVectors:
    return IndexVectors(drawn(tokens, HEADS, DIM), drawn(tokens, DIM), drawn(tokens, HEADS), topk)


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def chosen_by_loop(index: IndexVectors, start: int, query: int) -> list[int]:
    """Packed rows that `query` may attend to, from the published formula one number at a time."""
    scores = []
    for key in range(start, query + 1):
        total = 0.0
        for head in range(HEADS):
            product = float(index.q[query, head].detach().double() @ index.k[key].double())
            total += float(index.weights[query, head]) * max(product, 0.0)
        scores.append((total, key))
    return sorted(key for _, key in sorted(scores, reverse=True)[: index.topk])


def test_index_scores_are_weighted_sums_of_positive_parts():
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    k = torch.tensor([[[3.0, -1.0], [-1.0, 1.0]]])
    # head 0: 3, -1 -> 3, 0 ; head 1: -2, 2 -> 0, 2
    assert index_scores(q, k, torch.tensor([[[0.5, -2.0]]])).tolist() == [[[1.5, -4.0]]]


def test_a_query_with_fewer_allowed_keys_than_topk_keeps_them_all_and_no_other():
    scores = torch.tensor([[5.0, 1.0, 2.0, 9.0]]).expand(4, 4)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert keep_topk(scores, causal, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    assert keep_topk(scores, causal, 99).equal(causal)


@pytest.mark.parametrize("topk", [1, 4, 40])
def test_sparse_attention_attends_to_exactly_the_chosen_keys(topk):
    cu = boundaries(LENGTHS)
    tokens = sum(LENGTHS)
    q, k, v = drawn(tokens, 3, 4), drawn(tokens, 3, 4) * 1.1, drawn(tokens, 3, 2)
    index = some_index(tokens, topk)
    got = varlen_attention(q, k, v, segments_of(LENGTHS), scale=0.5, index=index)
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for query in range(start, end):
            rows = chosen_by_loop(index, start, query)
            weights = (torch.einsum("hd,khd->hk", q[query], k[rows]) * 0.5).softmax(-1)
            torch.testing.assert_close(got[query], torch.einsum("hk,khd->hd", weights, v[rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("topk", "new"), [(3, 1), (3, 4), (64, 1), (64, 4)])
def test_cached_sparse_attention_chooses_the_same_keys_for_one_and_for_several_queries(topk, new):
    """One query per sequence gathers its keys, several mask them; a context within topk stays dense."""
    contexts, size, width = [9, 17, 20], 4, 8
    rows = drawn(64, width + DIM)
    tables = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:15].view(3, 5)
    q, index = drawn(3 * new, 2, width), some_index(3 * new, topk)
    mass, received, segments = torch.ones(64), torch.ones(64), segments_of([new] * 3)
    host, nothing = np.array(contexts), torch.empty(0, dtype=torch.long)
    cache = LayerCache(rows, nothing, tables, torch.tensor(contexts), host, size, LatentRow(5, 3, DIM))
    got = paged_attention(q, cache, segments, scale=0.3, index=index)
    attention_mass(q, cache, segments, mass, scale=0.3, index=index)
    for seq, context in enumerate(contexts):
        own = rows.view(16, size, -1)[tables[seq]].flatten(0, 1)
        for i in range(new):
            query, seen = seq * new + i, context - new + i + 1
            score = index_scores(index.q[None, query, None], own[None, :seen, width:], index.weights[None, query, None])
            best = score[0, 0].topk(min(topk, seen)).indices
            weights = (q[query] @ own[best, :width].T * 0.3).softmax(-1)
            torch.testing.assert_close(got[query], weights @ own[best, :5], atol=1e-5, rtol=1e-5)
            received[(tables[seq, best // size] * size + best % size)] += weights.mean(0)
    torch.testing.assert_close(mass, received, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("topk", [3, 99])
def test_the_indexer_loss_is_the_divergence_from_the_attention_it_imitates(topk):
    cu, tokens = boundaries(LENGTHS), sum(LENGTHS)
    q, k, index = drawn(tokens, 3, 4), drawn(tokens, 3, 4) * 1.1, some_index(tokens, topk)
    index.q.requires_grad_()
    q.requires_grad_()
    got = indexer_loss(q, k, index, segments_of(LENGTHS), 0.5)
    want = 0.0
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        for query in range(start, end):
            rows = chosen_by_loop(index, start, query)
            p = (torch.einsum("hd,khd->hk", q[query], k[rows]).double() * 0.5).softmax(-1).mean(0)
            one = slice(query, query + 1)
            score = index_scores(index.q[one], index.k[rows], index.weights[one])[0].double()
            want += (p * (p.log() - score.log_softmax(-1))).sum().item()
    assert math.isclose(got.item(), want, rel_tol=1e-5)
    got.backward()
    assert q.grad is None
    assert index.q.grad.abs().sum() > 0
    assert index.q.grad.isfinite().all()


def test_selection_carries_no_gradient():
    index = some_index(12, 3)
    index.q.requires_grad_()
    assert not selected_keys(index, segments_of([12]).buckets[0]).requires_grad


def best_by_loop(scores: list[float], allowed: list[bool], topk: int) -> set[int]:
    """In float64, one key at a time: a better score, or an equal one at a later place, goes first."""
    best: list[int] = []
    for _ in range(topk):
        left = [key for key in range(len(scores)) if allowed[key] and key not in best]
        if left:
            best.append(max(left, key=lambda key: (scores[key], key)))
    return set(best)


@given(
    scores=st.lists(
        st.sampled_from([-2.5, -1e-30, -0.0, 0.0, 0.0, 0.0, 1e-30, 1.5, math.inf]), min_size=1, max_size=70
    ),
    padding=st.integers(0, 70),
    topk=st.integers(1, 80),
    data=st.data(),
)
def test_of_equal_scores_the_later_keys_are_taken_whatever_stands_behind_them(scores, padding, topk, data):
    allowed = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    wide = torch.tensor([[*scores, *[math.inf] * padding]])
    mask = torch.tensor([[*allowed, *[False] * padding]])
    want = best_by_loop(scores, allowed, topk)
    assert set(keep_topk(wide, mask, topk)[0].nonzero().flatten().tolist()) == want
    chosen = best_keys(wide, mask, topk)[0]
    assert len(chosen) == min(topk, len(scores) + padding)
    assert set(chosen[mask[0][chosen]].tolist()) == want


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    heads=st.integers(1, 2),
    topk=st.integers(1, 8),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_few_index_heads_choose_the_same_keys_packed_alone_and_cached_in_any_chunks(lengths, heads, topk, size, data):
    """Small whole numbers: products are exact, and most scores are equal."""
    tokens, width = sum(lengths), 3
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    iq, ik, weights = (
        torch.randint(-2, 3, (tokens, *shape), generator=generator).float() for shape in ((heads, 2), (2,), (heads,))
    )
    index, row = IndexVectors(iq, ik, weights, topk), LatentRow(2, 1, 2)
    q, k = torch.randn(tokens, 2, width, generator=generator), torch.randn(tokens, width, generator=generator)
    packed = varlen_attention(
        q, k[:, None].expand(-1, 2, -1), k[:, None, :2].expand(-1, 2, -1), segments_of(lengths), scale=0.5, index=index
    )
    ends = np.cumsum(lengths)
    chunks = [cut_up(length, data) for length in lengths]
    cached = in_chunks(q, torch.cat((k, ik), -1), index, lengths, chunks, row, size)
    for start, end in zip(ends - lengths, ends, strict=True):
        for query in range(start, end):
            scores = [
                sum(float(w) * max(float(a @ b), 0.0) for w, a in zip(weights[query].double(), iq[query].double()))
                for b in ik[start : query + 1].double()
            ]
            rows = sorted(int(start) + key for key in best_by_loop(scores, [True] * len(scores), topk))
            attended = (torch.einsum("hd,kd->hk", q[query], k[rows]) * 0.5).softmax(-1) @ k[rows, :2]
            torch.testing.assert_close(packed[query], attended, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cached[query], attended, atol=1e-5, rtol=1e-5)


def cut_up(length: int, data: st.DataObject) -> list[int]:
    """Chunk sizes that add up to `length`."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(data.draw(st.integers(1, length - sum(sizes))))
    return sizes


def in_chunks(q, rows, index, lengths, chunks, row, size):
    """Attention over a paged cache: step i takes chunk i of every sequence that has one; blocks are scattered."""
    blocks = -(-max(lengths) // size)
    tables = torch.randperm(blocks * len(lengths), generator=torch.Generator().manual_seed(1)).view(
        len(lengths), blocks
    )
    storage = torch.full((blocks * len(lengths) * size, rows.shape[1]), 1e30)  # what was never written is never chosen
    starts, out = np.cumsum(lengths) - lengths, torch.empty(len(q), q.shape[1], row.latent)
    for step in range(max(map(len, chunks))):
        alive = [s for s in range(len(lengths)) if step < len(chunks[s])]
        done = [sum(chunks[s][:step]) for s in alive]
        spans = [range(first, first + chunks[s][step]) for s, first in zip(alive, done, strict=True)]
        own = torch.tensor([int(starts[s]) + t for s, span in zip(alive, spans, strict=True) for t in span])
        slots = [
            int(tables[s, t // size]) * size + t % size for s, span in zip(alive, spans, strict=True) for t in span
        ]
        storage[slots] = rows[own]
        contexts = np.array([span.stop for span in spans])
        cache = LayerCache(storage, own, tables[alive], torch.from_numpy(contexts), contexts, size, row)
        part = IndexVectors(index.q[own], index.k[own], index.weights[own], index.topk)
        out[own] = paged_attention(q[own], cache, segments_of([len(span) for span in spans]), scale=0.5, index=part)
    return out
