"""The indexer's scores, selection and loss against plain loops, and sparse attention against dense on what it keeps."""

import math

import numpy as np
import pytest
import torch

from kogia.ops.attention import paged_attention, selected_keys, varlen_attention
from kogia.ops.cache import LatentRow, LayerCache
from kogia.ops.mass import attention_mass
from kogia.ops.segments import segments_of
from kogia.ops.sparse import IndexVectors, index_scores, indexer_loss, keep_topk

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
